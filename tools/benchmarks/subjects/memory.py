"""The most memory a rank holds resident while it trains from a slice store, against what it cannot do without."""

from collections.abc import Iterator
from math import prod
from typing import Any

from benchmarks.compare import Pair, rows
from benchmarks.setting import Setting
from benchmarks.stl import NO_AUGMENTATION, arguments, execute, peak_bytes, stl
from stl_lightning.networks import MLP

PAIR = Pair("stl fit of one branch from a store", "its slice, its model, import lightning", "ratio <= 1.15")
NETWORK = "--model.network.class_path=stl_lightning.networks.MLP"
COPIES = 4  # of each parameter: itself, its gradient, Adam's two moments
TRAIN = """
from stl_lightning.__main__ import main
assert main({args!r}) == 0
"""


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    data = setting.data("cifar10", 45_000)
    store = setting.folder / "memory-store"
    more = [f"--data.store={store}", NETWORK, "--model.network.init_args={}", "--run.branches=[0]"]
    more += [*NO_AUGMENTATION, "--trainer.max_epochs=2"]
    args = arguments(setting, "cifar10.yaml", data, "cpu", *more)
    execute(stl("prepare", *args))
    shape = (3, 16, 16)
    n_bytes = 4 * (data.n_stored * prod(shape) + COPIES * sum(p.numel() for p in MLP(shape, 10).parameters()))
    sides = {
        PAIR.name: peak_bytes(TRAIN.format(args=["fit", *args])),
        PAIR.against: peak_bytes("import lightning", n_bytes),
    }
    values = setting.take_turns(sides, threads, warm=False)
    yield from rows(values, [PAIR], "bytes", "lower", threads=threads, data=data.origin)
