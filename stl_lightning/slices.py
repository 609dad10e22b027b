"""The slices of one branch, a batch at a time: fetched, augmented, transformed, standardised.

Letters: n samples, c channels, h w space.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from stl_lightning.augment import PixelAugment
from stl_lightning.errors import ConfigError, DataError
from stl_lightning.images import ImageArray, ImageFiles, as_float
from stl_lightning.spectral import SpectralSplit


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of the training slices of a branch, per channel, each (c, 1, 1)."""

    mean: Tensor
    std: Tensor


@dataclass
class BranchSlices:
    """The images of one split as the slices of one branch: a `BatchSource`. Standardised if `statistics` are given.

    `cached` (n c h w) holds every slice where the images are fixed and fit in memory; otherwise a batch is read,
    augmented and transformed when it is asked for.
    """

    images: ImageArray | ImageFiles
    indices: Tensor  # (n,) into images
    spectral: SpectralSplit
    slices: tuple[int, ...]
    statistics: Statistics | None = None
    augment: PixelAugment | None = None
    seed: int = 0
    cached: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Tensor, epoch: int | None) -> tuple[Tensor, Tensor]:
        indices = self.indices[positions]
        labels = self.images.labels[indices]
        if self.cached is not None:
            return self.cached[positions], labels
        pixels = self.images.fetch(indices, self.augment, seed=self.seed, epoch=epoch or 0)
        x = self.spectral.slices(as_float(pixels), self.slices)
        return (x - self.statistics.mean) / self.statistics.std if self.statistics else x, labels

    def in_memory(self) -> "BranchSlices":
        """Itself with every slice computed, if the images are in memory and never change."""
        if isinstance(self.images, ImageArray) and self.augment is None:
            chunks = torch.arange(len(self)).split(4096)
            self.cached = torch.cat([self.batch(chunk, None)[0] for chunk in chunks])
        return self


def measure(batches: Iterable[tuple[Tensor, Tensor]]) -> Statistics:
    """Mean and deviation of slices that come in batches of (n c h w) and labels; summed up in float64.

    Raises: DataError if a value is not finite.
    """
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x, _ in batches:
        n += x.numel() // x.shape[1]
        total = total + x.double().sum((0, 2, 3))
        squares = squares + x.double().square().sum((0, 2, 3))
    if not total.isfinite().all():
        raise DataError("data.root: expected finite images, received training images with NaN or infinity")
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    # A slice that is constant (a border that is always black) is centred and left unscaled.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return Statistics(mean.float()[:, None, None], std.float()[:, None, None])


def slices_of_branch(branch: int, slices_per_branch: int, n_slices: int) -> tuple[int, ...]:
    """The slices branch `branch` reads: its own first, then the lowest-frequency others."""
    if not 1 <= slices_per_branch <= n_slices:
        raise ConfigError(f"data.slices_per_branch: expected 1 to {n_slices}, got {slices_per_branch}")
    others = [k for k in range(n_slices) if k != branch]
    return (branch, *others[: slices_per_branch - 1])
