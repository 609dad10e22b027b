"""The slices of the branches of a process as Lightning loaders: nothing of the other branches."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from stl_lightning.augment import Augment, SliceAugment, SliceMirror, can_augment_slices, check_augment
from stl_lightning.errors import ConfigError
from stl_lightning.images import ImageArray, ImageFiles, as_float
from stl_lightning.loaders import ResumableLoader
from stl_lightning.ranks import RankInfo
from stl_lightning.slices import (
    BranchSlices,
    FromImages,
    FromSlices,
    InMemory,
    RawSlices,
    Statistics,
    check_same_branches,
    check_same_fit,
    fits_in_memory,
    measure,
    placed,
    read_all,
    slices_of_branch,
    wanted,
)
from stl_lightning.sources import open_source
from stl_lightning.spectral import SpectralSplit
from stl_lightning.store import open_store

Split = Literal["train", "val", "test"]
File = Literal["train", "test"]  # what a source or store keeps; validation images are cut off the training ones

# Mean and deviation are estimated on at most so many training images, and the KLT (which needs them all at once) on so
# many; a random sample, since the training split is in random order. No rank has to decode ImageNet before it starts.
STATISTICS_IMAGES = 10_000
KLT_IMAGES = 2_000


def split_indices(n_images: int, val_size: int | float, seed: int) -> tuple[Tensor, Tensor]:
    """Training and validation indices in random order: a function of (n, val_size, seed), so all ranks agree.

    Raises: ConfigError if either part would be empty.
    """
    n_val = round(n_images * val_size) if isinstance(val_size, float) else val_size
    if not 0 < n_val < n_images:
        raise ConfigError(
            f"data.val_size: expected a share between 0 and 1 or a number of images below {n_images}, got {val_size}"
        )
    order = torch.randperm(n_images, generator=torch.Generator().manual_seed(seed))
    return order[n_val:], order[:n_val]


class SpectralDataModule(LightningDataModule):
    """Emits the slice (or fixed tuple of slices) that one branch trains on; or those of several branches, stacked.

    Args:
        source: Data set: digits, mnist, fashionmnist, cifar10, cifar100, imagefolder, imagenet, npz.
        root: Folder the data set lies in, in torchvision's layout (npz: the file).
        download: Download the data set if it is not there.
        image_size: Height and width that files are decoded to (imagefolder and imagenet only).
        store: Slice store to read from, made by `stl prepare`; the images themselves are not needed then.
        val_size: Validation share (below 1.0) or number of images, held out of the training images.
        reorganisation: How pixels form tubes: polyphase, tiles or raster.
        block: Pixels per tube, as (height, width) or one number for both; B is their product.
        transform: Transform along the tubes: dct, dct2, dft, hadamard, haar, identity, random or klt.
        pad: Pad an image that the block does not divide: reflect or zeros; null makes it an error.
        slices_per_branch: Slices a branch reads: its own and the lowest-frequency others.
        common_slices: Slices that all branches read in place of their own, which makes them a deep ensemble: a control.
            With dct2, slice 0 is the average of neighbouring pixels, scaled.
        augment: Random changes of the training images, the same on all ranks; made inside slices where that is exact.
        batch_size: Images per training batch.
        eval_batch_size: Images per validation, test or prediction batch.
        num_workers: Processes that read and decode image files.
        predict_split: Images that `predict` computes logits of.
        seed: Seed of the validation split, the data order, the augmentation and the random transform.
        branch: Branch whose slices are emitted; null takes the first that this rank owns.

    Shapes: x (n, c, h, w), for several branches (s, n, c, h, w); labels (n,), with mixup or cutmix targets (n, k).
    Raises: ConfigError and DataError at construction, before a GPU or a queue slot is used.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str = "data",
        download: bool = False,
        image_size: int | None = None,
        store: str | None = None,
        val_size: int | float = 0.1,
        reorganisation: str = "polyphase",
        block: int | tuple[int, int] = 2,
        transform: str = "dct2",
        pad: Literal["reflect", "zeros"] | None = None,
        slices_per_branch: int = 1,
        common_slices: list[int] | None = None,
        augment: Augment = Augment(),  # noqa: B008 (frozen)
        batch_size: int = 128,
        eval_batch_size: int = 1024,
        num_workers: int = 0,
        predict_split: Split = "val",
        seed: int = 0,
        branch: int | None = None,
    ) -> None:
        super().__init__()
        self.store = None if store is None else open_store(Path(store))
        self.source = open_source(source, root, download, image_size) if self.store is None else self.store.source
        self.spectral = SpectralSplit(self.source.image_shape, block, reorganisation, transform, pad, seed)
        if self.store is not None:
            here = {"source": source, "image_size": image_size, "val_size": val_size, "seed": seed}
            self.store.check(here | self._split_settings())
            _take_matrix(self.spectral, self.store.matrix)
        self.n_branches = self.spectral.n_slices
        self.n_classes = self.source.n_classes
        self.seed = seed
        self.predict_split: Split = predict_split
        self.val_size = val_size
        self.batch_size = _at_least("data.batch_size", batch_size, 1)
        self.eval_batch_size = _at_least("data.eval_batch_size", eval_batch_size, 1)
        self.num_workers = _at_least("data.num_workers", num_workers, 0)
        self.slices_per_branch = slices_per_branch
        self.common_slices = common_slices
        self.augment = None if augment == Augment() else augment
        self.chunk: int | None = None  # training batches that the loader hands out at once
        self._images: dict[str, ImageArray | ImageFiles] = {}
        self._restored: list[dict[str, Any]] | None = None
        self.select_branches(RankInfo.detect().branches(self.n_branches)[:1] if branch is None else [branch])

    def select_branches(self, branches: Sequence[int]) -> None:
        """Emit the slices of these branches from now on; images already read stay in memory.

        Raises: ConfigError if there is no such branch, or they do not read the same number of channels.
        """
        if not branches or not all(0 <= branch < self.n_branches for branch in branches):
            raise ConfigError(f"data.branch: expected 0 to {self.n_branches - 1}, got {list(branches)}")
        self.branches = tuple(branches)
        self.reads = tuple(self._reads(branch) for branch in branches)
        shapes = {sum(self.spectral.slice_shape(k)[0] for k in reads) for reads in self.reads}
        if len(shapes) > 1:
            raise ConfigError(
                f"data.branch: branches {list(branches)} read {sorted(shapes)} channels; together only branches of one "
                "shape can be emitted"
            )
        self._held: Tensor | None = None  # training slices, computed once
        self._placed: dict[str, RawSlices] = {}  # of each file, where they stay for the training
        self._statistics: Statistics | None = None

    def _reads(self, branch: int) -> tuple[int, ...]:
        return slices_of_branch(branch, self.slices_per_branch, self.n_branches, self.common_slices)

    @property
    def branch(self) -> int:
        """The branch whose slices are emitted, the first of several."""
        return self.branches[0]

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what a branch reads: its slices stacked along the channels."""
        shapes = [self.spectral.slice_shape(k) for k in self.reads[0]]
        return (sum(c for c, _, _ in shapes), *shapes[0][1:])

    def check(self, branches: Sequence[int]) -> None:
        """Read the training images, or list their files, and find what is wrong with them or with `val_size`.

        Raises: ConfigError and DataError; StoreError if a slice that these branches read is not in the store.
        """
        self._split("train")
        if self.store is not None:
            self.store.require(wanted([self._reads(branch) for branch in branches]))
        if self.store is None:  # an augmentation these images do not take
            self._load("train").fetch(torch.arange(0), self.augment, block=self.spectral.block)
        elif self.augment is not None:  # or these slices
            SliceAugment(self.augment, self.spectral, range(self.n_branches))
        if self.augment is not None:
            check_augment(self.augment, self.spectral)

    @property
    def n_train_images(self) -> int:
        """Training images without those of the validation split."""
        return len(self._split("train"))

    @property
    def n_val_images(self) -> int:
        return len(self._split("val"))

    def setup(self, stage: str | None = None) -> None:
        """Read the training data and estimate what is fitted to them: KLT, mean and deviation."""
        if self._statistics is None:
            if not self.spectral.is_fitted:
                self.spectral.fit(as_float(self._load("train").fetch(self._split("train")[:KLT_IMAGES])))
            self._statistics = self._measure()
        if stage == "fit" and self._held is None and self._can_hold_slices():
            self._held = read_all(self._raw("train"), len(self._labels("train")))
            # Augmentation acts on slices as they are: zeros that come in are black pixels.
            self._is_standardised = self.augment is None or not self.augment.moves
            if self._is_standardised:
                self._statistics.standardise(self._held, out=self._held)
        self._check_restored()

    def restore(self, state: dict[str, Any]) -> None:
        """Take what is fitted to training images from a checkpoint's `state_dict` and not from the images.

        Raises: CheckpointError if it is of another branch.
        """
        of_branches = state["branches"]
        check_same_branches(of_branches, self.branches, self.reads)
        _take_matrix(self.spectral, of_branches[0]["matrix"])
        self._statistics = Statistics(*(torch.stack([of[name] for of in of_branches]) for name in ("mean", "std")))

    def slices_in(self, split: Split, training: bool = False) -> BranchSlices:
        """The slices of the branches for one split; `training` adds the augmentation."""
        self.setup()
        file: File = "test" if split == "test" else "train"
        augment = self.augment if training else None
        if file not in self._placed:
            self._placed[file] = self._on_device(self._raw(file))
        raw = self._with_augmentation(self._placed[file], augment)
        statistics = None if isinstance(raw, InMemory) and self._is_standardised else self._statistics
        mixing = augment if augment is not None and augment.mixes else None
        return BranchSlices(
            raw,
            self._labels(file),
            self._split(split),
            len(self.branches),
            statistics,
            mixing,
            self.n_classes,
            self.seed,
        )

    def check_mirror(self) -> None:
        """Raises: ConfigError if stored slices of some branch do not determine those of the mirror images."""
        for branch in range(self.n_branches) if self.store is not None else ():
            SliceMirror(self.spectral, [self._reads(branch)])

    def mirrored_slices_in(self, split: Split) -> BranchSlices:
        """The slices of the mirror images, `image.flip(-1)`: made of the images, or of the slices in the store.

        Raises: ConfigError if those do not determine theirs.
        """
        slices = self.slices_in(split)
        raw = self._mirrored(self._at_source("test" if split == "test" else "train"))
        return replace(slices, raw=raw, statistics=self._statistics)

    def loader(self, split: Split, mirrored: bool = False) -> ResumableLoader:
        """Batches of one split in stored order, without augmentation; of the images or of their mirror images."""
        slices = self.mirrored_slices_in(split) if mirrored else self.slices_in(split)
        return ResumableLoader(slices, self.eval_batch_size, num_workers=self._workers_for(slices))

    def train_dataloader(self) -> ResumableLoader:
        slices = self.slices_in("train", training=True)
        overfits = bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return ResumableLoader(slices, self.batch_size, self.seed, self._workers_for(slices), self.chunk, overfits)

    def val_dataloader(self) -> ResumableLoader:
        return self.loader("val")

    def test_dataloader(self) -> ResumableLoader:
        return self.loader("test")

    def predict_dataloader(self) -> ResumableLoader:
        return self.loader(self.predict_split)

    def agreement(self) -> dict[str, Any]:
        """What all branches of a run must agree on about the data, as plain types."""
        return {
            "source": self.source.name,
            "fingerprint": self.source.fingerprint,
            "image_shape": self.source.image_shape,
            "n_classes": self.n_classes,
            "n_branches": self.n_branches,
            "val_size": self.val_size,
            **self._split_settings(),
            "stored_as": "float32" if self.store is None else self.store.dtype,
            "slices_per_branch": self.slices_per_branch,
            "common_slices": self.common_slices,
            "augment": asdict(self.augment) if self.augment else None,
            "seed": self.seed,
        }

    def _split_settings(self) -> dict[str, Any]:
        return {name: getattr(self.spectral, name) for name in ("reorganisation", "block", "transform", "pad")}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to be a member on its own: the slices it reads and how they are standardised."""
        self.setup()
        assert self._statistics is not None, "setup estimates the statistics"
        statistics = zip(self.branches, self.reads, self._statistics.mean, self._statistics.std, strict=True)
        return {
            "branches": [
                {
                    "branch": branch,
                    "slices": list(reads),
                    "matrix": self.spectral.matrix.cpu(),
                    "mean": mean,
                    "std": std,
                }
                for branch, reads, mean, std in statistics
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict["branches"]
        if self._statistics is not None:
            self._check_restored()

    def _check_restored(self) -> None:
        """A branch that resumes must see the data it saw before."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        check_same_branches(restored, self.branches, self.reads)
        check_same_fit(restored, self.state_dict()["branches"])

    def _load(self, file: File) -> ImageArray | ImageFiles:
        if file not in self._images:
            self._images[file] = self.source.load(file)
        return self._images[file]

    def _labels(self, file: File) -> Tensor:
        return self._load(file).labels if self.store is None else self.store.labels(file)

    def _split(self, split: Split) -> Tensor:
        if split == "test":
            return torch.arange(len(self._labels("test")))
        train, val = split_indices(len(self._labels("train")), self.val_size, self.seed)
        return train if split == "train" else val

    def _measure(self) -> Statistics:
        sample = self._split("train")[:STATISTICS_IMAGES]
        plain = BranchSlices(self._raw("train"), self._labels("train"), sample, len(self.branches))
        loader = ResumableLoader(plain, self.eval_batch_size, num_workers=self._workers_for(plain))
        return measure(x if len(self.branches) > 1 else x[None] for x, _ in loader)

    def _raw(self, file: File) -> RawSlices:
        if file == "train" and self._held is not None:
            return InMemory(self._held)
        return self._at_source(file)

    def _at_source(self, file: File) -> FromImages | FromSlices:
        if self.store is None:
            return FromImages(self._load(file), self.spectral, self.reads)
        return FromSlices({k: self.store.slice(file, k) for k in wanted(self.reads)}, self.reads)

    def _mirrored(self, raw: FromImages | FromSlices) -> RawSlices:
        if isinstance(raw, FromImages):
            return replace(raw, mirrored=True)
        return replace(raw, mirror=SliceMirror(self.spectral, self.reads))

    def _with_augmentation(self, raw: RawSlices, augment: Augment | None) -> RawSlices:
        if augment is None:
            return raw
        if isinstance(raw, FromImages):
            return replace(raw, augment=augment, seed=self.seed)
        assert isinstance(raw, InMemory | FromSlices), "slices that are there already"
        return replace(raw, augment=SliceAugment(augment, self.spectral, self.reads), seed=self.seed)

    def _workers_for(self, slices: BranchSlices) -> int:
        """Processes help where files are decoded; other data are gathered faster than they could be handed over."""
        decodes = isinstance(slices.raw, FromImages) and isinstance(slices.raw.images, ImageFiles)
        return self.num_workers if decodes else 0

    def _can_hold_slices(self) -> bool:
        """Whether training slices can be computed once: images in memory, changed in no way that slices do not take."""
        if self.store is not None or isinstance(self._load("train"), ImageFiles):
            return False
        if self.augment is not None and not can_augment_slices(self.augment, self.spectral):
            return False
        n_bytes = 4 * len(self.branches) * math.prod(self.in_shape) * len(self._labels("train"))
        if fits_in_memory(n_bytes):
            return True
        print(
            f"the training slices would take {n_bytes / 1e9:.1f} GB, too much of the free memory: they are computed "
            "anew for every batch; `stl prepare` and data.store keep them in files", flush=True,
        )  # fmt: skip
        return False

    def _on_device(self, raw: RawSlices) -> RawSlices:
        """On the device of the training, if all of it fits there beside a network."""
        return raw if self.trainer is None else placed(raw, self.trainer.strategy.root_device)


def _take_matrix(spectral: SpectralSplit, matrix: Tensor) -> None:
    """The matrix that slices were made with; it decides where data decided the transform."""
    spectral.matrix.copy_(matrix)
    spectral.is_fitted = True


def _at_least(setting: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{setting}: expected at least {least}, got {value}")
    return value
