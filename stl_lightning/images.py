"""Labelled images of one split: a tensor in memory, or files that are decoded when they are fetched.

Letters: n samples, c channels, h w space.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from stl_lightning.augment import Augment, box_draws, resized_crop_box
from stl_lightning.errors import ConfigError, DataError


@dataclass(frozen=True)
class ImageArray:
    """Images in memory. Shapes: pixels (n, c, h, w), uint8 or float in [0, 1]; labels (n,) int64."""

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.labels):
            received = f"{len(self.labels)} labels and {len(self.pixels)} images"
            raise DataError(f"expected one label per image, received {received}; correct data.root")

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(
        self,
        indices: Tensor | np.ndarray,
        augment: Augment | None = None,
        seed: int = 0,
        epoch: int = 0,
        block: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """The images at `indices` (n,), augmented with the draws of (seed, epoch): (n, c, h, w) uint8.

        Raises: ConfigError for `resized_crop`, which needs images larger than they are wanted.
        """
        if augment and augment.resized_crop:
            raise ConfigError(
                "data.augment.resized_crop: expected null for this source, whose images have one small size, "
                f"received {augment.resized_crop}; use data.augment.crop_pad"
            )
        images = self.pixels[torch.as_tensor(indices)]
        return augment(images, seed, epoch, indices, block) if augment else images


class ImageFiles:
    """Images in files, decoded when they are fetched. Shapes: labels (n,) int64."""

    def __init__(self, paths: Sequence[str], labels: Tensor, image_size: int) -> None:
        # One array, not a million str objects: each worker process would copy those, page by page, as their
        # reference counts change.
        self.paths = np.array([os.fsencode(path) for path in paths])
        self.labels = labels
        self.image_size = image_size

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(
        self,
        indices: Tensor | np.ndarray,
        augment: Augment | None = None,
        seed: int = 0,
        epoch: int = 0,
        block: tuple[int, int] = (1, 1),
    ) -> Tensor:
        """The images at `indices` (n,), augmented with the draws of (seed, epoch): (n, 3, h, w) uint8.

        Equivalent: torchvision's Resize(image_size * 256 / 224) and CenterCrop(image_size), or, with
        `resized_crop`, RandomResizedCrop(image_size); RGB, bilinear.
        Raises: DataError that names a file which is no readable image.
        """
        scale = augment.resized_crop if augment else None
        draws = box_draws(seed, epoch, indices)
        images = torch.empty(len(indices), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for position, index in enumerate(indices):
            path = os.fsdecode(self.paths[int(index)])
            images[position] = _decode(path, self.image_size, scale, draws[position])
        return augment(images, seed, epoch, indices, block) if augment else images


def _decode(path: str, size: int, scale: tuple[float, float] | None, draws: np.ndarray) -> Tensor:
    from PIL import Image
    from torchvision.transforms import functional

    with reading(path, "replace or delete it"), Image.open(path) as file:
        image = file.convert("RGB")
    if scale is None:
        image = functional.center_crop(functional.resize(image, round(size * 256 / 224)), size)
    else:
        box = resized_crop_box(draws, image.height, image.width, scale)
        image = functional.resized_crop(image, *box, [size, size])
    return functional.pil_to_tensor(image)


def as_float(pixels: Tensor) -> Tensor:
    """8-bit pixels scaled to [0, 1]; floating-point ones as they are."""
    return pixels / 255 if pixels.dtype == torch.uint8 else pixels


# What PIL, NumPy, zipfile, pickle and torchvision raise on damaged files.
DAMAGE = (OSError, RuntimeError, ValueError, AssertionError, SyntaxError, EOFError, TypeError, BadZipFile, zlib.error)


@contextmanager
def reading(what: Path | str, cure: str) -> Iterator[None]:
    """Turn what decoders raise on damaged files into a DataError."""
    try:
        yield
    except DAMAGE as error:
        raise DataError(f"{what}: cannot be read ({type(error).__name__}: {error}); {cure}") from error
