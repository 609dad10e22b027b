"""The slices of the branches of a process, a batch at a time: fetched, augmented, standardised, mixed.

Letters: s branches, n samples, c channels, h w space, k classes.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from stl_lightning.augment import Augment, SliceAugment, SliceMirror, mix
from stl_lightning.errors import CheckpointError, ConfigError, DataError
from stl_lightning.images import ImageArray, ImageFiles
from stl_lightning.machine import free_memory
from stl_lightning.spectral import SpectralSplit

SPLIT_BATCH = 1024  # images that are split at once; bounds the memory beside the slices themselves

# Training slices are held in memory, and on the GPU, if they take at most this share of what is free there.
MEMORY_SHARE = 0.5
DEVICE_SHARE = 0.6


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of the training slices of each branch, per channel, each (s, c, 1, 1)."""

    mean: Tensor
    std: Tensor

    def standardise(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """(x - mean) / std in one pass over x. Shapes: (s, n, c, h, w) -> the same."""
        scale = 1 / self.std[:, None]
        return torch.addcmul(-self.mean[:, None] * scale, x, scale, out=out)

    def to(self, device: torch.device) -> "Statistics":
        return Statistics(self.mean.to(device), self.std.to(device))


class RawSlices(Protocol):
    """Where slices come from: images that are split when they are asked for, or slices that are there already."""

    def fetch(self, indices: Tensor, epoch: int | None) -> Tensor:
        """The slices (s n c h w) of the images at `indices` (n,); `epoch` selects the augmentation, None none."""

    @property
    def n_bytes(self) -> int:
        """What it keeps in memory, or would on a device."""

    def to(self, device: torch.device) -> "RawSlices": ...


@dataclass(frozen=True)
class FromImages:
    """Slices of images that are read, augmented and split when they are asked for."""

    images: ImageArray | ImageFiles
    spectral: SpectralSplit
    branches: tuple[tuple[int, ...], ...]  # the slices each branch reads
    augment: Augment | None = None
    seed: int = 0
    mirrored: bool = False

    def fetch(self, indices: Tensor, epoch: int | None) -> Tensor:
        augment = self.augment if epoch is not None else None
        pixels = self.images.fetch(indices, augment, self.seed, epoch or 0, self.spectral.block)
        pixels = pixels.flip(-1) if self.mirrored else pixels
        return assemble(split(self.spectral, pixels, wanted(self.branches)), self.branches)

    @property
    def n_bytes(self) -> int:
        return 0 if isinstance(self.images, ImageFiles) else self.images.pixels.nbytes

    def to(self, device: torch.device) -> "FromImages":
        if isinstance(self.images, ImageFiles):
            return self
        images = ImageArray(self.images.pixels.to(device), self.images.labels)
        return replace(self, images=images, spectral=copy.deepcopy(self.spectral).to(device))


class StoredSlice(Protocol):
    """One slice of every image, in memory or in a file."""

    @property
    def values(self) -> Tensor:
        """(n, c, h, w) in the type it is kept in."""

    def gather(self, positions: Tensor) -> Tensor:
        """Shapes: positions (n,) -> (n, c, h, w), float32."""

    def to(self, device: torch.device) -> "StoredSlice": ...


@dataclass(frozen=True)
class FromSlices:
    """Slices that were computed before; augmented, where that is exact, inside the slice."""

    stored: Mapping[int, StoredSlice]
    branches: tuple[tuple[int, ...], ...]
    augment: SliceAugment | None = None
    seed: int = 0
    mirror: SliceMirror | None = None

    def fetch(self, indices: Tensor, epoch: int | None) -> Tensor:
        x = assemble({k: slice_.gather(indices) for k, slice_ in self.stored.items()}, self.branches)
        x = x if self.mirror is None else self.mirror(x)
        return x if self.augment is None or epoch is None else self.augment(x, self.seed, epoch, indices)

    @property
    def n_bytes(self) -> int:
        return sum(slice_.values.nbytes for slice_ in self.stored.values())

    def to(self, device: torch.device) -> "FromSlices":
        return replace(self, stored={k: slice_.to(device) for k, slice_ in self.stored.items()})


@dataclass(frozen=True)
class InMemory:
    """What each branch reads of every image, as one tensor (s, all, c, h, w), so that one copy gathers a batch."""

    values: Tensor
    augment: SliceAugment | None = None
    seed: int = 0

    def fetch(self, indices: Tensor, epoch: int | None) -> Tensor:
        x = self.values.index_select(1, indices.to(self.values.device))
        return x if self.augment is None or epoch is None else self.augment(x, self.seed, epoch, indices)

    @property
    def n_bytes(self) -> int:
        return self.values.nbytes

    def to(self, device: torch.device) -> "InMemory":
        return replace(self, values=self.values.to(device))


@dataclass(frozen=True)
class BranchSlices:
    """The images of one split as the slices of the branches of this process: a `BatchSource`.

    One branch gives (n c h w), several give (s n c h w). Mixing (mixup, cutmix) turns labels (n,) into targets (n k).
    """

    raw: RawSlices
    labels: Tensor  # (n,) of all images
    indices: Tensor  # (n,) of this split, into the images
    n_branches: int
    statistics: Statistics | None = None
    mixing: Augment | None = None
    n_classes: int = 0
    seed: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, positions: Tensor, epoch: int | None) -> tuple[Tensor, Tensor]:
        indices = self.indices.index_select(0, positions)  # faster than by brackets, which take slices and masks too
        x, targets = self.raw.fetch(indices, epoch), self.labels.index_select(0, indices)
        x = self.statistics.to(x.device).standardise(x) if self.statistics else x
        if self.mixing is not None and epoch is not None:
            size = len(indices)
            x, targets = mix(self.mixing, x, targets, self.n_classes, self.seed, epoch, indices, size)
        return x if self.n_branches > 1 else x[0], targets


