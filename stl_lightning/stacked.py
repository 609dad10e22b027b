"""Branches of one architecture as one network: parameters stacked, one kernel for all, nothing shared.

A stacked network is a module of the same class as its members, whose parameters and buffers (s, ...) hold those of
branch i at [i]. It is called through `stacked_forward`. The loss is the sum of the branches' losses, so the gradient of
branch i is its own, and every optimiser in `ELEMENTWISE` then steps each branch as it would step it alone.

Letters: s branches, n samples, f features, c channels, h w space, k classes.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.func import functional_call, vmap

from stl_lightning.networks.common import Dropout

# Optimisers that treat each number of a parameter alone: stacking does not change what they do to it.
ELEMENTWISE = (
    optim.Adadelta, optim.Adagrad, optim.Adam, optim.Adamax, optim.AdamW, optim.ASGD, optim.NAdam, optim.RAdam,
    optim.RMSprop, optim.Rprop, optim.SGD,
)  # fmt: skip
COUNTERS = ("step", "mu_product", "eta", "mu")  # what these optimisers keep a parameter and not a number


def stack(networks: Sequence[nn.Module]) -> nn.Module:
    """One network whose parameters and buffers are those of `networks`, stacked; undone by `unstack_state`."""
    stacked = copy.deepcopy(networks[0])
    states = [network.state_dict(keep_vars=True) for network in networks]
    with torch.no_grad():
        for name, own in stacked.state_dict(keep_vars=True).items():
            owner, _, leaf = name.rpartition(".")
            values = torch.stack([state[name] for state in states])
            is_parameter = isinstance(own, nn.Parameter)
            setattr(
                stacked.get_submodule(owner), leaf, nn.Parameter(values, own.requires_grad) if is_parameter else values
            )
    return stacked


def can_stack(network: nn.Module) -> bool:
    """Whether all of a network is in its state dict, once: what is not there could not be stacked."""
    names = [name for name, _ in [*network.named_parameters(), *network.named_buffers()]]
    return sorted(names) == sorted(network.state_dict())


def describe(network: nn.Module) -> str:
    """A text that is equal for two networks only if they are the same program on weights of the same shapes.

    What a layer prints, the shapes, and every other attribute of its own, in which branches may differ as well.
    """
    shapes = [(name, tuple(value.shape)) for name, value in network.state_dict().items()]
    attributes = [
        (name, key, id(value) if isinstance(value, Tensor) else repr(value))
        for name, layer in network.named_modules()
        for key, value in vars(layer).items()
        if not key.startswith("_")
    ]
    return f"{network} {shapes} {attributes}"


def stacked_forward(network: nn.Module, x: Tensor) -> Tensor:
    """Apply branch i of a stacked network to x[i].

    A chain of the layers in `BATCHED` runs as batched matrix products; any other network through `torch.func.vmap`,
    which costs a few microseconds more a layer.
    Shapes: (s, n, c, h, w) -> logits (s, n, k).
    """
    layers = chain(network)
    if layers is None:
        state = dict(network.named_parameters()) | dict(network.named_buffers())
        return vmap(lambda of_one, x_one: functional_call(network, of_one, (x_one,)), randomness="different")(state, x)
    return run_chain(layers, x)


def run_chain(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Apply the layers of a stacked chain. Shapes: (s, n, c, h, w) -> (s, n, k)."""
    for layer in layers:
        x = BATCHED[type(layer)](layer, x)
    return x


def chain(network: nn.Module) -> list[nn.Module] | None:
    """The layers of a network that flattens a slice and then is a sequence of those in `BATCHED`; otherwise None."""
    layers = _layers(network)
    return layers if layers and isinstance(layers[0], nn.Flatten) else None


def _layers(network: nn.Module) -> list[nn.Module] | None:
    if type(network) in BATCHED:
        return [network] if _is_ordinary(network) else None
    if not isinstance(network, nn.Sequential) or type(network).forward is not nn.Sequential.forward:
        return None
    parts = [_layers(layer) for layer in network]
    return None if None in parts else [layer for part in parts if part for layer in part]


