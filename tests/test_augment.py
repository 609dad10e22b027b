"""Draws depend on (seed, epoch, sample, draw) alone; crops, flips and boxes are those of torchvision."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import RandomErasing, RandomResizedCrop
from torchvision.transforms import functional as reference

from stl_lightning.augment import Augment, box_draws, resized_crop_box, uniform
from stl_lightning.augment.boxes import erased_boxes
from stl_lightning.augment.draws import (
    BOX,
    ERASE,
    FLIP,
    LEFT,
    MIX,
    N_BOX_DRAWS,
    N_ERASE_DRAWS,
    N_MIX_DRAWS,
    TOP,
)
from stl_lightning.errors import ConfigError

SAMPLES = np.arange(20_000)


def images(n: int, dtype: torch.dtype = torch.uint8, shape: tuple[int, int, int] = (3, 9, 7)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (n, *shape), generator=generator).to(dtype)


def test_draws_never_change_between_versions():
    golden = [
        [0.12964562102685, 0.04992006563458, 0.67032836876864],
        [0.59144949608268, 0.29252336076431, 0.72320733553598],
    ]
    np.testing.assert_allclose(uniform(0, 0, np.arange(2), 3), golden, atol=1e-12)
    np.testing.assert_allclose(uniform(-1, 2**40, np.array([2**40]), 1), [[0.7563605815366043]], atol=1e-15)


def test_a_draw_depends_on_nothing_but_its_four_numbers():
    whole = uniform(5, 3, SAMPLES, 4)
    order = np.random.default_rng(0).permutation(len(SAMPLES))
    batches = [uniform(5, 3, torch.as_tensor(batch), 2) for batch in np.array_split(order, 7)]
    assert np.array_equal(np.concatenate(batches), whole[order][:, :2])


def test_draws_from_the_middle_are_those_of_the_whole_row():
    assert np.array_equal(uniform(5, 3, SAMPLES, 4, first=2), uniform(5, 3, SAMPLES, 6)[:, 2:])


def test_no_two_augmentations_share_a_draw():
    taken = [range(BOX), range(BOX, ERASE), range(ERASE, ERASE + N_ERASE_DRAWS), range(MIX, MIX + N_MIX_DRAWS)]
    numbers = [number for part in taken for number in part]
    assert numbers == list(range(MIX + N_MIX_DRAWS))
    assert N_BOX_DRAWS == ERASE - BOX


def test_draws_are_uniform():
    draws = uniform(1, 2, SAMPLES, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert all(kstest(column, "uniform").pvalue > 1e-3 for column in draws.T)


@pytest.mark.parametrize("neighbour", ["seed", "epoch", "index", "draw"])
def test_neighbouring_draws_are_independent(neighbour):
    here = uniform(1, 2, SAMPLES, 1)
    there = {
        "seed": uniform(2, 2, SAMPLES, 1),
        "epoch": uniform(1, 3, SAMPLES, 1),
        "index": uniform(1, 2, SAMPLES + 1, 1),
        "draw": uniform(1, 2, SAMPLES, 2)[:, 1:],
    }[neighbour]
    cells = np.histogram2d(here[:, 0], there[:, 0], bins=10, range=[(0, 1), (0, 1)])[0]
    assert chisquare(cells.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(here[:, 0], there[:, 0])[0, 1]) < 4 / len(SAMPLES) ** 0.5


def test_seed_and_epoch_are_not_interchangeable():
    assert not np.allclose(uniform(1, 2, SAMPLES[:9], 1), uniform(2, 1, SAMPLES[:9], 1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(("crop_pad", "flip"), [(0, False), (0, True), (2, False), (4, True), (9, True)])
def test_augmentation_equals_torchvision_at_the_drawn_offsets(crop_pad, flip, dtype):
    x, indices = images(40, dtype), torch.arange(100, 140)
    draws = uniform(7, 1, indices, BOX)
    for image, row, result in zip(x, draws, Augment(crop_pad, flip)(x, 7, 1, indices), strict=True):
        top, left = (int(row[draw] * (2 * crop_pad + 1)) for draw in (TOP, LEFT))
        expected = reference.crop(reference.pad(image, [crop_pad]), top, left, *image.shape[1:])
        expected = reference.hflip(expected) if flip and row[FLIP] < 0.5 else expected
        assert result.dtype == dtype
        assert torch.equal(result, expected)


def test_augmentation_is_the_same_whatever_the_batching():
    x, augment = images(30), Augment(3, True, erase=0.5)
    whole = augment(x, 0, 4, torch.arange(30))
    order = torch.randperm(30)
    parts = [augment(x[part], 0, 4, part) for part in order.split(7)]
    assert torch.equal(torch.cat(parts), whole[order])
    assert not torch.equal(augment(x, 0, 5, torch.arange(30)), whole)


def test_augmentation_off_is_the_identity():
    x = images(8)
    assert torch.equal(Augment()(x, 0, 0, torch.arange(8)), x)


def test_every_offset_and_both_sides_are_drawn_equally_often():
    pad, side = 2, 5
    n = 5_000
    corner = torch.zeros(n, 1, side, side)
    corner[:, :, side // 2, side // 2] = 1
    moved = Augment(pad)(corner, 3, 0, torch.arange(n)).sum(0)[0]
    assert chisquare(moved.flatten().numpy()).pvalue > 1e-3  # the centre lands on all 25 pixels alike
    ramp = torch.arange(2.0).expand(n, 1, 1, 2)
    flipped = Augment(flip=True)(ramp, 3, 0, torch.arange(n))[:, 0, 0, 0].sum()
    assert abs(float(flipped) - n / 2) < 4 * (n / 4) ** 0.5


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (1, 3), (6, 2)])
def test_aligned_crops_move_by_whole_blocks(block):
    x, indices, pad = images(200, shape=(1, 12, 18)), torch.arange(200), 6
    results = Augment(pad, aligned=True)(x, 3, 0, indices, block)
    offsets = {(top, left) for top in range(0, 2 * pad + 1, block[0]) for left in range(0, 2 * pad + 1, block[1])}
    windows = {at: reference.crop(reference.pad(x, [pad]), *at, 12, 18) for at in offsets}
    found = [{at for at in offsets if torch.equal(windows[at][i], results[i])} for i in indices]
    assert all(found)
    if len(offsets) < 50:
        assert set.union(*found) == offsets
    assert not torch.equal(Augment(pad, aligned=True)(x, 3, 0, indices, block), x)


@pytest.mark.parametrize("block", [(1, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_erasing_zeroes_a_box_of_whole_blocks_in_the_share_of_samples_asked_for(block, dtype):
    x, indices = images(2_000, dtype, (2, 13, 17)), torch.arange(2_000)  # the last blocks reach over the edge
    kept = Augment(erase=0.25)(x, 3, 0, indices, block) == x
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    erased = ~kept[:, 0]
    assert abs(float(erased.any(-1).any(-1).sum()) - 500) < 4 * (2_000 * 0.25 * 0.75) ** 0.5
    rows, columns = erased.any(-1), erased.any(-2)
    assert torch.equal(erased, rows[:, :, None] & columns[:, None])  # a product of rows and columns ...
    for side, of_block in ((rows, block[0]), (columns, block[1])):
        edges = side.diff(dim=1)
        assert edges.sum(1).max() <= 2  # ... each in one piece ...
        assert not edges[:, [i for i in range(edges.shape[1]) if (i + 1) % of_block]].any()  # ... of whole blocks
    assert not Augment(erase=0.25)(x, 3, 0, indices, block)[~kept].any()


def test_erased_boxes_are_distributed_as_those_of_torchvision():
    height, width, n = 120, 90, 3_000
    ours = erased_boxes(uniform(0, 0, np.arange(n), N_ERASE_DRAWS, first=ERASE), 1.0, height, width)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomErasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0])[:4] for _ in range(n)])
    assert all(ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(ours.T, theirs.T, strict=True))


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (2, 2), (7, 7)])
def test_a_box_to_erase_fits_any_grid_and_is_never_empty(grid):
    boxes = erased_boxes(uniform(0, 0, np.arange(500), N_ERASE_DRAWS, first=ERASE), 1.0, *grid)
    assert np.all(boxes[:, 2:] >= 1)
    assert np.all(boxes[:, :2] >= 0)
    assert np.all(boxes[:, :2] + boxes[:, 2:] <= grid)


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 0.6)])
def test_boxes_are_distributed_as_those_of_torchvision(scale):
    height, width, n = 60, 90, 1_500
    ours = np.array([resized_crop_box(row, height, width, scale) for row in box_draws(0, 0, np.arange(n))])
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(n)])
    assert all(ks_2samp(a, b).pvalue > 1e-3 for a, b in zip(ours.T, theirs.T, strict=True))
    assert np.all(ours[:, :2] >= 0)
    assert np.all(ours[:, :2] + ours[:, 2:] <= (height, width))


@pytest.mark.parametrize("size", [(10, 400), (400, 10), (1, 1)])
def test_a_box_that_never_fits_falls_back_to_the_centre_as_in_torchvision(size):
    expected = RandomResizedCrop.get_params(torch.empty(3, *size), (1.0, 1.0), (3 / 4, 4 / 3))
    assert resized_crop_box(box_draws(0, 0, np.arange(1))[0], *size, (1.0, 1.0)) == expected


@pytest.mark.parametrize("height", [40, 47, 60])
def test_boxes_reach_from_edge_to_edge(height):
    first, last = np.full(N_BOX_DRAWS, 0.5), np.full(N_BOX_DRAWS, 0.5)
    first[-2:], last[-2:] = 0, 1 - 2.0**-53
    assert resized_crop_box(first, height, 50, (0.2, 0.4))[:2] == (0, 0)
    top, left, h, w = resized_crop_box(last, height, 50, (0.2, 0.4))
    assert (top + h, left + w) == (height, 50)


def test_the_fallback_of_an_ordinary_image_is_the_whole_image():
    always_wide = np.full(N_BOX_DRAWS, 0.999)
    assert resized_crop_box(always_wide, 50, 60, (1.0, 1.0)) == (0, 0, 50, 60)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"crop_pad": -1}, "crop_pad"),
        ({"resized_crop": (0.0, 1.0)}, "resized_crop"),
        ({"resized_crop": (0.9, 0.1)}, "resized_crop"),
        ({"resized_crop": (0.5, 1.5)}, "resized_crop"),
        ({"resized_crop": (0.5,)}, "resized_crop"),
        ({"erase": -0.1}, "erase"),
        ({"erase": 1.1}, "erase"),
        ({"mixup": -1.0}, "mixup"),
        ({"cutmix": float("inf")}, "cutmix"),
    ],
)
def test_values_out_of_range_are_refused(options, setting):
    with pytest.raises(ConfigError, match=f"data.augment.{setting}"):
        Augment(**options)


@pytest.mark.parametrize("block", [(3, 1), (1, 3), (8, 8)])
def test_an_aligned_crop_asks_for_padding_of_whole_blocks(block):
    with pytest.raises(ConfigError, match=rf"data.augment.crop_pad: .* {block[0]}x{block[1]}; received 4"):
        Augment(crop_pad=4, aligned=True)(images(1), 0, 0, torch.arange(1), block)
