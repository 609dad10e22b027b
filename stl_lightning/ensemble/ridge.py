"""More weights than one a member, shrunk towards the simplex weights as held-out samples advise.

Axes: b members, n samples, k classes (j: classes of the pooled prediction). All in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stl_lightning.ensemble.metrics import nll
from stl_lightning.ensemble.pooling import Space, calibrated_nll, combine, fit_temperature
from stl_lightning.ensemble.simplex import minimise_on_simplex, pooled_nll

RIDGES = (1000.0, 100.0, 10.0, 1.0)  # from the simplex weights to almost free, in samples per (1 / b)^2
HELD_OUT = 4  # one sample in so many judges the ridge
MAX_STEPS, CHANGE_NATS = 50, 1e-6  # where L-BFGS stops: far finer than what samples can tell


@dataclass(frozen=True)
class Family:
    """A kind of weights: where shrinking leads, and unconstrained parameters that express it."""

    centre: Callable[[Tensor, int], Tensor]  # from simplex weights (b,) and the number of classes
    parameters: Callable[[Tensor], Tensor]  # near `centre`; `weights` is the way back
    weights: Callable[[Tensor], Tensor]


def _class_centre(simplex: Tensor, n_classes: int) -> Tensor:
    return simplex[:, None].repeat(1, n_classes)


def _root(weights: Tensor) -> Tensor:
    """Square root; zeros are lifted first, because the derivative of the square would hold them at zero."""
    return weights.clamp(min=0.01 / len(weights)).sqrt()


def _map_centre(simplex: Tensor, n_classes: int) -> Tensor:
    identity = torch.eye(n_classes, n_classes + 1, dtype=simplex.dtype, device=simplex.device)
    return simplex[:, None, None] * identity


CLASS_WEIGHTS = Family(_class_centre, _root, torch.square)  # (b, k), not negative
AFFINE_MAPS = Family(_map_centre, torch.clone, torch.clone)  # (b, j, k + 1)


class Shrinkage:
    """Minimises NLL + ridge b^2 / (2 n) |weights - centre|^2 for one family on one set of samples.

    The prediction is tempered by what suits the centre; otherwise the weights would have to grow or shrink as
    a whole to calibrate it, against the ridge.
    """

    def __init__(self, logits: Tensor, labels: Tensor, space: Space, family: Family) -> None:
        b, _, k = logits.shape
        simplex = minimise_on_simplex(pooled_nll(space, logits, labels), logits.new_full((b,), 1 / b))
        # Memory in the order b, k, n makes the products of the loop about twice as fast.
        self.outputs = space.encode(logits).transpose(1, 2).contiguous().transpose(1, 2)
        self.labels, self.space, self.family = labels, space, family
        self.centre = family.centre(simplex, k)
        # A mixture of probabilities has no scale to set: it is normalised.
        centre = space.decode(combine(self.outputs, simplex))
        self.temperature = fit_temperature(centre, labels) if space.log_linear else 1.0

    def loss(self, weights: Tensor, ridge: float) -> Tensor:
        """The penalised NLL of weights of this family."""
        b, n, _ = self.outputs.shape
        pooled = self.space.decode(combine(self.outputs, weights) / self.temperature)
        penalty = ridge * b**2 / (2 * n) * (weights - self.centre).square().sum()
        return nll(pooled, self.labels) + penalty

    def minimise(self, ridge: float, start: Tensor) -> Tensor:
        """Weights of (nearly) the lowest loss, by L-BFGS from the weights `start`."""
        parameters = self.family.parameters(start).requires_grad_()
        optimiser = torch.optim.LBFGS(
            [parameters], max_iter=MAX_STEPS, tolerance_change=CHANGE_NATS, line_search_fn="strong_wolfe"
        )

        def loss_and_gradient() -> float:
            loss = self.loss(self.family.weights(parameters), ridge)
            (parameters.grad,) = torch.autograd.grad(loss, parameters)
            return loss.item()

        optimiser.step(loss_and_gradient)
        return self.family.weights(parameters.detach())


def shrunk_weights(logits: Tensor, labels: Tensor, space: Space, family: Family) -> Tensor:
    """Weights of a family under the ridge that predicts held-out samples best: (b, n, k), (n,) -> weights."""
    ridge = _advised_ridge(logits, labels, space, family)
    problem = Shrinkage(logits, labels, space, family)
    return problem.minimise(ridge, problem.centre)


def _advised_ridge(logits: Tensor, labels: Tensor, space: Space, family: Family) -> float:
    """Follows the weights from the strongest ridge to the weakest while the held-out NLL falls."""
    # Labels may be sorted. With fewer than HELD_OUT samples the two parts overlap.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(labels.device)
    n_held = len(labels) // HELD_OUT
    held, rest = order[: max(n_held, 1)], order[n_held:]
    problem = Shrinkage(logits[:, rest], labels[rest], space, family)
    outputs, weights = space.encode(logits[:, held]), problem.centre
    best, lowest = RIDGES[0], float("inf")
    for ridge in RIDGES:
        weights = problem.minimise(ridge, weights)
        score = calibrated_nll(space.decode(combine(outputs, weights)), labels[held])
        if score >= lowest:
            break
        best, lowest = ridge, score
    return best
