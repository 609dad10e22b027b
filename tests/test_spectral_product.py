"""The algebra: the t-product, the structure of the dense matrix, and when branches are separate networks."""

import pytest
import scipy.fft
import torch
from torch import Tensor, nn

from stl_lightning.errors import ConfigError
from stl_lightning.spectral import (
    TRANSFORMS,
    SpectralConv2d,
    SpectralLinear,
    build_basis,
    from_spectral,
    structured_matrix,
    tensor_product,
    to_spectral,
    unitary_dft,
)

B, M, N, P = 8, 3, 2, 4  # slices, rows, columns of a; columns of x
DATA_FREE = [name for name, row in TRANSFORMS.items() if row.fit is None]
MATRICES = {name: build_basis(name, (1, B)).matrix for name in DATA_FREE} | {"unitary_dft": unitary_dft(B)}
RANDOM = MATRICES["random"]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


def operands() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(M, N, B, generator=generator, dtype=torch.float64),
        torch.randn(N, P, B, generator=generator, dtype=torch.float64),
    )


def block_grid(dense: Tensor) -> Tensor:
    """(b*m, b*n) -> (b, b, m, n): block (i, j) of the dense matrix."""
    return dense.unflatten(1, (B, N)).unflatten(0, (B, M)).permute(0, 2, 1, 3)


def cross_difference(grid: Tensor) -> Tensor:
    """Vanishes inside a grid t(i-j) + h(i+j), and only there: north + south - west - east."""
    return grid[:-2, 1:-1] + grid[2:, 1:-1] - grid[1:-1, :-2] - grid[1:-1, 2:]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_to_spectral_is_undone_by_from_spectral(matrix, dim):
    x = torch.randn(B, B, B, dtype=torch.float64)
    torch.testing.assert_close(from_spectral(to_spectral(x, matrix, dim), matrix, dim).real, x)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_to_spectral_is_scipys_dct_and_torchs_fft_along_the_dimension(dim):
    x = torch.randn(B, B, B, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), norm="ortho", axis=dim))
    torch.testing.assert_close(to_spectral(x, MATRICES["dct"], dim), expected)
    torch.testing.assert_close(to_spectral(x, unitary_dft(B), dim), torch.fft.fft(x, dim=dim, norm="ortho"))


@pytest.mark.parametrize("matrix", MATRICES.values(), ids=MATRICES)
def test_dense_matrix_is_the_product(matrix):
    a, x = operands()
    stacked = structured_matrix(a, matrix) @ x.movedim(-1, 0).flatten(0, 1).to(matrix.dtype)
    torch.testing.assert_close(stacked.unflatten(0, (B, M)).movedim(0, -1), tensor_product(a, x, matrix))


def test_product_under_the_dft_is_the_t_product():
    a, x = operands()
    circular = torch.zeros(M, P, B, dtype=torch.float64)
    for i in range(B):
        for j in range(B):
            circular[..., (i + j) % B] += a[..., i] @ x[..., j]
    product = tensor_product(a, x, unitary_dft(B)) * B**0.5
    torch.testing.assert_close(product.real, circular)
    assert product.imag.abs().max() < 1e-12


def test_dense_matrix_is_block_circulant_for_the_dft_and_for_no_other():
    for name, matrix in MATRICES.items():
        grid = block_grid(structured_matrix(operands()[0], matrix))
        is_circulant = torch.allclose(grid, grid.roll((1, 1), (0, 1)))
        assert is_circulant == (name == "unitary_dft")


def test_dense_matrix_is_block_toeplitz_plus_hankel_for_the_dct_and_not_in_general():
    a, _ = operands()
    grid = block_grid(structured_matrix(a, MATRICES["dct"]))
    assert cross_difference(grid).abs().max() < 1e-12
    assert cross_difference(block_grid(structured_matrix(a, RANDOM))).abs().max() > 0.1
    assert not torch.allclose(grid[1:, 1:], grid[:-1, :-1])  # the Hankel part is there


@pytest.mark.parametrize("domain", ["spectral", "original"])
def test_dense_matrix_is_the_linear_layer(domain):
    layer = SpectralLinear(N, M, RANDOM, bias=False, domain=domain)
    a = from_spectral(layer.weight.detach().permute(1, 2, 0), layer.matrix)
    dense = structured_matrix(a, layer.matrix)
    x = torch.randn(5, B, N)
    if domain == "original":
        expected = x.flatten(1) @ dense.T
    else:
        original = from_spectral(x, layer.matrix, 1).flatten(1) @ dense.T
        expected = to_spectral(original.unflatten(1, (B, M)), layer.matrix, 1).flatten(1)
    torch.testing.assert_close(layer(x).flatten(1), expected)
    assert layer.weight.numel() == M * N * B


@pytest.mark.parametrize("bias", [True, False])
def test_layers_are_b_ordinary_layers(bias):
    linear = SpectralLinear(N, M, RANDOM, bias)
    conv = SpectralConv2d(N, M, 3, RANDOM, bias, stride=2, padding=1)
    vectors, images = torch.randn(5, B, N), torch.randn(5, B, N, 7, 6)
    for b in range(B):
        offset = linear.bias[b] if bias else None
        expected = nn.functional.linear(vectors[:, b], linear.weight[b], offset)
        torch.testing.assert_close(linear(vectors)[:, b], expected)
        offset = conv.bias[b] if bias else None
        expected = nn.functional.conv2d(images[:, b], conv.weight[b], offset, stride=2, padding=1)
        torch.testing.assert_close(conv(images)[:, b], expected)


