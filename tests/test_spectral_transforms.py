"""The matrices: orthonormal, equal to SciPy's, and as good at coding an image model as published."""

import math

import numpy as np
import pytest
import scipy.fft
import scipy.linalg
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from stl_lightning.errors import ConfigError
from stl_lightning.spectral import TRANSFORMS, Basis, build_basis, fitting_transforms
from stl_lightning.spectral.transforms import klt_matrix, tube_covariance

BLOCKS = [(1, 1), (2, 2), (4, 4), (2, 8), (4, 1), (3, 3), (3, 4), (1, 7), (6, 6)]
CASES = [(name, block) for block in BLOCKS for name in fitting_transforms(block)]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def ar1_covariance(block: tuple[int, int], rho: float = 0.95) -> Tensor:
    """Covariance of the pixels of a block under the separable AR(1) image model, row-major."""
    side = [rho ** (torch.arange(n)[:, None] - torch.arange(n)).abs().double() for n in block]
    return torch.kron(side[0], side[1])


def ready_basis(name: str, block: tuple[int, int]) -> Basis:
    """The basis, fitted to the AR(1) model where it is learned."""
    basis, fit = build_basis(name, block), TRANSFORMS[name].fit
    return basis if fit is None else Basis(fit(ar1_covariance(block)), basis.groups, basis.frequencies)


def coding_gain(matrix: Tensor, covariance: Tensor) -> float:
    """Arithmetic over geometric mean of the coefficient variances (Jayant and Noll 1984)."""
    variances = (matrix @ covariance @ matrix.T).diagonal()
    return float(variances.mean() / variances.log().mean().exp())


@pytest.mark.parametrize(("name", "block"), CASES)
def test_basis_is_orthonormal_and_its_slices_use_every_row_once_in_order(name, block):
    basis, size = ready_basis(name, block), math.prod(block)
    assert basis.matrix.dtype == torch.float64
    torch.testing.assert_close(basis.matrix @ basis.matrix.T, torch.eye(size, dtype=torch.float64))
    assert [row for group in basis.groups for row in group] == list(range(size))
    assert len(basis.frequencies) == len(basis.groups) == len(set(basis.frequencies))


@given(st.sampled_from(sorted(TRANSFORMS)), st.tuples(st.integers(1, 6), st.integers(1, 6)))
@settings(max_examples=60, deadline=None)
def test_energy_of_a_tube_is_kept(name, block):
    assume(name in fitting_transforms(block))
    tube = torch.randn(math.prod(block), dtype=torch.float64)
    torch.testing.assert_close((ready_basis(name, block).matrix @ tube).norm(), tube.norm())


@pytest.mark.parametrize("block", BLOCKS)
def test_dct_is_scipys(block):
    tube = np.random.default_rng(0).normal(size=math.prod(block))
    coefficients = build_basis("dct", block).matrix.numpy() @ tube
    np.testing.assert_allclose(coefficients, scipy.fft.dct(tube, norm="ortho"), atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_dct2_is_scipys_read_at_the_stated_frequencies(block):
    basis, pixels = build_basis("dct2", block), np.random.default_rng(0).normal(size=block)
    expected = scipy.fft.dctn(pixels, norm="ortho")[tuple(np.array(basis.frequencies).T)]
    np.testing.assert_allclose(basis.matrix.numpy() @ pixels.ravel(), expected, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_dft_slices_are_the_real_fft(block):
    basis, tube = build_basis("dft", block), torch.randn(math.prod(block), dtype=torch.float64)
    assert len(basis.groups) == math.prod(block) // 2 + 1
    for group, value in zip(basis.groups, torch.fft.rfft(tube, norm="ortho"), strict=True):
        stored = basis.matrix[list(group)] @ tube
        expected = torch.stack([value.real, value.imag]) * 2**0.5 if len(group) == 2 else value.real[None]
        torch.testing.assert_close(stored, expected)


@pytest.mark.parametrize("size", [1, 2, 8, 32])
def test_hadamard_has_scipys_rows_in_order_of_sign_changes(size):
    rows = build_basis("hadamard", (1, size)).matrix * size**0.5
    assert [(row[1:] * row[:-1] < 0).sum().item() for row in rows] == list(range(size))
    expected = {tuple(row) for row in scipy.linalg.hadamard(size).tolist()}
    assert {tuple(row) for row in rows.round().int().tolist()} == expected


def test_haar_of_four_is_the_textbook_matrix():
    root = 2**0.5
    expected = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [root, -root, 0, 0], [0, 0, root, -root]]) / 2
    torch.testing.assert_close(build_basis("haar", (1, 4)).matrix, expected.double())


def test_jpegs_zigzag_order():
    frequencies = build_basis("dct2", (4, 4)).frequencies
    assert frequencies[:7] == ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3))
    assert [sum(f) for f in frequencies] == sorted(sum(f) for f in frequencies)


def test_random_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = build_basis("random", (4, 4), seed=7).matrix
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(first, build_basis("random", (4, 4), seed=7).matrix)
    assert not torch.allclose(first, build_basis("random", (4, 4), seed=8).matrix)
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("name", "published"), [("dct", 14.2), ("dct2", 32.7), ("identity", 1.0)])
def test_coding_gain_on_the_ar1_image_model(name, published):
    gain = coding_gain(build_basis(name, (4, 4)).matrix, ar1_covariance((4, 4)))
    assert gain == pytest.approx(published, abs=0.05)


@pytest.mark.parametrize(("name", "block"), CASES)
def test_no_transform_codes_better_than_the_klt(name, block):
    covariance = ar1_covariance(block)
    gains = [coding_gain(ready_basis(n, block).matrix, covariance) for n in ("klt", name)]
    assert gains[0] >= gains[1] - 1e-9


def test_klt_orders_by_variance_and_fixes_the_sign_of_symmetric_vectors():
    covariance = ar1_covariance((1, 8))
    matrix = klt_matrix(covariance)
    variances = (matrix @ covariance @ matrix.T).diagonal()
    torch.testing.assert_close(variances, torch.linalg.eigvalsh(covariance).flip(0))
    noise = torch.randn(8, 8, dtype=torch.float64) * 1e-13  # rounding that differs between machines
    torch.testing.assert_close(klt_matrix(covariance + noise + noise.T), matrix, atol=1e-9, rtol=0)


def test_tube_covariance_is_numpys_and_blind_to_channel_offsets():
    tubes = torch.randn(30, 2, 3, 4, 5)
    offsets = torch.tensor([40.0, -7.0])[:, None, None, None]
    expected = np.mean([np.cov(tubes[:, c].reshape(-1, 5).T, bias=True) for c in range(2)], axis=0)
    for images in (tubes, tubes + offsets):
        covariance = tube_covariance(images.split(7)).numpy()
        np.testing.assert_allclose(covariance, expected, atol=1e-4)


def test_unknown_transform_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"data\.transform.*'fourier'.*dct, dct2, dft"):
        build_basis("fourier", (2, 2))


@pytest.mark.parametrize("name", [name for name, row in TRANSFORMS.items() if row.power_of_two])
@pytest.mark.parametrize("block", [(3, 3), (2, 6)])
def test_block_that_is_no_power_of_two_names_the_transforms_that_fit(name, block):
    with pytest.raises(ConfigError, match=rf"data\.transform: {name}.*data\.block.*fits it: dct, dct2, dft"):
        build_basis(name, block)
