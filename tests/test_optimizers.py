"""Muon: its directions against the singular value decomposition, its other parameters against SGD, resumed steps."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stl_lightning.errors import ConfigError
from stl_lightning.optimizers import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 16), (1, 9)])
def test_directions_are_those_of_the_singular_vectors(shape: tuple[int, int]) -> None:
    """Singular values over two orders of magnitude come out between 0.6 and 1.3, their vectors unchanged."""
    m, n = shape
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    values = torch.logspace(-1.5, 0.5, min(shape))
    found = orthogonalise(u @ values.diag() @ v)
    inside = u.mT @ found @ v.mT
    assert inside.diag().min() > 0.6
    assert inside.diag().max() < 1.3
    assert (inside - inside.diag().diag()).abs().max() < 0.05  # bfloat16
    assert found.shape == shape
    assert found.dtype == torch.float32


def test_zeros_have_no_direction() -> None:
    assert orthogonalise(torch.zeros(4, 9)).eq(0).all()


@pytest.mark.parametrize(("n_filters", "share"), [(16, 1.0), (216, 0.5)])
def test_filters_keep_their_norm_and_move_by_the_rate(n_filters: int, share: float) -> None:
    """More filters than the 6 x 3 x 3 numbers in one cannot all be orthogonal: four times as many move half as far."""
    conv = nn.Conv2d(6, n_filters, 3, bias=False)
    step(conv, Muon(conv.parameters(), lr=0.0))
    assert conv.weight.norm().item() == pytest.approx(n_filters**0.5)
    before = conv.weight.detach().clone()
    step(conv, Muon(conv.parameters(), lr=0.1, momentum=0.0))
    moved = conv.weight - before
    assert moved.norm().item() / n_filters**0.5 == pytest.approx(0.1 * share, rel=0.3)
    assert (moved * conv.weight.grad).sum() < 0  # downhill


def test_other_parameters_step_as_with_sgd() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(24, 5), nn.BatchNorm1d(5))
    reference = copy.deepcopy(layers)
    ours = Muon(layers.parameters(), lr=0.1, other_lr=0.5, other_momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
    for seed in range(4):
        step(layers, ours, seed)
        step(reference, theirs, seed)
    for a, b in zip(layers.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_goes_on_from_its_state_to_the_bit() -> None:
    net = nn.Sequential(nn.Conv2d(6, 4, 3), nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(1, 6, 2, 2).repeat(1, 1, 2, 2))
    optimizer = Muon(net.parameters())
    step(net, optimizer)
    twin = copy.deepcopy(net)
    resumed = Muon(twin.parameters(), lr=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(net, optimizer, 1)
    step(twin, resumed, 1)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


def test_what_has_no_gradient_stays() -> None:
    conv = nn.Conv2d(2, 2, 1)
    conv.bias.requires_grad_(False)  # type: ignore[union-attr]
    before = conv.bias.detach().clone()  # type: ignore[union-attr]
    step(conv, Muon(conv.parameters()), channels=2)
    assert torch.equal(conv.bias, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"other_lr": -0.1}, {"other_momentum": -0.5}, {"weight_decay": -1e-4}]
)
def test_numbers_out_of_range_name_the_setting(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"model.optimizer.init_args.{name}: expected 0"):
        Muon(nn.Linear(2, 2).parameters(), **wrong)


def step(network: nn.Module, optimizer: Any, seed: int = 0, channels: int = 6) -> None:
    x = torch.randn(30, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = x.view(120, 24) if isinstance(network, nn.Sequential) and isinstance(network[0], nn.Flatten) else x
    optimizer.zero_grad()
    loss: Tensor = network(x).square().sum()
    loss.backward()
    optimizer.step()
