"""Images to slices: all of them against copying the images, and one slice against all."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.compare import Pair, Side, rows, steadily
from benchmarks.setting import Setting
from stl_lightning.spectral import SpectralSplit

Work = Callable[[SpectralSplit, Tensor], Callable[[], Any]]

# (c, H, W), images, block, reorganisation, transform, goal of all slices, goal of one slice
CASES = [
    ((3, 32, 32), 1024, 2, "polyphase", "dct2", "ratio >= 0.25", None),
    ((3, 32, 32), 1024, 2, "polyphase", "dct", "ratio >= 0.25", None),
    ((3, 32, 32), 1024, 4, "polyphase", "dct2", None, "ratio >= 3"),
    ((3, 224, 224), 32, 4, "polyphase", "dct2", "ratio >= 0.25", "ratio >= 3"),
    ((3, 224, 224), 32, 4, "polyphase", "dct", "ratio >= 0.25", "ratio >= 3"),
    ((1, 28, 28), 1024, 4, "raster", "dct", None, None),
]


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    for shape, n_full, block, reorganisation, transform, all_goal, one_goal in CASES:
        n = setting.choose(n_full, 4)
        what = f"{'x'.join(map(str, shape))}, block {block}, {reorganisation} {transform}"
        split = SpectralSplit(shape, block, reorganisation, transform)
        pairs = [
            Pair(f"all slices, {what}", "Tensor.copy_", all_goal),
            Pair(f"one slice, {what}", f"all slices, {what}", one_goal),
        ]
        works: list[Work] = [all_slices, one_slice, copy]
        names = [pairs[0].name, pairs[1].name, "Tensor.copy_"]
        for device in setting.devices:
            sides = {name: timed(setting, work, split, n, device) for name, work in zip(names, works, strict=True)}
            values = setting.take_turns(sides, threads)
            yield from rows(values, pairs, "bytes of images / s", device=device, threads=threads, data="generated")


def timed(setting: Setting, work: Work, split: SpectralSplit, n: int, device: str) -> Side:
    def prepare() -> Callable[[], Any]:
        return torch.no_grad()(work(split.to(device), torch.rand(n, *split.image_shape, device=device)))

    n_bytes = 4 * n * split.image_shape[0] * split.image_shape[1] * split.image_shape[2]
    return steadily(n_bytes, prepare, setting.choose(0.3, 0.02))


def all_slices(split: SpectralSplit, images: Tensor) -> Callable[[], Any]:
    """Into memory that was used before, as the copy."""
    out = images.new_empty(split.n_slices, len(images), *split.slice_shape(0))
    return partial(split, images, out)


def one_slice(split: SpectralSplit, images: Tensor) -> Callable[[], Any]:
    return partial(split.slice, images, split.n_slices // 2)


def copy(split: SpectralSplit, images: Tensor) -> Callable[[], Any]:
    return partial(torch.empty_like(images).copy_, images)