def test_conv_in_the_original_domain_is_the_spectral_one_between_transforms():
    original = SpectralConv2d(N, M, 3, RANDOM, domain="original", padding=1)
    spectral = SpectralConv2d(N, M, 3, RANDOM, padding=1)
    spectral.load_state_dict(original.state_dict())
    x = torch.randn(2, B, N, 5, 4)
    matrix = original.matrix
    expected = from_spectral(spectral(to_spectral(x, matrix, 1)), matrix, 1)
    torch.testing.assert_close(original(x), expected)


def test_initial_weights_have_the_spread_of_ordinary_layers():
    pairs = [
        (SpectralLinear(50, 60, RANDOM), [nn.Linear(50, 60) for _ in range(B)]),
        (SpectralConv2d(8, 60, 3, RANDOM), [nn.Conv2d(8, 60, 3) for _ in range(B)]),
    ]
    for layer, ordinary in pairs:
        for name, ours in layer.named_parameters():
            theirs = torch.stack([network.get_parameter(name) for network in ordinary])
            assert ours.shape == theirs.shape
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
            assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=0.02)


def stack(domain: str) -> nn.Sequential:
    """Two tensor layers with a ReLU that stands in the domain of the layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        SpectralLinear(N, 5, RANDOM, domain=domain), nn.ReLU(), SpectralLinear(5, M, RANDOM, domain=domain)
    )


def off_diagonal_blocks(network: nn.Module, domain: str) -> float:
    """Largest derivative of one output slice by another input slice, both seen in the transform domain."""
    matrix = RANDOM.float()

    def in_spectra(spectrum: Tensor) -> Tensor:
        if domain == "spectral":
            return network(spectrum[None])[0]
        return to_spectral(network(from_spectral(spectrum, matrix, 0)[None])[0], matrix, 0)

    jacobian = torch.autograd.functional.jacobian(in_spectra, torch.randn(B, N))  # (b, m, b, n)
    size = jacobian.abs().amax((1, 3))
    assert (size.diagonal() > 0).all(), "a slice that is dead would make this test pass for nothing"
    return (size - size.diagonal().diag()).max().item()


def test_relu_in_the_spectral_domain_keeps_branches_apart_and_after_the_inverse_couples_them():
    assert off_diagonal_blocks(stack("spectral"), "spectral") == 0
    assert off_diagonal_blocks(stack("original"), "original") > 0.01


def test_without_a_nonlinearity_the_two_domains_are_one_network():
    networks = [nn.Sequential(stack(domain)[0], stack(domain)[2]) for domain in ("spectral", "original")]
    x = torch.randn(4, B, N)
    matrix = RANDOM.float()
    expected = from_spectral(networks[0](to_spectral(x, matrix, 1)), matrix, 1)
    torch.testing.assert_close(networks[1](x), expected)


def branch(network: nn.Sequential, b: int) -> nn.Sequential:
    """Slice b of a spectral stack as an ordinary network with its own parameters."""
    layers = [nn.Linear(N, 5), nn.ReLU(), nn.Linear(5, M)]
    for ordinary, joint in zip(layers[::2], [network[0], network[2]], strict=True):
        ordinary.load_state_dict({"weight": joint.weight[b], "bias": joint.bias[b]})
    return nn.Sequential(*layers)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("loss", "separates"), [("of branches", True), ("of the sum", False)])
def test_joint_training_on_summed_branch_losses_is_separate_training(optimizer, loss, separates):
    joint = stack("spectral")
    branches = [branch(joint, b) for b in range(B)]
    x, labels = torch.randn(16, B, N), torch.randint(M, (16,))
    step = optimizer(joint.parameters(), lr=0.05)
    steps = [optimizer(network.parameters(), lr=0.05) for network in branches]
    for _ in range(3):
        outputs = joint(x)
        step.zero_grad()
        if loss == "of branches":
            sum(nn.functional.cross_entropy(outputs[:, b], labels) for b in range(B)).backward()
        else:
            nn.functional.cross_entropy(outputs.sum(1), labels).backward()
        step.step()
        for b, network in enumerate(branches):
            steps[b].zero_grad()
            nn.functional.cross_entropy(network(x[:, b]), labels).backward()
            steps[b].step()
    after = torch.stack([network(x[:, b]) for b, network in enumerate(branches)], 1)
    assert torch.allclose(joint(x), after, atol=1e-4) == separates


def test_layers_refuse_what_is_not_a_transform():
    unfitted = build_basis("klt", (2, 2)).matrix
    for matrix in (
        torch.ones(3, 3),
        torch.eye(3)[:2],
        unitary_dft(4),
        torch.eye(3, dtype=torch.int64),
        unfitted,
    ):
        with pytest.raises(ConfigError, match=r"matrix: expected a real orthonormal"):
            SpectralLinear(2, 2, matrix)
    with pytest.raises(ConfigError, match=r"domain.*'frequency'.*original, spectral"):
        SpectralConv2d(2, 2, 3, RANDOM, domain="frequency")
