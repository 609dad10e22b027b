"""The weights on the probability simplex with the lowest NLL of the pooled prediction: a convex problem.

Axes: b members, n samples, k classes, m weight vectors. All in float64.
"""

import warnings

import torch
from torch import Tensor

from stl_lightning.ensemble.pooling import Space

TOLERANCE_NATS = 1e-7
MAX_STEPS = 100
NEGLIGIBLE = 1e-6  # a smaller weight becomes zero: the solver approaches the boundary but never stands on it

Derivatives = tuple[Tensor, Tensor, Tensor]  # value (), gradient (b,), Hessian (b, b)


class LogLinearNLL:
    """NLL of softmax(sum_b w_b z_b), the weighted geometric mean of the members.

    With margins d_b = z_b - z_b[label] it is mean_n logsumexp_k(sum_b w_b d_b): convex in every real w.
    """

    def __init__(self, outputs: Tensor, labels: Tensor) -> None:
        label = labels[None, :, None].expand(len(outputs), -1, 1)
        self.shape = outputs.shape[1:]
        self.margins = (outputs - outputs.gather(-1, label)).flatten(1)  # (b, n k)

    def values(self, weights: Tensor) -> Tensor:
        """(m, b) -> (m,)"""
        return (weights @ self.margins).unflatten(-1, self.shape).logsumexp(-1).mean(-1)

    def derivatives(self, weights: Tensor) -> Derivatives:
        """With p the pooled probabilities: gradient mean E_p[d], Hessian mean Cov_p[d, d]."""
        pooled = (weights @ self.margins).unflatten(-1, self.shape)
        n = len(pooled)
        weighted = self.margins * (pooled.softmax(-1) / n).flatten()
        mean = weighted.unflatten(-1, self.shape).sum(-1)  # (b, n), E_p[d] / n
        return pooled.logsumexp(-1).mean(), mean.sum(-1), weighted @ self.margins.T - n * mean @ mean.T


class MixtureNLL:
    """NLL of sum_b w_b p_b, the weighted arithmetic mean of the members: convex for w on the simplex.

    Only the probabilities of the labels matter: -mean_n log(sum_b w_b p_b[label]).
    """

    def __init__(self, outputs: Tensor, labels: Tensor) -> None:
        probs = outputs.gather(-1, labels[None, :, None].expand(len(outputs), -1, 1)).squeeze(-1)
        self.probs = probs.clamp(min=torch.finfo(probs.dtype).tiny)  # (b, n)

    def values(self, weights: Tensor) -> Tensor:
        """(m, b) -> (m,)"""
        return -(weights @ self.probs).log().mean(-1)

    def derivatives(self, weights: Tensor) -> Derivatives:
        """With r_b = p_b / sum w p: gradient -mean r_b, Hessian mean r_b r_b'."""
        pooled = weights @ self.probs
        ratio = self.probs / pooled
        return -pooled.log().mean(), -ratio.mean(-1), ratio @ ratio.T / len(pooled)


PooledNLL = LogLinearNLL | MixtureNLL


def pooled_nll(space: Space, logits: Tensor, labels: Tensor) -> PooledNLL:
    """The NLL of pooling `logits` (b, n, k) in `space`, as a function of one weight a member."""
    objective = LogLinearNLL if space.log_linear else MixtureNLL
    return objective(space.encode(logits), labels)


def optimality_gap(weights: Tensor, gradient: Tensor) -> float:
    """w.g - min g: bounds how far w lies above the lowest value on the simplex; 0 there (KKT conditions)."""
    return (weights @ gradient - gradient.min()).item()


def minimise_on_simplex(objective: PooledNLL, start: Tensor) -> Tensor:
    """The minimiser on the simplex, from a start (b,) inside it; warns if it misses `TOLERANCE_NATS`.

    Members that are copies of one another share their weight equally. Source: primal-dual interior point,
    Boyd & Vandenberghe 2004, section 11.7, with a line search on the barrier function.
    """
    weights, duals, barrier = start, torch.ones_like(start), 1.0
    for _ in range(MAX_STEPS):
        value, gradient, hessian = objective.derivatives(weights)
        gap = optimality_gap(weights, gradient)
        if gap <= TOLERANCE_NATS:
            break
        step = _newton_step(weights, duals, gradient, hessian, barrier)
        if -(gradient - barrier / weights) @ step <= barrier:  # near the minimum for this barrier
            barrier *= 0.1
            step = _newton_step(weights, duals, gradient, hessian, barrier)
        dual_step = (barrier - duals * step) / weights - duals
        duals = duals + _stride(duals, dual_step) * dual_step
        weights = _line_search(objective, weights, step, value, gradient, barrier)
    else:
        warnings.warn(f"ensemble weights are within {gap:.1e} nats of the optimum only", stacklevel=2)
    weights = torch.where(weights < NEGLIGIBLE, 0.0, weights)
    return weights / weights.sum()


def _newton_step(w: Tensor, duals: Tensor, gradient: Tensor, hessian: Tensor, barrier: float) -> Tensor:
    """The step d, with sum 0, that solves (H + diag(s / w)) d + multiplier = -(g - barrier / w).

    Scaled by sqrt(w / s) on both sides the matrix is the identity plus a positive one: never singular.
    """
    root = (w / duals).sqrt()
    system = torch.diag(torch.ones_like(w)) + root[:, None] * hessian * root
    rhs = torch.stack([gradient - barrier / w, torch.ones_like(w)], -1)
    descent, ones = (root[:, None] * torch.linalg.solve(system, root[:, None] * rhs)).unbind(-1)
    return ones * (descent.sum() / ones.sum()) - descent


def _stride(x: Tensor, step: Tensor) -> float:
    """The longest stride, at most 1, after which x + stride * step is still positive."""
    shrinking = step < 0
    return min(1.0, 0.99 * (x[shrinking] / -step[shrinking]).min().item()) if shrinking.any() else 1.0


def _line_search(
    objective: PooledNLL, w: Tensor, step: Tensor, value: Tensor, gradient: Tensor, barrier: float
) -> Tensor:
    """Halves the stride until the barrier function falls by a tenth of what its slope promises."""
    slope = (gradient - barrier / w) @ step
    merit = value - barrier * w.log().sum()
    stride = _stride(w, step)
    for _ in range(30):
        tried = w + stride * step
        if objective.values(tried[None])[0] - barrier * tried.log().sum() <= merit + 0.1 * stride * slope:
            return tried
        stride /= 2
    return w
