"""Crop, flip and erase inside a slice, without the image: exact where this file says so, refused where it is not.

Polyphase tubes are blocks of the image, whatever the transform along them. So a crop that moves by whole blocks, or a
box of whole blocks set to zero, is the same operation on every slice, with blocks for pixels. A flip of the image
flips the slices, and permutes the components of each tube; call that permutation P. Slice k alone knows the result
if P only changes the sign of its rows of the transform T: T P = +-T there, that is, T P T^t has +-1 on its diagonal.
An image that `data.pad` enlarged is refused where its padding would have to be made anew.

Letters: s slices, n samples, c channels, h w space, b components of a tube.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from stl_lightning.augment.moves import Moves, read
from stl_lightning.augment.pixels import Augment
from stl_lightning.errors import ConfigError
from stl_lightning.spectral import REORGANISATIONS, SpectralSplit, build_basis, fitting_transforms

TOLERANCE = 1e-5  # of a row of the transform, which has norm 1 and is stored in float32


def _tubes(spectral: SpectralSplit, mirrored: bool = False) -> Tensor:
    """The number of the pixel in every place of every tube, of the image or of its mirror image: (h, w, b)."""
    height, width = (side + extra for side, extra in zip(spectral.image_shape[1:], spectral.padding, strict=True))
    pixels = torch.arange(height * width).view(height, width)
    way = REORGANISATIONS[spectral.reorganisation]
    return way.forward(pixels.flip(-1) if mirrored else pixels, spectral.block)


def tubes_are_blocks(spectral: SpectralSplit) -> bool:
    """Whether the tube at (i, j) holds the pixels of block (i, j) of the image: polyphase, and what equals it."""
    h, w, b = (tubes := _tubes(spectral)).shape
    pixels = tubes.new_tensor(range(h * w * b)).view(h * spectral.block[0], w * spectral.block[1])
    return torch.equal(tubes, REORGANISATIONS["polyphase"].forward(pixels, spectral.block))


def mirror_permutation(spectral: SpectralSplit) -> Tensor | None:
    """Component k of the mirror image's tubes is component [k] of the image's, at the mirrored place.

    Shapes: -> (b,) int64, or None if no permutation does that at every place.
    """
    before, after = _tubes(spectral).flip(1), _tubes(spectral, mirrored=True)
    permutation = (before[0, 0] == after[0, 0, :, None]).int().argmax(1)
    return permutation if torch.equal(before[..., permutation], after) else None


def mirror_signs(matrix: Tensor, permutation: Tensor) -> Tensor:
    """By which factor a flip of the image multiplies each row of the transform; 0 if it does more than that.

    Shapes: matrix (r, b), permutation (b,) -> (r,), each 1, -1 or 0.
    """
    if torch.equal(permutation, torch.arange(len(permutation), device=permutation.device)):
        return torch.ones(len(matrix), device=matrix.device)  # also of a matrix that is not fitted yet
    along = (matrix[:, permutation] * matrix).sum(1)  # the diagonal of T P T^t
    return torch.where((along.abs() - 1).abs() < TOLERANCE, along.sign(), 0.0)


def _signs(spectral: SpectralSplit, slices: Iterable[int]) -> Tensor | None:
    """The factor of each row of some slices, all 1 or -1; None if the flip is not exact in them."""
    permutation = mirror_permutation(spectral)
    if permutation is None or spectral.padding[1]:
        return None  # the padding is at the right, that of the mirror image would be at the left
    rows = [row for k in slices for row in spectral.rows(k)]
    signs = mirror_signs(spectral.matrix[rows].cpu(), permutation)
    return signs if signs.all() else None


def _flipping(spectral: SpectralSplit) -> list[str]:
    """The transforms whose every slice can be flipped alone, with this block and reorganisation."""
    permutation = mirror_permutation(spectral)
    if permutation is None or spectral.padding[1]:
        return []
    bases = {name: build_basis(name, spectral.block, spectral.seed) for name in fitting_transforms(spectral.block)}
    return [name for name, basis in bases.items() if mirror_signs(basis.matrix, permutation).all()]


def _no_resize(augment: Augment) -> str | None:
    if augment.resized_crop is None:
        return None
    return (
        f"data.augment.resized_crop: expected null where slices are augmented, received {augment.resized_crop}; it "
        f"resamples pixels, which a slice does not have. Use data.augment.crop_pad with data.augment.aligned"
    )


def _no_crop(augment: Augment, spectral: SpectralSplit) -> str | None:
    if not augment.crop_pad:
        return None
    if augment.crop_step(spectral.block) != spectral.block:
        return (
            f"data.augment.aligned: expected true where slices are augmented with data.augment.crop_pad="
            f"{augment.crop_pad}, received {augment.aligned}; a slice moves by whole blocks of the image"
        )
    return _no_blocks("crop_pad", spectral) or _no_padding("data.augment.crop_pad", spectral, any(spectral.padding))


def _no_erase(augment: Augment, spectral: SpectralSplit) -> str | None:
    if not augment.erase:
        return None
    reflected = any(spectral.padding) and spectral.pad != "zeros"  # erased pixels would be reflected
    return _no_blocks("erase", spectral) or _no_padding("data.augment.erase", spectral, reflected)


def _no_mirror(setting: str, spectral: SpectralSplit, slices: Iterable[int]) -> str | None:
    """Why the slices alone, which `setting` is to mirror, do not determine those of the mirror image."""
    if _signs(spectral, slices) is not None:
        return None
    names = ", ".join(_flipping(spectral))
    can = f"Of this reorganisation and block these transforms can: {names}" if names else "No transform could"
    return _no_padding(setting, spectral, spectral.padding[1] > 0) or (
        f"{setting}: expected false where slices are mirrored without their images, because one slice of "
        f"data.transform={spectral.transform} with data.reorganisation={spectral.reorganisation} and data.block="
        f"{spectral.block} does not determine its mirror image; received true. {can}; "
        f"where images are read (data.store=null) any can"
    )


def _no_blocks(name: str, spectral: SpectralSplit) -> str | None:
    if tubes_are_blocks(spectral):
        return None
    return (
        f"data.reorganisation: expected polyphase, whose tubes are blocks of the image, for data.augment.{name} of "
        f"slices; received {spectral.reorganisation}"
    )


def _no_padding(setting: str, spectral: SpectralSplit, in_the_way: bool) -> str | None:
    if not in_the_way:
        return None
    return (
        f"data.pad: expected a data.block that divides the image where {setting} changes slices; received data.pad="
        f"{spectral.pad}, which enlarges the image by {spectral.padding} pixels"
    )


def _obstacle(augment: Augment, spectral: SpectralSplit, slices: Sequence[int]) -> str | None:
    """Why the slices alone do not determine the slices of the augmented image; None if they do."""
    return (
        _no_resize(augment)
        or _no_crop(augment, spectral)
        or _no_erase(augment, spectral)
        or (_no_mirror("data.augment.flip", spectral, slices) if augment.flip else None)
    )


def can_augment_slices(augment: Augment, spectral: SpectralSplit) -> bool:
    """Whether augmenting each slice alone equals augmenting images and splitting them, for every slice.

    Raises: ConfigError for an aligned crop that the block does not divide.
    """
    return _obstacle(augment, spectral, range(spectral.n_slices)) is None


def check_augment(augment: Augment, spectral: SpectralSplit) -> None:
    """Find an augmentation that fits the block or the reorganisation in no way, with images or without.

    Raises: ConfigError for an aligned crop that the block does not divide, and for cutmix, which pastes boxes of
    slices, where tubes are not blocks of the image.
    """
    augment.crop_step(spectral.block)
    if augment.cutmix and (reason := _no_blocks("cutmix", spectral)):
        raise ConfigError(reason)


class SliceAugment:
    """Crop, flip and erase the raw slices of images: `split(augment(images))` without the images.

    Raw, because the zeros that come in are black pixels; the mean is subtracted afterwards.

    Args:
        augment: What to do; `mixup` and `cutmix` are left to `mix`.
        spectral: The split that the slices come from; if its transform is learned, fitted.
        slices: For each x[s] its slice, or the slices that lie side by side in its channels.

    Raises: ConfigError if that is not exact for these slices.
    """

    def __init__(
        self, augment: Augment, spectral: SpectralSplit, slices: Sequence[int] | Sequence[Sequence[int]]
    ) -> None:
        check_augment(augment, spectral)
        groups = [(entry,) if isinstance(entry, int) else tuple(entry) for entry in slices]
        read_slices = [k for group in groups for k in group]
        if reason := _obstacle(augment, spectral, read_slices):
            raise ConfigError(reason)
        (bh, bw), pad = spectral.block, augment.crop_pad
        size = spectral.slice_shape(read_slices[0])[1:]
        self.moves = Moves(size, (pad // bh, pad // bw), augment.flip, augment.erase)
        self.is_on = augment.moves
        self.signs = _signs_of_channels(spectral, groups) if augment.flip else None

    def __call__(self, x: Tensor, seed: int, epoch: int, indices: Tensor | np.ndarray) -> Tensor:
        """The slices of the augmented images.

        Shapes: x (s, n, c, h, w) floating point, indices (n,) in the data set -> (s, n, c, h, w).
        """
        if not self.is_on:
            return x
        drawn = torch.from_numpy(self.moves.draw(seed, epoch, indices)).to(x.device)
        moved = read(x, self.moves.source(drawn))
        return moved if self.signs is None else moved.mul_(self._factors(drawn, x))

    def _factors(self, drawn: Tensor, x: Tensor) -> Tensor:
        """The sign of each mirrored sample, 1 of the others: (s, n, c, 1, 1)."""
        assert self.signs is not None, "a flip has signs"
        mirrored = drawn[:, 2].bool()[:, None, None, None]
        return torch.where(mirrored, self.signs.to(x), 1)


class SliceMirror:
    """The slices of mirror images, `split(images.flip(-1))`, without the images; its own inverse.

    Args:
        spectral: The split that the slices come from; if its transform is learned, fitted.
        groups: For each x[s] the slices that lie side by side in its channels.

    Shapes: raw slices (s, n, c, h, w) -> the same. Raises: ConfigError if that is not exact for these slices.
    """

    def __init__(self, spectral: SpectralSplit, groups: Sequence[Sequence[int]]) -> None:
        if reason := _no_mirror("ensemble.flips", spectral, [k for group in groups for k in group]):
            raise ConfigError(reason)
        self.signs = _signs_of_channels(spectral, groups)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flip(-1).mul_(self.signs.to(x))


def _signs_of_channels(spectral: SpectralSplit, groups: Sequence[Sequence[int]]) -> Tensor:
    """(s, 1, c, 1, 1), the same for the colours of one row."""
    signs = [_signs(spectral, group) for group in groups]
    stacked = torch.stack([of_rows for of_rows in signs if of_rows is not None])
    return stacked.repeat_interleave(spectral.image_shape[0], 1)[:, None, :, None, None]
