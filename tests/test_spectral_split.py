"""The split: exact inverse, one slice equal to all slices, flips and shifts inside a slice, errors."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from stl_lightning.errors import ConfigError, DataError
from stl_lightning.spectral import REORGANISATIONS, TRANSFORMS, SpectralSplit, fitting_transforms
from stl_lightning.spectral import split as module
from stl_lightning.spectral.geometry import PADS

WAYS = [(reorganisation, transform) for reorganisation in REORGANISATIONS for transform in TRANSFORMS]
SIDES = st.integers(1, 4)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def make_split(shape=(3, 8, 12), block=(2, 4), reorganisation="polyphase", transform="dct2", **options):
    split = SpectralSplit(shape, block, reorganisation, transform, **options)
    return split.fit(torch.randn(40, *shape, generator=torch.Generator().manual_seed(0)))


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", REORGANISATIONS)
@given(block=st.tuples(SIDES, SIDES), size=st.tuples(SIDES, SIDES))
@settings(max_examples=25, deadline=None)
def test_reorganisation_is_a_permutation_with_an_inverse_and_one_component_a_row(name, block, size):
    way, shape = REORGANISATIONS[name], (2, 3, block[0] * size[0], block[1] * size[1])
    images = torch.arange(math.prod(shape)).view(shape)
    tubes = way.forward(images, block)
    assert tubes.shape == (2, 3, *size, math.prod(block))
    assert torch.equal(way.inverse(tubes, block), images)
    for memory in (torch.contiguous_format, torch.channels_last):
        pixels = images.to(memory_format=memory)
        assert torch.equal(way.components(pixels, block), tubes.flatten(0, -2).T)


def test_polyphase_is_pixel_unshuffle():
    images = torch.randn(2, 3, 12, 8)
    tubes = REORGANISATIONS["polyphase"].forward(images, (4, 4))
    assert torch.equal(tubes.movedim(-1, 2).flatten(1, 2), F.pixel_unshuffle(images, 4))


def test_tiles_and_raster_follow_their_rules():
    images = torch.randn(2, 6, 8)
    tiles = REORGANISATIONS["tiles"].forward(images, (3, 2))
    assert torch.equal(tiles[..., 2 * 2 + 1], images[:, 4:6, 4:8])
    raster = REORGANISATIONS["raster"].forward(images, (3, 2))
    assert torch.equal(raster, images.reshape(2, 2, 4, 6))


@pytest.mark.parametrize(("reorganisation", "transform"), WAYS)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_split_keeps_energy_has_an_inverse_and_one_slice_equals_all_slices(reorganisation, transform, data):
    block = data.draw(st.tuples(SIDES, SIDES).filter(lambda block: transform in fitting_transforms(block)))
    h, w, c = data.draw(st.tuples(SIDES, SIDES, st.integers(1, 3)))
    split = make_split((c, h * block[0], w * block[1]), block, reorganisation, transform)
    images = torch.randn(2, *split.image_shape)
    slices = split(images)
    assert [tuple(part.shape[1:]) for part in slices] == [split.slice_shape(k) for k in range(split.n_slices)]
    same(split.inverse(slices), images)
    same(torch.cat(slices, 1).norm(), images.norm())
    for k, expected in enumerate(slices):
        same(split.slice(images, k), expected)
    order = list(range(split.n_slices))[::-1]
    same(split.slices(images, order), torch.cat([slices[k] for k in order], 1))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_polyphase_slice_is_a_strided_convolution_with_its_basis_images(transform):
    split, images = make_split(transform=transform), torch.randn(2, 3, 8, 12)
    for k in range(split.n_slices):
        channels = []
        for row in split.rows(k):
            basis_image = split.matrix[row].view(1, 1, *split.block).repeat(3, 1, 1, 1)
            channels.append(F.conv2d(images, basis_image, stride=split.block, groups=3))
        same(split.slice(images, k), torch.cat(channels, 1))


@pytest.mark.parametrize("reorganisation", REORGANISATIONS)
def test_one_slice_costs_a_bth_of_the_products_of_all(reorganisation):
    def flops(first: torch.Size, *_, **__) -> int:
        return 2 * math.prod(first)

    counted = dict.fromkeys((torch.ops.aten.mv, torch.ops.aten.mul, torch.ops.aten.add_), flops)
    split, images = make_split((3, 16, 16), 4, reorganisation), torch.randn(2, 3, 16, 16)
    with FlopCounterMode(display=False) as all_slices:
        split(images)
    with FlopCounterMode(display=False, custom_mapping=counted) as one_slice:
        split.slice(images, 5)
    assert all_slices.get_total_flops() == 2 * 16 * images.numel()
    # A separable slice takes two steps, the second on a quarter of the numbers.
    assert 1.0 <= one_slice.get_total_flops() * 16 / all_slices.get_total_flops() <= 1.26


@pytest.mark.parametrize("pad", PADS)
@pytest.mark.parametrize("shape", [(1, 7, 9), (3, 8, 8), (2, 5, 8)])
@pytest.mark.parametrize("reorganisation", REORGANISATIONS)
def test_padding_enlarges_the_slices_and_the_inverse_crops(pad, shape, reorganisation):
    split, images = make_split(shape, 4, reorganisation, pad=pad), torch.randn(2, *shape)
    assert split.slice_shape(0)[1:] == (-(-shape[1] // 4), -(-shape[2] // 4))
    slices = split(images)
    same(split.inverse(slices), images)
    same(split.slice(images, 3), slices[3])
    rows, columns = -shape[1] % 4, -shape[2] % 4
    padded = F.pad(images, (0, columns, 0, rows), mode=PADS[pad])
    whole = make_split(tuple(padded.shape[1:]), 4, reorganisation)
    same(slices[1], whole(padded)[1])


@pytest.mark.parametrize(("dim", "axis"), [(-1, 1), (-2, 0)])
@pytest.mark.parametrize("transform", ["dct2", "hadamard"])
def test_flip_of_the_image_is_a_flip_of_the_slice_up_to_sign(transform, dim, axis):
    split, images = make_split((3, 8, 16), (2, 4), transform=transform), torch.randn(2, 3, 8, 16)
    flipped = split(images.flip(dim))
    for k, part in enumerate(split(images)):
        same(flipped[k], part.flip(dim) * (-1) ** split.frequencies[k][axis])


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_shift_by_whole_blocks_is_a_shift_of_every_slice(transform):
    split, images = make_split(transform=transform), torch.randn(2, 3, 8, 12)
    shifted = split(images.roll((2 * split.block[0], split.block[1]), (2, 3)))
    for part, moved in zip(split(images), shifted, strict=True):
        same(moved, part.roll((2, 1), (2, 3)))


@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("transform", ["dct2", "dft"])
@pytest.mark.parametrize("reorganisation", REORGANISATIONS)
def test_chunks_memory_and_tracked_gradients_change_nothing(reorganisation, transform, n, monkeypatch):
    split, images = make_split((3, 7, 12), (2, 4), reorganisation, transform, pad="reflect"), torch.randn(n, 3, 7, 12)
    whole = split(images)
    for name in ("CHUNK", "ONE_SLICE_CHUNK"):
        monkeypatch.setattr(module, name, 2 * 3 * 7 * 12)
    out = torch.empty(8, n, 3, 4, 3)
    written, tracked = split(images, out), split(images.clone().requires_grad_())
    for k, part in enumerate(whole):
        same(written[k], part)
        same(tracked[k], part)
        same(split.slice(images, k), part)
        if len(split.rows(k)) == 1:
            assert written[k].is_contiguous()
            assert n == 0 or written[k].data_ptr() == out[split.rows(k)[0]].data_ptr()


@pytest.mark.parametrize("reorganisation", REORGANISATIONS)
def test_bytes_stand_for_pixels_of_255(reorganisation):
    pixels = torch.randint(256, (6, 3, 7, 12), dtype=torch.uint8)
    options = {"shape": (3, 7, 12), "reorganisation": reorganisation, "pad": "zeros"}
    split = make_split(**options)
    for part, expected in zip(split(pixels), split(pixels / 255), strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, expected)
    assert torch.equal(split.slices(pixels, [3, 1]), split.slices(pixels / 255, [3, 1]))
    learned = [SpectralSplit((3, 7, 12), (2, 4), reorganisation, "klt", "zeros").fit(x) for x in (pixels, pixels / 255)]
    assert torch.equal(learned[0].matrix, learned[1].matrix)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("reorganisation", REORGANISATIONS)
def test_slices_have_the_type_of_the_images(reorganisation, dtype):
    split, images = make_split(reorganisation=reorganisation), torch.randn(2, 3, 8, 12).to(dtype)
    parts = split(images)
    assert {part.dtype for part in [*parts, split.slice(images, 3)]} == {dtype}
    tolerance = torch.finfo(dtype).eps * 8 + 1e-6
    torch.testing.assert_close(split.inverse(parts), images, atol=tolerance, rtol=tolerance)


def test_memory_layout_autocast_and_gradients_change_nothing():
    split, images = make_split(), torch.randn(2, 3, 8, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(split.slice(images, 4), split(images.to(memory_format=torch.channels_last))[4])
        assert torch.equal(split(images)[4], split.eval()(images)[4])
    images.requires_grad_()
    gradients = [
        torch.autograd.grad(part.square().sum(), images)[0] for part in (split.slice(images, 4), split(images)[4])
    ]
    same(*gradients)
    assert split.inverse(split(images[:0])).shape == (0, 3, 8, 12)


def test_fitted_klt_travels_with_its_state_and_decorrelates():
    mixing = torch.randn(192, 192, generator=torch.Generator().manual_seed(1))
    images = (torch.randn(3000, 192) @ mixing).view(-1, 3, 8, 8) + 5
    split = SpectralSplit((3, 8, 8), 4, transform="klt")
    assert not split.is_fitted
    assert split.fit(images) is split
    values = torch.stack(split(images), -1).double().transpose(0, 1).flatten(1, 3)
    covariance = torch.stack([torch.cov(channel.T) for channel in values]).mean(0)
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 1e-4 * variances.max()
    assert (variances.diff() <= 1e-4 * variances.max()).all()

    loaded = torch.nn.Sequential(SpectralSplit((3, 8, 8), 4, transform="klt"))
    loaded.load_state_dict(torch.nn.Sequential(split).state_dict())
    for other in (loaded[0], copy.deepcopy(split), pickle.loads(pickle.dumps(split))):
        assert other.is_fitted
        assert torch.equal(other.slice(images[:2], 3), split.slice(images[:2], 3))
    loaded.load_state_dict(torch.nn.Sequential(SpectralSplit((3, 8, 8), 4, transform="klt")).state_dict())
    assert not loaded[0].is_fitted


def test_only_a_learned_matrix_is_saved_and_fit_leaves_the_others_alone():
    for name, row in TRANSFORMS.items():
        split = SpectralSplit((1, 8, 8), 4, transform=name)
        before = split.matrix.clone()
        split.fit(torch.randn(8, 1, 8, 8))
        assert ("matrix" in split.state_dict()) == (row.fit is not None)
        assert torch.equal(before, split.matrix) == (row.fit is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transform": "wavelet"}, r"data\.transform.*'wavelet'.*dct2"),
        ({"reorganisation": "spiral"}, r"data\.reorganisation.*'spiral'.*polyphase, raster, tiles"),
        ({"pad": "same"}, r"data\.pad.*'same'.*null, reflect, zeros"),
        ({"block": 5}, r"data\.block: 5x5.*28x28.*1, 2, 4, 7, 14, 28.*data\.pad.*30x30"),
        ({"block": (4, 3)}, r"data\.block: 4x3 .*28x30"),
        ({"block": 64, "pad": "reflect"}, r"data\.pad: reflect adds at most 27.*data\.pad=zeros"),
        ({"block": 0}, r"data\.block .*received \(0, 0\)"),
        ({"block": (2, 2, 2)}, r"data\.block .*received \(2, 2, 2\)"),
        ({"block": 2.0}, r"data\.block .*received 2\.0"),
        ({"image_shape": (28, 28)}, r"image_shape .*received \(28, 28\)"),
        ({"block": 7, "transform": "haar"}, r"data\.transform: haar.*data\.block.*dct, dct2"),
    ],
)
def test_wrong_settings_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        SpectralSplit(**{"image_shape": (1, 28, 28), "block": 4, **options})


def test_wrong_data_are_refused():
    split = SpectralSplit((3, 8, 8), 2)
    for images in (torch.zeros(2, 3, 8, 9), torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.int64)):
        for use in (split, lambda x: split.slice(x, 1)):
            with pytest.raises(DataError, match=r"expected floating point or uint8 \(n, 3, 8, 8\); received torch\."):
                use(images)
    for out in (torch.zeros(4, 2, 3, 4, 5), torch.zeros(4, 2, 3, 4, 4).double(), torch.zeros(4, 3, 2, 4, 4).mT):
        with pytest.raises(DataError, match=r"out: expected contiguous torch\.float32 \(4, 2, 3, 4, 4\); received"):
            split(torch.zeros(2, 3, 8, 8), out)
    with pytest.raises(DataError, match="slices: expected"):
        split.inverse(split(torch.zeros(1, 3, 8, 8))[:-1])
    for k in (-1, 4):
        with pytest.raises(ConfigError, match=rf"slice: expected 0\.\.3.*received {k}"):
            split.slice(torch.zeros(1, 3, 8, 8), k)
    with pytest.raises(ConfigError, match="at least one slice"):
        split.slices(torch.zeros(1, 3, 8, 8), [])


def test_klt_must_be_fitted_to_finite_images_before_use():
    split, images = SpectralSplit((1, 4, 4), 2, transform="klt"), torch.zeros(2, 1, 4, 4)
    for use in (split, lambda x: split.slice(x, 0), lambda x: split.inverse([x[..., ::2, ::2]] * 4)):
        with pytest.raises(ConfigError, match=r"data\.transform=klt is learned.*fit\(images\)"):
            use(images)
    for useless in (images[:0], images * torch.nan):
        with pytest.raises(DataError, match="at least one image, all finite"):
            split.fit(useless)
    assert not split.is_fitted
