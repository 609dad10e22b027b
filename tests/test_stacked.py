"""Stacked networks against their members one after the other: outputs, gradients, statistics, optimisers, dropout.

Everything is computed in float64, where the two ways to sum differ by far less than any fault.
Letters: s branches, n samples, c channels, h w space, k classes.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from stl_lightning.networks import MLP, ConvNet, FastConvNet, ResNet
from stl_lightning.networks.common import Dropout
from stl_lightning.stacked import (
    BATCHED,
    ELEMENTWISE,
    can_stack,
    chain,
    clip_gradients,
    stack,
    stack_optimizers,
    stack_states,
    stacked_forward,
    unstack_optimizer,
    unstack_state,
)

S, N, K = 3, 6, 4
IN_SHAPE = (2, 4, 4)
N_FEATURES = 32


class Own(nn.Module):
    """A network that knows nothing of stacking: a forward of its own, a scalar weight, a buffer, a frozen weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(()))
        self.frozen = nn.Parameter(torch.rand(N_FEATURES), requires_grad=False)
        self.register_buffer("shift", torch.rand(N_FEATURES))
        self.norm = nn.BatchNorm1d(N_FEATURES)
        self.drop = Dropout(0.3)
        self.head = nn.Linear(N_FEATURES, K)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(x.flatten(1) * self.frozen + self.shift)
        return self.head(self.drop(features) + self.scale * features.tanh())


# How to make one of the layers that have a batched form; those not here need no arguments.
LAYERS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    nn.Linear: lambda: nn.Linear(N_FEATURES, N_FEATURES),
    nn.BatchNorm1d: lambda: nn.BatchNorm1d(N_FEATURES),
    Dropout: lambda: Dropout(0.4),
}


def alone(layer: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(), nn.Linear(N_FEATURES, N_FEATURES), LAYERS.get(layer, layer)())


# name -> (a network with random weights, whether it runs as batched layers)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "mlp": (lambda: MLP(IN_SHAPE, K, depth=3, width=9, batch_norm=True, dropout=0.3), True),
    "mlp-plain": (lambda: MLP(IN_SHAPE, K, depth=2), True),
    "convnet": (lambda: ConvNet(IN_SHAPE, K, widths=(3, "P", 5), dropout=0.3), False),
    "fast-convnet": (lambda: FastConvNet(IN_SHAPE, K, widths=[3, 4], dropout=0.3), False),
    "resnet": (lambda: ResNet(IN_SHAPE, K, depth=[1, 1], width=3, dropout=0.3), False),
    "own": (Own, False),
    "nested": (lambda: nn.Sequential(alone(nn.GELU)(), nn.Sequential(nn.Linear(N_FEATURES, K, bias=False))), True),
    "flatten-some": (lambda: nn.Sequential(nn.Flatten(2), nn.Flatten(1), nn.Linear(N_FEATURES, K)), False),
    "norm-unscaled": (lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(N_FEATURES, affine=False)), False),
    "norm-stateless": (
        lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(N_FEATURES, track_running_stats=False)),
        False,
    ),
    **{f"layer-{layer.__name__}": (alone(layer), True) for layer in BATCHED},
}