def wanted(branches: Sequence[tuple[int, ...]]) -> list[int]:
    """The slices that any of the branches reads."""
    return sorted({k for slices in branches for k in slices})


def split(spectral: SpectralSplit, images: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """Slices `ks` of images in one pass. Shapes: (n, c, H, W) -> (n, c_k, h, w) for each k."""
    if len(ks) == spectral.n_slices:
        return dict(enumerate(spectral(images)))
    return {k: spectral.slice(images, k) for k in ks}


def assemble(slices: Mapping[int, Tensor], branches: Sequence[tuple[int, ...]]) -> Tensor:
    """What each branch reads: its slices (n c h w) side by side as channels, the branches (s n c h w) stacked."""
    of_branches = [torch.cat([slices[k] for k in ks], 1) if len(ks) > 1 else slices[ks[0]] for ks in branches]
    return torch.stack(of_branches) if len(of_branches) > 1 else of_branches[0][None]


def read_all(raw: RawSlices, n_images: int) -> Tensor:
    """What each branch reads of every image, computed once. Shapes: (s, n_images, c, h, w)."""
    parts = torch.arange(n_images).split(SPLIT_BATCH)
    first = raw.fetch(parts[0], None)
    values = first.new_empty(len(first), n_images, *first.shape[2:])
    for positions in parts:
        values[:, positions[0] : positions[-1] + 1] = raw.fetch(positions, None)
    return values


def measure(batches: Iterable[Tensor]) -> Statistics:
    """Mean and deviation of slices that come in batches of (s n c h w); summed up in float64.

    Raises: DataError if a value is not finite.
    """
    n, total, squares = 0, torch.zeros(()), torch.zeros(())
    for x in batches:
        n += x[0, :, 0].numel()
        total = total + x.double().sum((1, 3, 4))
        squares = squares + x.double().square().sum((1, 3, 4))
    if not total.isfinite().all():
        raise DataError("data.root: expected finite images, received training images with NaN or infinity")
    mean = total / n
    std = (squares / n - mean.square()).clamp(min=0).sqrt()
    # A slice that is constant (a border that is always black) is centred and left unscaled.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return Statistics(mean.float()[..., None, None], std.float()[..., None, None])


def fits_in_memory(n_bytes: int) -> bool:
    """Whether this process can hold them beside all else."""
    return n_bytes < MEMORY_SHARE * free_memory()


def placed(raw: RawSlices, device: torch.device) -> RawSlices:
    """On a GPU, if all of it fits there beside a network; as it is otherwise."""
    if device.type != "cuda":
        return raw
    return raw.to(device) if raw.n_bytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] else raw


def check_same_branches(
    restored: Sequence[Mapping[str, Any]], branches: Sequence[int], reads: Sequence[tuple[int, ...]]
) -> None:
    """Raises: CheckpointError if the records of a checkpoint are of other branches, or those read other slices."""
    for was, branch, ks in zip(restored, branches, reads, strict=True):
        for key, here in {"branch": branch, "slices": list(ks)}.items():
            if was[key] != here:
                raise CheckpointError(f"the checkpoint was written for {key} {was[key]}, this is {key} {here}")


def check_same_fit(restored: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]) -> None:
    """Raises: CheckpointError if what was fitted to the training images of a checkpoint is not what is fitted here."""
    for was, now in zip(restored, records, strict=True):
        for key in ("matrix", "mean", "std"):
            if not torch.allclose(was[key].cpu(), now[key], rtol=1e-3, atol=1e-4):
                raise CheckpointError(
                    f"the {key} of the training slices differs from the one in the checkpoint: are the data under "
                    f"`data.root` or in `data.store` the ones the run was started with?"
                )


def slices_of_branch(
    branch: int, slices_per_branch: int, n_slices: int, common: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The slices branch `branch` reads: its own first, then the lowest-frequency others; or `common` ones instead.

    Raises: ConfigError for slices that do not exist, and for both at once.
    """
    if common is not None:
        return _common_slices(common, slices_per_branch, n_slices)
    if not 1 <= slices_per_branch <= n_slices:
        raise ConfigError(f"data.slices_per_branch: expected 1 to {n_slices}, got {slices_per_branch}")
    others = [k for k in range(n_slices) if k != branch]
    return (branch, *others[: slices_per_branch - 1])


def _common_slices(common: Sequence[int], slices_per_branch: int, n_slices: int) -> tuple[int, ...]:
    if slices_per_branch != 1:
        raise ConfigError(
            f"data.slices_per_branch: expected 1 with data.common_slices, which replace the slices of every branch; "
            f"got {slices_per_branch}"
        )
    if not common or len(set(common)) < len(common) or not all(0 <= k < n_slices for k in common):
        raise ConfigError(
            f"data.common_slices: expected different numbers from 0 to {n_slices - 1}, at least one; got {list(common)}"
        )
    return tuple(common)
