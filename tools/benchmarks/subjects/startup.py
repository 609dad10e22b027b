"""What a user waits for: help texts, and the first step of a training."""

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.compare import Pair, rows
from benchmarks.setting import Setting
from benchmarks.stl import arguments, command, stl

BARE, LIGHTNING = "python -c pass", "import lightning.pytorch"


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    helps = {f"stl {words}": command(*stl(*words.split())) for words in ("--help", "ensemble --help")}
    values = setting.take_turns(helps | {BARE: command(sys.executable, "-c", "pass")}, threads)
    pairs = [Pair(name, BARE, "median <= 0.5") for name in helps]
    yield from rows(values, pairs, "s", "lower", threads=threads)

    data = setting.data("mnist", 55_000)
    leave = "--trainer.callbacks+=benchmarks.stl.LeaveAfterFirstStep"
    fit = stl("fit", *arguments(setting, "mnist.yaml", data, "cpu", "--run.branches=[0]", leave))
    first_step = Pair("stl fit until the first step, one branch", LIGHTNING)
    sides = {first_step.name: command(*fit), LIGHTNING: command(sys.executable, "-c", LIGHTNING)}
    values = setting.take_turns(sides, threads)
    yield from rows(values, [first_step], "s", "lower", threads=threads, data=data.origin)