def networks_of(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    return [make().double() for _ in range(S)]


def batches(n_batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(S, N, *IN_SHAPE, generator=generator, dtype=torch.float64) for _ in range(n_batches)]


def assert_states_match(stacked: nn.Module, networks: Iterable[nn.Module]) -> None:
    for i, network in enumerate(networks):
        torch.testing.assert_close(unstack_state(stacked.state_dict(), i), dict(network.state_dict()))


@pytest.fixture(params=NETWORKS)
def row(request: pytest.FixtureRequest) -> tuple[Callable[[], nn.Module], bool]:
    return NETWORKS[request.param]


def test_stacking_is_undone(row: Any) -> None:
    networks = networks_of(row[0])
    before = [{name: value.clone() for name, value in network.state_dict().items()} for network in networks]
    stacked = stack(networks)
    parts = [unstack_state(stacked.state_dict(), i) for i in range(S)]
    for part, network, old in zip(parts, networks, before, strict=True):
        assert part.keys() == old.keys()
        assert all(torch.equal(part[name], old[name]) for name in old)
        assert all(torch.equal(value, old[name]) for name, value in network.state_dict().items())
    again = stack_states(parts)
    assert all(torch.equal(again[name], value) for name, value in stacked.state_dict().items())
    trainable = {name: parameter.requires_grad for name, parameter in networks[0].named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in stacked.named_parameters()} == trainable
    with torch.no_grad():
        for value in [*stacked.parameters(), *stacked.buffers()]:
            value.zero_()
    assert all(torch.equal(value, old[name]) for name, value in network.state_dict().items())


def test_which_networks_run_as_batched_layers(row: Any) -> None:
    make, is_chain = row
    network = make()
    assert (chain(network) is not None) == is_chain
    assert chain(stack([network, make()])) is None or is_chain


@pytest.mark.parametrize("training", [True, False])
def test_stacked_forward_equals_each_alone(row: Any, training: bool) -> None:
    """Logits, gradients of weights and inputs, and whatever the networks keep from one batch to the next."""
    networks = [network.train() for network in networks_of(row[0])]
    for network, x in zip(networks, batches(1)[0], strict=True):
        network(x)  # the running statistics of each its own, before they are used
    networks = [network.train(training) for network in networks]
    stacked = stack(networks)
    for x in batches(3):
        x_stacked, xs = x.clone().requires_grad_(), [part.clone().requires_grad_() for part in x]
        logits = stacked_forward(stacked, x_stacked)
        expected = [network(part) for network, part in zip(networks, xs, strict=True)]
        torch.testing.assert_close(logits, torch.stack(expected))
        logits.square().sum().backward()
        for i, (of_one, part) in enumerate(zip(expected, xs, strict=True)):
            of_one.square().sum().backward()
            torch.testing.assert_close(x_stacked.grad[i], part.grad)
        assert_states_match(stacked, networks)
    for name, parameter in stacked.named_parameters():
        for i, network in enumerate(networks):
            own = network.get_parameter(name).grad
            assert (parameter.grad is None) == (own is None), name
            if own is not None:
                torch.testing.assert_close(parameter.grad[i], own)


def test_hooks_and_own_forwards_are_not_passed_over() -> None:
    """A chain calls no `forward`: what somebody put there or around it must be run."""

    class Doubled(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    def hooked() -> nn.Module:
        network = alone(nn.ReLU)()
        network[1].register_forward_hook(lambda layer, inputs, output: -output)
        return network

    for make in (hooked, lambda: Doubled(*alone(nn.ReLU)())):
        networks = networks_of(make)
        (x,) = batches(1)
        expected = torch.stack([network(part) for network, part in zip(networks, x, strict=True)])
        torch.testing.assert_close(stacked_forward(stack(networks), x), expected)


def tied() -> nn.Module:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    return network


def unsaved() -> nn.Module:
    network = nn.Linear(4, 4)
    network.register_buffer("hidden", torch.zeros(1), persistent=False)
    return network


def test_what_cannot_be_stacked_is_known() -> None:
    assert all(can_stack(make()) for make, _ in NETWORKS.values())
    assert not can_stack(tied())
    assert not can_stack(unsaved())


# Options beside the defaults with which an optimiser keeps other state.
OPTIONS: dict[type[optim.Optimizer], list[dict[str, Any]]] = {
    optim.SGD: [{"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    optim.Adam: [{"amsgrad": True}],
    optim.AdamW: [{"amsgrad": True, "foreach": True}],
    optim.RMSprop: [{"momentum": 0.9, "centered": True}],
    optim.ASGD: [{"t0": 1, "lambd": 0.1}],
    optim.RAdam: [{"betas": (0.5, 0.6)}],
    optim.Rprop: [{"step_sizes": (1e-3, 1.0)}],
}
OPTIMIZERS = [(kind, options) for kind in ELEMENTWISE for options in [{}, *OPTIONS.get(kind, [])]]


class Trained:
    """Networks with an optimiser each, and the same networks stacked with one for all."""

    def __init__(self, kind: type[optim.Optimizer], options: dict[str, Any]) -> None:
        self.networks = networks_of(NETWORKS["own"][0])
        self.stacked = stack(self.networks)
        self.make = lambda network: kind(network.parameters(), lr=0.05, **options)
        self.apart = [self.make(network) for network in self.networks]
        self.together = self.make(self.stacked)

    def step(self, x: Tensor) -> None:
        for network, optimizer, part in zip(self.networks, self.apart, x, strict=True):
            _step(optimizer, network(part))
        _step(self.together, stacked_forward(self.stacked, x))


def _step(optimizer: optim.Optimizer, logits: Tensor) -> None:
    optimizer.zero_grad()
    logits.square().mean(-1).sum().backward()
    optimizer.step()


def named(of: tuple[type[optim.Optimizer], dict[str, Any]]) -> str:
    return "-".join([of[0].__name__, *of[1]])


@pytest.fixture(scope="module", params=OPTIMIZERS, ids=named)
def trained(request: pytest.FixtureRequest) -> Trained:
    made = Trained(*request.param)
    for x in batches(6):
        made.step(x)
    return made


def test_an_optimizer_steps_stacked_branches_as_each_alone(trained: Trained) -> None:
    assert_states_match(trained.stacked, trained.networks)
    first = networks_of(NETWORKS["own"][0])[0]
    assert not torch.allclose(first.head.weight, trained.networks[0].head.weight, rtol=1e-4)


def test_an_optimizer_state_apart_is_that_of_each_alone(trained: Trained) -> None:
    state = trained.together.state_dict()
    for i, optimizer in enumerate(trained.apart):
        torch.testing.assert_close(unstack_optimizer(state, i), optimizer.state_dict())


def test_an_optimizer_state_put_together_again_is_the_same(trained: Trained) -> None:
    state = trained.together.state_dict()
    again = stack_optimizers([unstack_optimizer(state, i) for i in range(S)])
    torch.testing.assert_close(again, state, rtol=0, atol=0)
    parts = [optimizer.state_dict() for optimizer in trained.apart]
    for i in range(S):
        torch.testing.assert_close(unstack_optimizer(stack_optimizers(parts), i), parts[i], rtol=0, atol=0)


def test_training_goes_on_from_states_taken_apart_and_put_together(trained: Trained) -> None:
    """From the states of the separate optimisers together, and from that of the stacked one apart."""
    again = copy.deepcopy(trained)
    states = copy.deepcopy([optimizer.state_dict() for optimizer in [trained.together, *trained.apart]])
    again.together, again.apart = again.make(again.stacked), [again.make(network) for network in again.networks]
    again.together.load_state_dict(stack_optimizers(states[1:]))
    for i, optimizer in enumerate(again.apart):
        optimizer.load_state_dict(copy.deepcopy(unstack_optimizer(states[0], i)))  # loading shares the counters
    undisturbed = copy.deepcopy(trained)
    for x in batches(3):
        undisturbed.step(x)
        again.step(x)
    assert_states_match(again.stacked, undisturbed.networks)
    assert_states_match(undisturbed.stacked, again.networks)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_branch_by_branch(algorithm: str) -> None:
    """Branches whose norms lie far below, near and far above the limit, one of which is not finite."""
    gradients = [torch.randn(S + 1, *shape, dtype=torch.float64) for shape in [(), (5,), (4, 3)]]
    for gradient in gradients:
        gradient *= torch.tensor([0.01, 1.0, 100.0, torch.inf]).view(-1, *[1] * (gradient.ndim - 1))
    stacked = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(stacked, gradients, strict=True):
        parameter.grad = gradient.clone()
    clip_gradients([*stacked, nn.Parameter(torch.zeros(S + 1))], 2.0, algorithm, S + 1)
    clip = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}[algorithm]
    for i in range(S + 1):
        own = [nn.Parameter(torch.zeros_like(gradient[i])) for gradient in gradients]
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient[i].clone()
        clip(own, 2.0)
        for parameter, clipped in zip(own, stacked, strict=True):
            torch.testing.assert_close(clipped.grad[i], parameter.grad, equal_nan=True)


def dropout(seed: int, p: float = 0.3) -> Dropout:
    torch.manual_seed(seed)
    return Dropout(p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dropout_zeroes_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    y = dropout(0, p)(torch.ones(200, 500, dtype=dtype))
    assert y.dtype == dtype
    share = (y == 0).double().mean()
    assert abs(share - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert torch.equal(y.unique(), torch.tensor([0, 1]).to(dtype) / (1 - p))
    of_rows = (y == 0).double().mean(1)  # binomial in each row, as draws that do not depend on each other
    assert of_rows.std() == pytest.approx((p * (1 - p) / 500) ** 0.5, rel=0.25)


def test_dropout_in_evaluation_is_the_identity_and_counts_nothing() -> None:
    layer, x = dropout(0).eval(), torch.randn(5, 7)
    assert layer(x) is x
    assert layer.calls == 0


def test_dropout_is_the_same_stacked_alone_and_resumed() -> None:
    layers = [dropout(seed) for seed in range(S)]
    stacked = stack(layers)
    for x in torch.ones(4, S, N, 3, 2, 2):
        expected = torch.stack([layer(part) for layer, part in zip(layers, x, strict=True)])
        assert torch.equal(stacked_forward(stacked, x), expected)
        torch.rand(3)  # what is drawn elsewhere has no say
    resumed = dropout(99)
    resumed.load_state_dict(layers[0].state_dict())
    assert torch.equal(resumed(x[0]), layers[0](x[0]))


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_dropout_differs_between_layers_calls_samples_and_branches() -> None:
    """Masks that share nothing: each correlation is within five deviations of zero."""
    ones = torch.ones(2, 100, 100)
    first, second = dropout(0), dropout(1)
    a, b, other = first(ones), first(ones), second(ones)
    masks = stacked_forward(stack([dropout(2), dropout(3)]), ones)
    pairs = [(a, b), (a, other), (a[0], a[1]), (a[:, 1:], a[:, :-1]), (a[..., 1:], a[..., :-1]), tuple(masks)]
    for one, another in pairs:
        assert abs(correlation(one, another)) < 5 / one.numel() ** 0.5


def test_dropout_masks_of_many_calls_are_uniform_at_every_position() -> None:
    layer = dropout(0, 0.5)
    kept = torch.stack([layer(torch.ones(4, 50)) for _ in range(400)]).gt(0).double().mean(0)
    assert (kept - 0.5).abs().max() < 5 * 0.5 / 400**0.5


def test_making_and_calling_dropout_draws_from_the_global_generator_once() -> None:
    """Only the key, when the layer is made: a mask must not shift what other layers start with."""
    layer = dropout(0)
    state = torch.get_rng_state()
    layer(torch.ones(9, 9))
    assert torch.equal(torch.get_rng_state(), state)
