"""Augmented slices are the slices of augmented images, wherever that is claimed; where it is not, they differ."""

from itertools import product

import pytest
import torch
from torch import Tensor

from stl_lightning.augment import Augment, SliceAugment, SliceMirror, can_augment_slices, check_augment
from stl_lightning.augment.moves import Moves, read
from stl_lightning.errors import ConfigError
from stl_lightning.spectral import REORGANISATIONS, TRANSFORMS, SpectralSplit, fitting_transforms

SEED, EPOCH, N = 3, 5, 20
INDICES = torch.arange(70, 70 + N)

# Everything that can be done inside a slice; the crop's padding suits all blocks below.
MOVES = {
    "crop": Augment(crop_pad=12, aligned=True),
    "flip": Augment(flip=True),
    "erase": Augment(erase=0.7),
    "all": Augment(crop_pad=12, aligned=True, flip=True, erase=0.7),
}
BLOCKS = [(1, 1), (2, 2), (1, 4), (4, 1), (2, 4), (3, 2)]
WAYS = list(product(REORGANISATIONS, TRANSFORMS))
PADDED = [((11, 24), "zeros"), ((12, 23), "zeros"), ((10, 22), "reflect")]  # of blocks of 4 x 4

GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))
DEVICES = ["cpu", GPU]


def make_split(transform="dct2", reorganisation="polyphase", block=(2, 2), size=(12, 24), pad=None) -> SpectralSplit:
    split = SpectralSplit((2, *size), block, reorganisation, transform, pad)
    return split.fit(torch.rand(40, 2, *size, generator=torch.Generator().manual_seed(1)))


def splits(transform: str, reorganisation: str) -> list[SpectralSplit]:
    whole = [make_split(transform, reorganisation, b) for b in BLOCKS if transform in fitting_transforms(b)]
    return whole + [make_split(transform, reorganisation, (4, 4), *padded) for padded in PADDED]


def some_images(split: SpectralSplit) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.rand(N, *split.image_shape, dtype=torch.float64, generator=generator)


def result_of(augment: Augment, split: SpectralSplit, k: int, part: Tensor) -> Tensor | None:
    """The augmented slice, or None if that is refused."""
    try:
        return SliceAugment(augment, split, [k])(part[None], SEED, EPOCH, INDICES)[0]
    except ConfigError:
        return None


