"""Minibatches handed to Lightning in chunks: of one, as every Lightning loop does it, of ten and of fifty."""

from collections.abc import Iterator
from typing import Any

from benchmarks.compare import Pair, rows
from benchmarks.setting import Setting
from benchmarks.stl import arguments, training

CHUNKS = (1, 10, 50)
NAME = "chunks of {}"


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    data = setting.data("mnist", 55_000)
    for device in setting.devices:
        sides = {
            NAME.format(chunk): training(
                arguments(setting, "mnist.yaml", data, device, "--run.branches=[0]", f"--run.chunk={chunk}"), data.n
            )
            for chunk in CHUNKS
        }
        values = setting.take_turns(sides, threads)
        pairs = [Pair(NAME.format(chunk), NAME.format(1)) for chunk in CHUNKS[1:]]
        yield from rows(values, pairs, "samples / s", device=device, threads=threads, data=data.origin)
