"""16 branches stacked on one GPU, against one branch alone on it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.compare import Pair, Side, rows
from benchmarks.data import Data
from benchmarks.plain import BATCH
from benchmarks.setting import Setting
from benchmarks.stl import NO_AUGMENTATION, arguments, training

# 16 times the work in at most twice the time is 8 times the rate.
MLPS = Pair("16 MLPs, 1x7x7", "1 MLP, 1x7x7", "ratio >= 8")
CONVNETS = Pair("16 ConvNets, 3x56x56, bfloat16", "1 ConvNet, 3x56x56, bfloat16")
WIDTHS = "[64,64,64,P,128,128,128,P,256,256,256,256,P]"
PHOTOGRAPHS = (
    *NO_AUGMENTATION, "--data.block=4", "--trainer.precision=bf16-mixed", "--model.channels_last=true",
    f"--model.network.init_args.widths={WIDTHS}",
)  # fmt: skip


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    if "cuda" not in setting.devices:
        for pair in (MLPS, CONVNETS):
            yield {"name": pair.name, "against": pair.against, "skipped": "no CUDA here"}
        return
    cases = [
        (MLPS, "mnist.yaml", setting.data("mnist", 55_000), ()),
        (CONVNETS, "cifar10.yaml", setting.data("photographs", 10 * BATCH, n_quick=BATCH), PHOTOGRAPHS),
    ]
    for pair, config, data, settings in cases:
        sides = both(pair, data, partial(arguments, setting, config, data, "cuda", *settings))
        values = setting.take_turns(sides, threads)
        yield from rows(values, [pair], "samples x branches / s", device="cuda", threads=threads, data=data.origin)


def both(pair: Pair, data: Data, stl: partial[list[str]]) -> dict[str, Side]:
    return {pair.name: training(stl(), data.n), pair.against: training(stl("--run.branches=[0]"), data.n)}
