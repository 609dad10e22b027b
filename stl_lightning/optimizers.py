"""Muon for convolution networks: filters step along orthogonal directions, all other parameters as with SGD."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stl_lightning.errors import ConfigError

# Applied five times, x -> a x + b x^3 + c x^5 takes every singular value from 0.01 to 1 to between 0.6 and 1.3.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Optimizer):
    """Steps filters by their orthogonalised momentum at a fixed norm; other parameters step as in torch.optim.SGD.

    Singular values of a gradient differ by orders of magnitude, so in the few steps that a branch has most directions
    of a filter bank would hardly move; orthogonalised, all move alike. `torch.optim.Muon` takes matrices only.

    Args:
        params: Parameters of a network. Those of four dimensions are filters (o, i, h, w), seen as matrices (o, i h w).
        lr: Length of a step of the filters over their norm, sqrt(o), where o <= i h w; where there are more filters
            than numbers in one, the step is shorter by sqrt(i h w / o).
        momentum: Of the filters, with Nesterov's look ahead.
        other_lr: Learning rate of the other parameters as a multiple of `lr`: one schedule serves both.
        other_momentum: Of the other parameters, with Nesterov's look ahead.
        weight_decay: Of the other parameters.

    Raises: ConfigError for a number out of range.
    Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks", as used in airbench94_muon.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 0.1,
        momentum: float = 0.6,
        other_lr: float = 1.0,
        other_momentum: float = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        options = {
            "lr": lr, "momentum": momentum, "other_lr": other_lr, "other_momentum": other_momentum,
            "weight_decay": weight_decay,
        }  # fmt: skip
        for name, value in options.items():
            limit = 1.0 if "momentum" in name else math.inf
            if not 0 <= value < limit:
                raise ConfigError(f"model.optimizer.init_args.{name}: expected 0 <= value < {limit}, got {value}")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "the module calls it with gradients in place"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._step_filters if parameter.ndim == 4 else self._step_other)(parameter, group)

    def _step_filters(self, parameter: Tensor, group: dict[str, Any]) -> None:
        ahead = self._look_ahead(parameter, parameter.grad, group["momentum"])
        parameter.mul_(len(parameter) ** 0.5 / parameter.norm().clamp(min=1e-12))
        parameter.sub_(orthogonalise(ahead.flatten(1)).view(parameter.shape), alpha=group["lr"])

    def _step_other(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad.add(parameter, alpha=group["weight_decay"])  # type: ignore[union-attr]
        ahead = self._look_ahead(parameter, gradient, group["other_momentum"])
        parameter.sub_(ahead, alpha=group["lr"] * group["other_lr"])

    def _look_ahead(self, parameter: Tensor, gradient: Any, momentum: float) -> Tensor:
        """The gradient after one more step of the momentum (Nesterov), which it advances."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer: Tensor = state["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient.add(buffer, alpha=momentum)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows (or columns, if there are fewer), roughly: singular values 0.6 to 1.3.

    Equivalent: U V^T of the singular value decomposition U S V^T.
    Shapes: (m, n) -> the same. In bfloat16 inside, which is precise enough for a direction.
    Source: Jordan 2024; a Newton-Schulz iteration whose slope at 0 is steep.
    """
    x = matrix.bfloat16()
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)
