"""What each option that promises speed does to a training: the same training with it and without it."""

import os
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.compare import Pair, Side, only_where, rows
from benchmarks.plain import BATCH
from benchmarks.setting import Setting
from benchmarks.stl import NO_AUGMENTATION, arguments, no_bfloat16, training

BFLOAT, UNFUSED = "--trainer.precision=bf16-mixed", "--model.optimizer.init_args.fused=false"
COMPILED, CHANNELS_LAST = "--model.compile=default", "--model.channels_last=true"
# name -> config, data set, steps of a repetition, settings of the training, settings of each option
CASES: dict[str, tuple[str, str, int, tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "16 MLPs": (
        "mnist.yaml", "mnist", 200, (),
        {"bfloat16": (BFLOAT,), "Adam not fused": (UNFUSED,), "torch.compile": (COMPILED,)},
    ),
    "ConvNet": (
        "cifar10.yaml", "cifar10", 8,
        ("--run.branches=[0]", *NO_AUGMENTATION),
        {
            "bfloat16": (BFLOAT,), "channels_last": (CHANNELS_LAST,),
            "bfloat16, channels_last": (BFLOAT, CHANNELS_LAST), "Adam not fused": (UNFUSED,),
            "torch.compile": (COMPILED,),
        },
    ),
}  # fmt: skip


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    for device in setting.devices:
        for name, (config, data_set, steps, settings, options) in list(CASES.items())[: setting.choose(None, 1)]:
            data = setting.data(data_set, steps * BATCH, n_quick=16)
            stl = partial(arguments, setting, config, data, device, *settings)
            without = f"{name}, as configured"
            sides: dict[str, Side] = {without: training(stl(), data.n)}
            # Compiling takes too long to be quick.
            for option, added in list(options.items())[: setting.choose(None, 2)]:
                side = training(stl(*added), data.n)
                side = only_where(no_compiler, side) if COMPILED in added else side
                side = only_where(partial(no_bfloat16, device), side) if BFLOAT in added else side
                sides[f"{name}, {option}"] = side
            values = setting.take_turns(sides, threads)
            pairs = [Pair(other, without) for other in sides if other != without]
            yield from rows(values, pairs, "samples x branches / s", device=device, threads=threads, data=data.origin)


def no_compiler() -> str | None:
    found = shutil.which(os.environ.get("CXX", "c++"))
    return None if found else "torch.compile needs a C++ compiler, and there is none"