def _is_ordinary(layer: nn.Module) -> bool:
    """Without hooks, and with the options that the batched form knows."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    return not isinstance(layer, nn.BatchNorm1d) or (
        layer.affine and layer.track_running_stats and bool(layer.momentum)
    )


MANY_SAMPLES = 32  # from here on the transposed product is the faster one


def _linear(layer: Any, x: Tensor) -> Tensor:
    """(s, n, f_in) -> (s, n, f_out), for many samples kept in memory as (s, f_out, n).

    The innermost loop of the product then runs over n, not over f_out: 49 features leave vector registers half empty.
    """
    if x.shape[1] < MANY_SAMPLES:
        weight = layer.weight.mT
        return x @ weight if layer.bias is None else torch.baddbmm(layer.bias[:, None], x, weight)
    product = layer.weight @ x.mT if layer.bias is None else torch.baddbmm(layer.bias[..., None], layer.weight, x.mT)
    return product.mT


def _batch_norm(layer: Any, x: Tensor) -> Tensor:
    """Statistics over n, where the features of all branches stand side by side: (s, n, f) as (1, s f, n).

    In that order they lie in memory behind `_linear`: the inner loops, of the backward pass too, run over n.
    """
    if layer.training:
        layer.num_batches_tracked.add_(1)
    mean, var, weight, bias = (t.view(-1) for t in (layer.running_mean, layer.running_var, layer.weight, layer.bias))
    flat = x.mT.reshape(1, -1, x.shape[1])
    y = F.batch_norm(flat, mean, var, weight, bias, layer.training, layer.momentum, layer.eps)
    return y.view(x.mT.shape).mT


def _same(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer that treats each number alone, or knows of the leading dimension itself."""
    return layer(x)


POINTWISE = (Dropout, nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
BATCHED: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    nn.Flatten: lambda layer, x: x.flatten(2),
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    **dict.fromkeys(POINTWISE, _same),
}


def unstack_state(state: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    """The state dict of branch i from that of a stacked network; undone by `stack_states`.

    Copies: a file or a deep copy of a view holds all that it is a view of.
    """
    return {name: value[i].clone() for name, value in state.items()}


def stack_states(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The state dict of the stacked network from those of its branches."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def unstack_optimizer(state: dict[str, Any], i: int) -> dict[str, Any]:
    """The optimiser state of branch i from that of stacked parameters, copied; undone by `stack_optimizers`."""
    return state | {"state": {n: _each(of, lambda key, value: value[i].clone()) for n, of in state["state"].items()}}


def stack_optimizers(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The optimiser state of the stacked parameters from those of the branches."""

    def of_parameter(number: int) -> dict[str, Any]:
        of_branches = [state["state"][number] for state in states]
        return _each(of_branches[0], lambda key, _: torch.stack([of[key] for of in of_branches]))

    return states[0] | {"state": {number: of_parameter(number) for number in states[0]["state"]}}


def _each(state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
    """The state of one parameter with its tensors changed, those aside that are the same for all branches."""
    return {
        key: value if key in COUNTERS or not isinstance(value, Tensor) else change(key, value)
        for key, value in state.items()
    }


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float, algorithm: str, n_branches: int) -> None:
    """Clip the gradients of each branch by its own norm, or by value.

    Equivalent: `torch.nn.utils.clip_grad_norm_` (clip_grad_value_) on the parameters of one branch after another.
    Shapes: parameters (s, ...) for s = n_branches > 1, without that dimension for one branch.
    """
    if algorithm == "value" or n_branches == 1:
        (nn.utils.clip_grad_value_ if algorithm == "value" else nn.utils.clip_grad_norm_)(parameters, limit)
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(n_branches, -1), dim=1) for g in gradients]).norm(dim=0)
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
