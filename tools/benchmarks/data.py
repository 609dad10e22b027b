"""The images a comparison trains on: the real data set where it can be found, generated ones of its shape otherwise.

Letters: n samples, b slices, c channels, h w space.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stl_lightning.errors import DataError
from stl_lightning.images import as_float
from stl_lightning.sources import open_source
from stl_lightning.spectral import SpectralSplit

SHAPES = {"mnist": (28, 28, 1), "cifar10": (32, 32, 3), "photographs": (224, 224, 3)}  # h w c
N_STORED = {"mnist": 60_000, "cifar10": 50_000}  # training images; other names are always generated
N_CLASSES = 10
N_HELD_OUT = 64  # generated images that no training uses: stl wants a validation split


@dataclass(frozen=True)
class Data:
    """Training images of one data set; `n` of them are trained on. `origin` is what a row says of them."""

    source: str
    root: Path
    n: int
    n_stored: int
    origin: str

    @property
    def settings(self) -> list[str]:
        """How stl is told of them."""
        return [
            f"--data.source={self.source}",
            f"--data.root={self.root}",
            f"--data.val_size={self.n_stored - self.n}",
        ]

    def load(self) -> tuple[Tensor, Tensor]:
        """Pixels (n c h w) in [0, 1] and labels (n,)."""
        images = open_source(self.source, self.root).load("train")
        return as_float(images.fetch(torch.arange(self.n))), images.labels[: self.n]

    def sliced(self, reorganisation: str, block: int, transform: str) -> tuple[Tensor, Tensor]:
        """Standardised slices (b n c h w) and labels (n,), as stl trains on them."""
        pixels, labels = self.load()
        shape = (pixels.shape[1], pixels.shape[2], pixels.shape[3])
        split = SpectralSplit(shape, block, reorganisation, transform)
        return torch.stack([_standardised(x) for x in split(pixels)]), labels


def _standardised(x: Tensor) -> Tensor:
    return (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)


def training_data(name: str, root: Path, folder: Path, n: int) -> Data:
    """`n` training images of the data set in `root`, or generated ones in `folder` if it is not there."""
    try:
        open_source(name, root)
    except DataError:
        return generated(name, folder, n)
    return Data(name, root, n, N_STORED[name], name)


def generated(name: str, folder: Path, n: int) -> Data:
    """Random images of the shape of a data set, all classes alike, in a file that stl reads."""
    path = folder / f"{name}-{n}.npz"
    n_stored = n + N_HELD_OUT
    if not path.exists():
        images = np.random.default_rng(0).integers(0, 256, (n_stored, *SHAPES[name]), dtype=np.uint8)
        labels = np.arange(n_stored) % N_CLASSES
        held_out = slice(0, N_HELD_OUT)
        test: dict[str, Any] = {"test_images": images[held_out], "test_labels": labels[held_out]}
        np.savez(path, train_images=images, train_labels=labels, **test)
    return Data("npz", path, n, n_stored, "generated")
