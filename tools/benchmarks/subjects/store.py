"""Writing a slice store against writing plain arrays, and reading from it against a tensor in memory."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch

from benchmarks.compare import Pair, Side, Turn, rows, steadily
from benchmarks.data import Data
from benchmarks.setting import Setting
from benchmarks.stl import arguments, execute, stl
from stl_lightning.sources import open_source
from stl_lightning.store import DTYPES, open_store

BATCH = 128
PREPARE, SAVE = "stl prepare, CIFAR-10 in 4 slices", "torch and numpy.save"
GATHER, INDEX = f"StoredSlice.gather of {BATCH}, {{}}", f"Tensor.index_select of {BATCH}"
SAVE_ALL = """
import numpy, torch
from stl_lightning.images import as_float
from stl_lightning.sources import open_source
from stl_lightning.spectral import SpectralSplit
source = open_source({source!r}, {root!r})
for split in ("train", "test"):
    images = source.load(split)
    slices = SpectralSplit(source.image_shape, 2, "polyphase", "dct")(as_float(images.pixels))
    for k, values in enumerate(slices):
        numpy.save({folder!r} + f"/{{split}}-{{k}}.npy", values.numpy())
    numpy.save({folder!r} + f"/{{split}}-labels.npy", images.labels.numpy())
"""


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    data = setting.data("cifar10", 45_000)
    common: dict[str, Any] = {"threads": threads, "data": data.origin}
    sides = {PREPARE: preparing(setting, data), SAVE: saving(setting, data)}
    yield from rows(setting.take_turns(sides, threads, warm=False), [Pair(PREPARE, SAVE)], "s", "lower", **common)
    others = [] if setting.quick else [dtype for dtype in DTYPES if dtype != "float32"]
    stores = {"float32": next(setting.folder.glob("float32-*")) / "store"}
    stores |= {dtype: prepared(setting, data, dtype) for dtype in others}
    n_bytes = {f"store, {dtype}": [float(size(store))] for dtype, store in stores.items()}
    plain = {"the same in float32": [float(4 * read_values(data))]}
    yield from rows(n_bytes | plain, [Pair(name, *plain) for name in n_bytes], "bytes", "lower", **common)

    seconds = setting.choose(0.3, 0.02)
    index = steadily(BATCH, partial(gathers, None, data.n), seconds)
    reads = {GATHER.format(dtype): steadily(BATCH, partial(gathers, s, data.n), seconds) for dtype, s in stores.items()}
    values = setting.take_turns(reads | {INDEX: index}, 1)
    yield from rows(values, [Pair(name, INDEX) for name in reads], "samples / s", **common | {"threads": 1})


def prepared(setting: Setting, data: Data, dtype: str = "float32") -> Path:
    folder = Path(mkdtemp(dir=setting.folder, prefix=f"{dtype}-")) / "store"
    options = [f"--data.store={folder}", f"--dtype={dtype}", "--data.transform=dct"]
    execute(stl("prepare", *options, *arguments(setting, "cifar10.yaml", data, "cpu")))
    return folder


def preparing(setting: Setting, data: Data) -> Side:
    def side(turn: Turn) -> None:
        while True:
            prepared(setting, data)
            turn.done(turn.seconds())

    return side


def saving(setting: Setting, data: Data) -> Side:
    def side(turn: Turn) -> None:
        while True:
            folder = mkdtemp(dir=setting.folder)
            code = SAVE_ALL.format(source=data.source, root=str(data.root), folder=folder)
            execute([sys.executable, "-c", code])
            turn.done(turn.seconds())

    return side


def gathers(store: Path | None, n: int) -> Callable[[], Any]:
    """Random batches of slice 0: from a store, or (None) from a tensor of the same shape."""
    if store is None:
        values = torch.rand(n, 3, 16, 16)
        return lambda: values.index_select(0, torch.randint(n, (BATCH,)))
    stored = open_store(store).slice("train", 0)
    return lambda: stored.gather(torch.randint(n, (BATCH,)))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_values(data: Data) -> int:
    """Pixels of all images, training and test."""
    source = open_source(data.source, data.root)
    n_images = sum(len(source.load(split)) for split in ("train", "test"))
    return n_images * prod(source.image_shape)
