"""The ensemble as a module gives what its branches give one by one, however they are put together."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from stl_lightning.ensemble.fit import FittedEnsemble
from stl_lightning.ensemble.model import PART, SpectralEnsemble
from stl_lightning.networks import MLP, ConvNet, ResNet
from stl_lightning.slices import slices_of_branch
from stl_lightning.spectral import SpectralSplit

K = 5
Network = Callable[[tuple[int, int, int]], nn.Module]


def mlp(in_shape: tuple[int, int, int]) -> nn.Module:
    return MLP(in_shape, K, depth=3, width=17)


def norm_mlp(in_shape: tuple[int, int, int]) -> nn.Module:
    return MLP(in_shape, K, depth=3, width=17, batch_norm=True, dropout=0.5)


def convnet(in_shape: tuple[int, int, int]) -> nn.Module:
    return ConvNet(in_shape, K, widths=(4, "P", 8), dropout=0.5)


def resnet(in_shape: tuple[int, int, int]) -> nn.Module:
    return ResNet(in_shape, K, depth=[1, 1], width=4)


def leaky(slope: float) -> Network:
    """Networks whose state dicts look the same and whose options differ."""

    def network(in_shape: tuple[int, int, int]) -> nn.Module:
        n_inputs = torch.Size(in_shape).numel()
        return nn.Sequential(nn.Flatten(), nn.Linear(n_inputs, 9, bias=False), nn.LeakyReLU(slope), nn.Linear(9, K))

    return network


def rowwise(in_shape: tuple[int, int, int]) -> nn.Module:
    """A chain of known layers, the first of which sees the slice as an image."""
    c, h, w = in_shape
    return nn.Sequential(nn.Linear(w, 3), nn.ReLU(), nn.Flatten(), nn.Linear(c * h * 3, K))


def hooked(in_shape: tuple[int, int, int]) -> nn.Module:
    network = MLP(in_shape, K, depth=3, width=17)
    network[1].register_forward_hook(lambda layer, args, output: 2 * output)
    return network


@dataclass(frozen=True)
class Case:
    """Members take the networks in turn; branch m reads its slice and others until there are `slices_per_branch`."""

    networks: tuple[Network, ...]
    n_groups: int
    transform: str = "dct2"
    channels: int = 3
    slices_per_branch: int = 1
    members: tuple[int, ...] | None = None


CASES = {
    "mlp": Case((mlp,), 1),
    "one channel": Case((mlp,), 1, channels=1),
    "batch norm, dropout": Case((norm_mlp,), 1),
    "convnet": Case((convnet,), 4),
    "resnet": Case((resnet,), 4),
    "interleaved": Case((mlp, convnet, norm_mlp, mlp), 3),
    "dft": Case((mlp,), 2, transform="dft"),
    "several slices": Case((mlp, resnet), 3, slices_per_branch=3),
    "several slices, dft": Case((mlp,), 2, transform="dft", slices_per_branch=2, members=(0, 2)),
    "some members": Case((mlp,), 1, members=(3, 1)),
    "one member": Case((mlp,), 1, members=(2,)),
    "other options": Case((leaky(0.1), leaky(0.2)), 2),
    "slices as rows": Case((rowwise,), 4),
    "hooks": Case((hooked, mlp), 3),
}
SAMPLES = (1, 40, PART + 40)


@dataclass
class Parts:
    """What an ensemble is made of."""

    spectral: SpectralSplit
    slices: list[tuple[int, ...]]
    statistics: list[tuple[Tensor, Tensor]]
    branches: list[nn.Module]
    fitted: FittedEnsemble

    def model(self) -> SpectralEnsemble:
        model = SpectralEnsemble(self.spectral, self.slices, self.statistics, self.branches, self.fitted)
        return model.eval().requires_grad_(False)

    def one_by_one(self, images: Tensor) -> Tensor:
        """The logits (b, n, k) of one member after the other, each in the plain way."""
        slices = self.spectral(images)
        logits = []
        for ks, (mean, std), branch in zip(self.slices, self.statistics, self.branches, strict=True):
            x = torch.cat([slices[k] for k in ks], 1)
            logits.append(branch((x - mean) / std))
        return torch.stack(logits)


def scatter(network: nn.Module) -> nn.Module:
    """As after training: every weight and every running statistic its own."""
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value += 0.1 * torch.rand_like(value) * (1 if "var" in name else torch.randn_like(value))
    return network.eval().requires_grad_(False)


def parts(case: Case, seed: int = 0) -> Parts:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spectral = SpectralSplit((case.channels, 12, 12), 2, "polyphase", case.transform)
        members = case.members or tuple(range(spectral.n_slices))
        slices = [slices_of_branch(member, case.slices_per_branch, spectral.n_slices) for member in members]
        widths = [sum(spectral.slice_shape(k)[0] for k in ks) for ks in slices]
        statistics = [(torch.randn(c, 1, 1), 0.5 + torch.rand(c, 1, 1)) for c in widths]
        networks = [case.networks[i % len(case.networks)] for i in range(len(members))]
        branches = [scatter(network((c, 6, 6))) for network, c in zip(networks, widths, strict=True)]
        weights = torch.rand(len(members), dtype=torch.float64)
        return Parts(
            spectral, slices, statistics, branches, FittedEnsemble("simplex", "log_prob", weights, 1.3, members, ())
        )


def images(n: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, channels, 12, 12), generator=generator, dtype=torch.uint8)


def assert_same(received: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(received, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("n", SAMPLES)
def test_members_together_equal_members_one_by_one(name: str, n: int) -> None:
    case = CASES[name]
    made_of = parts(case)
    model, pixels = made_of.model(), images(n, case.channels)
    expected = made_of.one_by_one(pixels / 255)
    assert_same(model.member_logits(pixels), expected)
    assert_same(model.member_logits(pixels / 255), expected)
    assert_same(model(pixels), made_of.fitted.log_probs(expected))


@pytest.mark.parametrize("of_images", [torch.uint8, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_model", [torch.bfloat16, torch.float32, torch.float64])
def test_images_of_any_precision_are_taken(of_images: torch.dtype, of_model: torch.dtype) -> None:
    made_of, pixels = parts(CASES["interleaved"]), images(3, 3)
    expected = made_of.model()(pixels)
    received = made_of.model().to(of_model)(pixels if of_images == torch.uint8 else (pixels / 255).to(of_images))
    atol = 0.2 if of_model == torch.bfloat16 else 2e-3 if of_images == torch.float16 else 1e-5
    torch.testing.assert_close(received.float(), expected.float(), atol=atol, rtol=1e-5)


def test_flips_average_the_logits_of_an_image_and_its_mirror_image() -> None:
    made_of, pixels = parts(CASES["interleaved"]), images(40, 3)
    plain, mirrored = (made_of.one_by_one(x / 255) for x in (pixels, pixels.flip(-1)))
    made_of.fitted = replace(made_of.fitted, flips=True)
    model = made_of.model()
    assert_same(model.member_logits(pixels), (plain + mirrored) / 2)
    assert_same(model(pixels), model(pixels.flip(-1)))
    assert not torch.allclose(plain, mirrored, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_what_can_be_one_network_is(name: str) -> None:
    assert len(parts(CASES[name]).model().groups) == CASES[name].n_groups


@pytest.mark.parametrize("name", CASES)
def test_the_state_of_an_ensemble_goes_into_another(name: str) -> None:
    """Also through a change of precision and back, which, like a change of device, replaces every tensor."""
    case = CASES[name]
    one, other, pixels = parts(case).model(), parts(case, seed=1).model(), images(40, case.channels) / 255
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.member_logits(pixels), one.member_logits(pixels))
    wide = other.double()
    assert wide.member_logits(pixels.double()).dtype == torch.float64
    assert_same(wide.float().member_logits(pixels), one.member_logits(pixels))


@pytest.mark.parametrize("name", CASES)
def test_a_copy_stands_alone(name: str) -> None:
    case = CASES[name]
    model, pixels = parts(case).model(), images(40, case.channels)
    before = model.member_logits(pixels)
    twin = copy.deepcopy(model)
    assert torch.equal(twin.member_logits(pixels), before)
    for parameter in twin.parameters():
        parameter.zero_()
    assert not torch.equal(twin.member_logits(pixels), before)
    assert torch.equal(model.member_logits(pixels), before)


@pytest.mark.parametrize("name", ["mlp", "interleaved"])
def test_gradients_reach_the_pixels(name: str) -> None:
    case = CASES[name]
    made_of, pixels = parts(case), (images(40, case.channels) / 255).requires_grad_()
    together, one_by_one = made_of.model()(pixels), made_of.fitted.log_probs(made_of.one_by_one(pixels))
    (expected,) = torch.autograd.grad(one_by_one[:, 0].sum(), pixels)
    (received,) = torch.autograd.grad(together[:, 0].sum(), pixels)
    assert_same(received, expected)
