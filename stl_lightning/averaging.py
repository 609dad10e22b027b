"""The moving average of a network's weights over the steps of its training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from stl_lightning.errors import ConfigError


def check_averaging(decay: float | None) -> None:
    """Raises: ConfigError unless the decay is at least 0 and below 1, or null."""
    if decay is not None and not 0.0 <= decay < 1.0:
        raise ConfigError(f"model.averaging: expected a decay of at least 0 and below 1, or null; got {decay}")


def decay_at(step: int, decay: float) -> float:
    """The decay of a step, counted from 0: small at first, so that the average soon forgets the random weights.

    Source: Abadi et al. 2016, the start-up of `tf.train.ExponentialMovingAverage` with `num_updates`.
    """
    return min(decay, (1 + step) / (10 + step))


class Averages:
    """The exponential moving average of the weights and buffers of a network, each number by itself.

    Equivalent: `torch.optim.swa_utils.AveragedModel` with `get_ema_multi_avg_fn`, the statistics of BatchNorm included
    and the decay as `decay_at` says. Integers, such as counters, are not averaged but taken from the network.

    `values` have the names and shapes of the network's state dict, in float32 at least: in bfloat16, a small step
    towards the weights would be rounded away. Stacked over s branches they are (s, ...), and no branch sees another.
    """

    def __init__(self, network: nn.Module, decay: float, values: dict[str, Tensor] | None = None) -> None:
        self.decay = decay
        self.are_in_place = False
        self._places = _places(network)
        if values is None:
            values = {name: _wide(value).clone() for name, value in self._current().items()}
        self.values = {name: values[name].to(now.device) for name, now in self._current().items()}

    def update(self, step: int) -> None:
        """Move towards the weights after a step, of which `step` were made before."""
        average = get_ema_multi_avg_fn(decay_at(step, self.decay))
        average(list(self.values.values()), [_wide(value) for value in self._current().values()], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the network has the averages for weights; afterwards its own again, to the bit."""
        current = self._current()
        own = {name: value.clone() for name, value in current.items()}
        _copy(self.values, current)
        self.are_in_place = True
        try:
            yield
        finally:
            _copy(own, current)
            self.are_in_place = False

    def _current(self) -> dict[str, Tensor]:
        # Looked up each time, for a layer may replace a buffer; by place, since a state dict takes longer to list.
        return {name: getattr(owner, leaf).detach() for name, (owner, leaf) in self._places.items()}


def _places(network: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where the numbers of a network are that can be averaged: name in the state dict -> module, attribute."""
    state = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    averaged = [name for name, value in state.items() if value.is_floating_point() or value.is_complex()]
    parts = {name: name.rpartition(".") for name in averaged}
    return {name: (network.get_submodule(owner), leaf) for name, (owner, _, leaf) in parts.items()}


def _wide(value: Tensor) -> Tensor:
    """In float32 at least."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in target.items():
        value.copy_(source[name])
