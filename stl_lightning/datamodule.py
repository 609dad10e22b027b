"""The slices of one branch as Lightning loaders: split, transform, standardise, nothing of the other branches."""

from dataclasses import asdict
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from stl_lightning.augment import PixelAugment
from stl_lightning.errors import CheckpointError, ConfigError
from stl_lightning.images import ImageArray, ImageFiles, as_float
from stl_lightning.loaders import ResumableLoader
from stl_lightning.ranks import RankInfo
from stl_lightning.slices import BranchSlices, Statistics, measure, slices_of_branch
from stl_lightning.sources import open_source
from stl_lightning.spectral import SpectralSplit

Split = Literal["train", "val", "test"]

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
    """Emits the slice (or fixed tuple of slices) that one branch trains on.

    Args:
        source: Data set: digits, mnist, fashionmnist, cifar10, cifar100, imagefolder, imagenet, npz.
        root: Folder the data set lies in, in torchvision's layout (npz: the file).
        download: Download the data set if it is not there.
        image_size: Height and width that files are decoded to (imagefolder and imagenet only).
        val_size: Validation share (below 1.0) or number of images, held out of the training images.
        reorganisation: How pixels form tubes: polyphase, tiles or raster.
        block: Pixels per tube, as (height, width) or one number for both; B is their product.
        transform: Transform along the tubes: dct, dct2, dft, hadamard, haar, identity, random or klt.
        pad: Pad an image that the block does not divide: reflect or zeros; null makes it an error.
        slices_per_branch: Slices a branch reads: its own and the lowest-frequency others.
        augment: Random crop and flip of the training images before the split, the same on all ranks.
        batch_size: Images per training batch.
        eval_batch_size: Images per validation, test or prediction batch.
        num_workers: Processes that read and decode image files.
        predict_split: Images that `predict` computes logits of.
        seed: Seed of the validation split, the data order, the augmentation and the random transform.
        branch: Branch whose slices are emitted; null takes the first that this rank owns.

    Raises: ConfigError and DataError at construction, before a GPU or a queue slot is used.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str = "data",
        download: bool = False,
        image_size: int | None = None,
        val_size: int | float = 0.1,
        reorganisation: str = "polyphase",
        block: int | tuple[int, int] = 2,
        transform: str = "dct2",
        pad: Literal["reflect", "zeros"] | None = None,
        slices_per_branch: int = 1,
        augment: PixelAugment = PixelAugment(),  # noqa: B008 (frozen)
        batch_size: int = 128,
        eval_batch_size: int = 1024,
        num_workers: int = 0,
        predict_split: Split = "val",
        seed: int = 0,
        branch: int | None = None,
    ) -> None:
        super().__init__()
        self.source = open_source(source, root, download, image_size)
        self.spectral = SpectralSplit(self.source.image_shape, block, reorganisation, transform, pad, seed)
        self.n_branches = self.spectral.n_slices
        self.n_classes = self.source.n_classes
        self.seed = seed
        self.predict_split: Split = predict_split
        self.val_size = val_size
        self.batch_size = _at_least("data.batch_size", batch_size, 1)
        self.eval_batch_size = _at_least("data.eval_batch_size", eval_batch_size, 1)
        self.num_workers = _at_least("data.num_workers", num_workers, 0)
        self.slices_per_branch = slices_per_branch
        self.augment = None if augment == PixelAugment() else augment
        self._images: dict[str, ImageArray | ImageFiles] = {}
        self._indices: dict[str, Tensor] = {}
        self._restored: dict[str, Any] | None = None
        self.select_branch(RankInfo.detect().branches(self.n_branches)[0] if branch is None else branch)

    def select_branch(self, branch: int) -> None:
        """Emit the slices of `branch` from now on; images already read stay in memory."""
        if not 0 <= branch < self.n_branches:
            raise ConfigError(f"data.branch: expected 0 to {self.n_branches - 1}, got {branch}")
        self.branch = branch
        self.slices = slices_of_branch(branch, self.slices_per_branch, self.n_branches)
        self._statistics: Statistics | None = None

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of what the branch reads: its slices stacked along the channels."""
        shapes = [self.spectral.slice_shape(k) for k in self.slices]
        return (sum(c for c, _, _ in shapes), *shapes[0][1:])

    def check(self) -> None:
        """Read the training images, or list their files, and find what is wrong with them or with `val_size`.

        Raises: ConfigError and DataError.
        """
        self._load("train")
        self._images["train"].fetch(torch.arange(0), self.augment)  # an augmentation these images do not take

    def setup(self, stage: str | None = None) -> None:
        """Read the training images and estimate what is fitted to them: KLT, mean and deviation."""
        if self._statistics is None:
            self._load("train")
            images, sample = self._images["train"], self._indices["train"][:STATISTICS_IMAGES]
            if not self.spectral.is_fitted:
                self.spectral.fit(as_float(images.fetch(sample[:KLT_IMAGES])))
            plain = BranchSlices(images, sample, self.spectral, self.slices)
            self._statistics = measure(ResumableLoader(plain, self.eval_batch_size, num_workers=self.num_workers))
        self._check_restored()

    def restore(self, state: dict[str, Any]) -> None:
        """Take what is fitted to training images from a checkpoint's `state_dict` and not from the images.

        Raises: CheckpointError if it is of another branch.
        """
        self._check_branch(state)
        self.spectral.matrix.copy_(state["matrix"])
        self.spectral.is_fitted = True
        self._statistics = Statistics(state["mean"], state["std"])

    def slices_in(self, split: Split, training: bool = False) -> BranchSlices:
        """The slices of this branch for one split; `training` adds the augmentation."""
        self.setup()
        self._load(split)
        augment = self.augment if training else None
        images, indices = self._images[split], self._indices[split]
        return BranchSlices(
            images, indices, self.spectral, self.slices, self._statistics, augment, self.seed
        ).in_memory()

    def loader(self, split: Split) -> ResumableLoader:
        """Batches of one split in stored order, without augmentation."""
        return ResumableLoader(self.slices_in(split), self.eval_batch_size, num_workers=self.num_workers)

    def train_dataloader(self) -> ResumableLoader:
        slices = self.slices_in("train", training=True)
        return ResumableLoader(slices, self.batch_size, seed=self.seed, num_workers=self.num_workers)

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
            "reorganisation": self.spectral.reorganisation,
            "block": self.spectral.block,
            "transform": self.spectral.transform,
            "pad": self.spectral.pad,
            "slices_per_branch": self.slices_per_branch,
            "augment": asdict(self.augment) if self.augment else None,
            "seed": self.seed,
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to be a member on its own: the slices it reads and how they are standardised."""
        self.setup()
        assert self._statistics is not None, "setup estimates the statistics"
        return {
            "branch": self.branch,
            "slices": list(self.slices),
            "matrix": self.spectral.matrix,
            "mean": self._statistics.mean,
            "std": self._statistics.std,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict
        if self._statistics is not None:
            self._check_restored()

    def _check_restored(self) -> None:
        """A branch that resumes must see the data it saw before."""
        restored, self._restored = self._restored, None
        if restored is None:
            return
        self._check_branch(restored)
        now = self.state_dict()
        for key in ("matrix", "mean", "std"):
            if not torch.allclose(restored[key].cpu(), now[key], rtol=1e-3, atol=1e-4):
                raise CheckpointError(
                    f"the {key} of the training slices differs from the one in the checkpoint: are the data under "
                    f"`data.root` the ones the run was started with?"
                )

    def _check_branch(self, restored: dict[str, Any]) -> None:
        for key, here in {"branch": self.branch, "slices": list(self.slices)}.items():
            if restored[key] != here:
                raise CheckpointError(f"the checkpoint was written for {key} {restored[key]}, this is {key} {here}")

    def _load(self, split: Split) -> None:
        if split in self._images:
            return
        if split == "test":
            self._images["test"] = self.source.load("test")
            self._indices["test"] = torch.arange(len(self._images["test"]))
        else:
            images = self.source.load("train")
            train, val = split_indices(len(images), self.val_size, self.seed)
            self._images |= {"train": images, "val": images}
            self._indices |= {"train": train, "val": val}


def _at_least(setting: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{setting}: expected at least {least}, got {value}")
    return value