def are_exact(augment: Augment, split: SpectralSplit, parts: list[Tensor], expected: list[Tensor]) -> list[bool]:
    """Whether moving each slice, and choosing the best sign for each channel of the mirrored samples, does it."""
    bh, bw = split.block
    size, pad = split.slice_shape(0)[1:], (augment.crop_pad // bh, augment.crop_pad // bw)
    moves = Moves(size, pad, augment.flip, augment.erase)
    drawn = torch.from_numpy(moves.draw(SEED, EPOCH, INDICES))
    source, mirrored = moves.source(drawn), drawn[:, 2].bool()

    def fits(difference: Tensor, of: Tensor) -> Tensor:
        return (difference.abs().amax((2, 3)) < 1e-5)[of].all(0)  # (c,)

    def one(part: Tensor, wanted: Tensor) -> bool:
        moved = read(part, source)
        same, opposite = moved - wanted, moved + wanted
        return bool((fits(same, ~mirrored) & (fits(same, mirrored) | fits(opposite, mirrored))).all())

    return [one(*both) for both in zip(parts, expected, strict=True)]


@pytest.mark.parametrize(("reorganisation", "transform"), WAYS)
@pytest.mark.parametrize("move", MOVES)
def test_augmented_slices_are_the_slices_of_augmented_images_exactly_where_that_is_claimed(
    reorganisation, transform, move
):
    augment = MOVES[move]
    for split in splits(transform, reorganisation):
        images = some_images(split)
        parts, expected = split(images), split(augment(images, SEED, EPOCH, INDICES, split.block))
        exact = are_exact(augment, split, parts, expected)
        claimed = [result_of(augment, split, k, part) for k, part in enumerate(parts)]
        for result, wanted in zip(claimed, expected, strict=True):
            if result is not None:
                torch.testing.assert_close(result, wanted, atol=1e-6, rtol=0)
        is_padded = split.padding != (0, 0)  # refused as a whole then, though single slices may hold no padding
        assert is_padded or exact == [result is not None for result in claimed], split
        assert can_augment_slices(augment, split) == all(exact), split


def mirrors(part: Tensor, wanted: Tensor) -> bool:
    """Whether one is the other's mirror image, up to the sign of each channel."""
    flipped = part.flip(-1)
    return all(min((flipped[:, c] + s * wanted[:, c]).abs().max() for s in (1, -1)) < 1e-5 for c in range(part.size(1)))


@pytest.mark.parametrize(("reorganisation", "transform"), WAYS)
def test_mirrored_slices_are_the_slices_of_mirror_images_exactly_where_that_is_claimed(reorganisation, transform):
    for split in splits(transform, reorganisation):
        images = some_images(split)
        for k, (part, wanted) in enumerate(zip(split(images), split(images.flip(-1)), strict=True)):
            try:
                mirror = SliceMirror(split, [[k]])
            except ConfigError:
                assert split.padding[1] or not mirrors(part, wanted), split
            else:
                torch.testing.assert_close(mirror(part[None])[0], wanted, atol=1e-6, rtol=0)
                assert torch.equal(mirror(mirror(part[None]))[0], part)


def test_who_can() -> None:
    """The claims of the method, spelled out for one block."""
    can = {
        move: {way for way in WAYS if can_augment_slices(augment, make_split(way[1], way[0], (4, 4)))}
        for move, augment in MOVES.items()
    }
    assert can["crop"] == can["erase"] == {("polyphase", transform) for transform in TRANSFORMS}
    assert can["flip"] == set(product(["polyphase", "tiles"], ["dct2", "hadamard"]))
    assert can["all"] == set(product(["polyphase"], ["dct2", "hadamard"]))
    flips = MOVES["flip"]
    in_a_row = {name for name in TRANSFORMS if can_augment_slices(flips, make_split(name, block=(1, 4)))}
    in_a_column = {name for name in TRANSFORMS if can_augment_slices(flips, make_split(name, block=(4, 1)))}
    assert in_a_row == {"dct", "dct2", "hadamard"}
    assert in_a_column == set(TRANSFORMS)


def test_a_learned_transform_needs_no_fit_for_what_any_transform_can() -> None:
    split = SpectralSplit((2, 12, 24), (2, 2), transform="klt")
    assert can_augment_slices(MOVES["crop"], split)
    assert not can_augment_slices(MOVES["flip"], split)


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_slices_stand_one_behind_the_other_or_side_by_side(device) -> None:
    split, augment = make_split(block=(2, 4)), MOVES["all"]
    parts = torch.stack(split(some_images(split).float()))
    behind = SliceAugment(augment, split, range(8))(parts.to(device), SEED, EPOCH, INDICES).cpu()
    each = [SliceAugment(augment, split, [k])(parts[[k]], SEED, EPOCH, INDICES)[0] for k in range(8)]
    assert torch.equal(behind, torch.stack(each))
    branches = [(0, 5), (7, 0)]
    beside = torch.stack([torch.cat([parts[k] for k in ks], 1) for ks in branches])
    result = SliceAugment(augment, split, branches)(beside.to(device), SEED, EPOCH, INDICES).cpu()
    assert torch.equal(result, torch.stack([torch.cat([each[k] for k in ks], 1) for ks in branches]))


def test_slices_of_a_sample_do_not_depend_on_the_batch_it_comes_in() -> None:
    split = make_split()
    augment, parts = SliceAugment(MOVES["all"], split, range(4)), torch.stack(split(some_images(split)))
    whole = augment(parts, SEED, EPOCH, INDICES)
    for order in torch.randperm(N, generator=torch.Generator().manual_seed(0)).split(7):
        assert torch.equal(augment(parts[:, order], SEED, EPOCH, INDICES[order]), whole[:, order])
    assert not torch.equal(augment(parts, SEED, EPOCH + 1, INDICES), whole)


def test_slices_that_came_in_are_left_alone() -> None:
    split = make_split()
    parts = torch.stack(split(some_images(split)))
    before = parts.clone()
    for augment in [*MOVES.values(), Augment()]:
        SliceAugment(augment, split, range(4))(parts, SEED, EPOCH, INDICES)
        assert torch.equal(parts, before)
    assert torch.equal(SliceAugment(Augment(), split, range(4))(parts, SEED, EPOCH, INDICES), before)


ERRORS = {
    "resized": (Augment(resized_crop=(0.5, 1.0)), {}, ["data.augment.resized_crop", "(0.5, 1.0)", "crop_pad"]),
    "unaligned": (Augment(crop_pad=4), {}, ["data.augment.aligned", "crop_pad=4"]),
    "part of a block": (Augment(crop_pad=3, aligned=True), {}, ["data.augment.crop_pad", "2x2", "received 3"]),
    "crop of tiles": (MOVES["crop"], {"reorganisation": "tiles"}, ["data.reorganisation", "polyphase", "crop_pad"]),
    "erase of raster": (MOVES["erase"], {"reorganisation": "raster"}, ["data.reorganisation", "erase", "raster"]),
    "flip of dct": (MOVES["flip"], {"transform": "dct"}, ["data.augment.flip", "=dct ", "can: dct2, hadamard, haar"]),
    "flip of haar": (MOVES["flip"], {"transform": "haar", "block": (4, 4)}, ["=haar ", "can: dct2, hadamard"]),
    "flip of raster": (MOVES["flip"], {"reorganisation": "raster"}, ["data.reorganisation=raster", "No transform"]),
    "flip of padding": (MOVES["flip"], {"size": (12, 23), "pad": "zeros"}, ["data.pad", "flip", "pad=zeros"]),
    "crop of padding": (MOVES["crop"], {"size": (11, 24), "pad": "reflect"}, ["data.pad", "crop_pad", "(1, 0)"]),
    "erase of padding": (MOVES["erase"], {"size": (11, 24), "pad": "reflect"}, ["data.pad", "erase"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_an_error_says_which_setting_to_change(case) -> None:
    augment, settings, wanted = ERRORS[case]
    split = make_split(**settings)
    with pytest.raises(ConfigError) as error:
        SliceAugment(augment, split, range(split.n_slices))
    assert all(words in str(error.value) for words in wanted), str(error.value)


def test_what_fits_no_way_of_training_is_found_without_slices() -> None:
    for reorganisation in ("tiles", "raster"):
        with pytest.raises(ConfigError, match=r"data.reorganisation: expected polyphase.*cutmix"):
            check_augment(Augment(cutmix=1.0), make_split(reorganisation=reorganisation))
    with pytest.raises(ConfigError, match=r"data.augment.crop_pad"):
        check_augment(Augment(crop_pad=1, aligned=True), make_split())
    check_augment(Augment(crop_pad=1, cutmix=1.0, mixup=0.2, resized_crop=(0.1, 1.0)), make_split())
