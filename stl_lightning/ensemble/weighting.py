"""How much each member counts: functions from the validation logits to weights, and the table of them.

Axes: b members, n samples, k classes. A weighting takes logits (b, n, k), labels (n,) and the name of the
space in which the weighted sum will be taken (`pooling.SPACES`); it returns weights as `pooling` describes.
Every weighting is deterministic and knows nothing of the order of the members, but for exact ties.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stl_lightning.ensemble.metrics import accuracy, nll
from stl_lightning.ensemble.pooling import SPACES, calibrated_nll, combine, fit_temperature
from stl_lightning.ensemble.ridge import AFFINE_MAPS, CLASS_WEIGHTS, shrunk_weights
from stl_lightning.ensemble.simplex import LogLinearNLL, minimise_on_simplex, pooled_nll

GEOMETRIC_P = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GREEDY_PICKS = 50
SHARPER = 10.0  # than uniform weights at their best temperature: a limit that separable samples need


def uniform(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """1 / b for every member."""
    return logits.new_full((len(logits),), 1 / len(logits))


def by_accuracy(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """Proportional to max(accuracy - 1 / k, 0), the lead over guessing; uniform if no member leads."""
    n_classes = logits.shape[-1]
    lead = torch.stack([accuracy(member, labels) for member in logits]) - 1 / n_classes
    lead = lead.clamp(min=0)
    return lead / lead.sum() if lead.any() else uniform(logits, labels, space)


def by_inverse_loss(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """Proportional to 1 / NLL, the loss counted as 1e-6 nats at least."""
    inverse = 1 / _member_losses(logits, labels).clamp(min=1e-6)
    return inverse / inverse.sum()


def geometric(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """p (1 - p)^rank, rank 0 for the best accuracy; the p of `GEOMETRIC_P` with the lowest tempered NLL."""
    rank = ranking(logits, labels)
    p = logits.new_tensor(GEOMETRIC_P)[:, None]
    return _best_of(p * (1 - p) ** rank, logits, labels, space)


def topk(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """1 / m for the m most accurate members; the m with the lowest tempered NLL."""
    rank = ranking(logits, labels)
    cutoff = torch.arange(len(logits), device=logits.device)[:, None]
    return _best_of((rank <= cutoff).to(logits), logits, labels, space)


def greedy(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """Adds `GREEDY_PICKS` times, with replacement, the member that gives the lowest NLL when pooled.

    The weights are the counts at the best moment. Source: Caruana et al. 2004, section 2.
    """
    objective = pooled_nll(SPACES[space], logits, labels)
    candidates = torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    best, lowest = candidates[0], float("inf")
    for picks in range(1, GREEDY_PICKS + 1):
        losses = objective.values(candidates / picks)
        chosen = candidates[losses.argmin()]
        if losses.min() < lowest:
            best, lowest = chosen, losses.min().item()
        candidates = chosen + torch.eye(len(logits), dtype=logits.dtype, device=logits.device)
    return best / best.sum()


def simplex(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """The weights, none negative and of sum 1, of the pooled prediction with the lowest NLL."""
    start = uniform(logits, labels, space)
    return minimise_on_simplex(pooled_nll(SPACES[space], logits, labels), start)


def nonnegative(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """Like `simplex` for the NLL after the best temperature: found together, which is still convex.

    Weights v of any sum up to s are points of a simplex: of the members sharpened by s and one more that knows
    nothing. The sum of v is the inverse temperature; it is fitted again after pooling.
    """
    row, equal = SPACES[space], uniform(logits, labels, space)
    outputs = row.encode(logits)
    sharpest = SHARPER / fit_temperature(row.decode(combine(outputs, equal)), labels)
    know_nothing = torch.zeros_like(outputs[:1])
    objective = LogLinearNLL(torch.cat([sharpest * outputs, know_nothing]), labels)
    start = torch.cat([equal / SHARPER, logits.new_tensor([1 - 1 / SHARPER])])
    weights = minimise_on_simplex(objective, start)[:-1]
    return weights / weights.sum() if weights.any() else uniform(logits, labels, space)


def per_class(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """One weight a member and class (b, k), none negative, shrunk towards `simplex`."""
    return shrunk_weights(logits, labels, SPACES[space], CLASS_WEIGHTS)


def stacking(logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """An affine map a member (b, k, k + 1): logistic regression on the members' outputs side by side.

    Like `sklearn.linear_model.LogisticRegression`, with an L2 penalty that draws the maps towards the
    multiples of the identity which `simplex` gives, instead of towards zero. Source: Wolpert 1992.
    """
    return shrunk_weights(logits, labels, SPACES[space], AFFINE_MAPS)


def _member_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([nll(member, labels) for member in logits.log_softmax(-1)])


def ranking(logits: Tensor, labels: Tensor) -> Tensor:
    """(b,) 0 for the most accurate member; of two that are equal, the one with the lower NLL comes first."""
    by_loss = _member_losses(logits, labels).argsort(stable=True)
    correct = (logits.argmax(-1) == labels).sum(-1)
    return by_loss[correct[by_loss].argsort(descending=True, stable=True)].argsort()


def _best_of(candidates: Tensor, logits: Tensor, labels: Tensor, space: str) -> Tensor:
    """The row of (m, b), normalised, with the lowest NLL after the best temperature."""
    row = SPACES[space]
    outputs, candidates = row.encode(logits), candidates / candidates.sum(-1, keepdim=True)
    losses = [calibrated_nll(row.decode(combine(outputs, weights)), labels) for weights in candidates]
    return candidates[losses.index(min(losses))]


@dataclass(frozen=True)
class Weighting:
    """A row of `WEIGHTINGS`; call it with logits of any precision."""

    fit: Callable[[Tensor, Tensor, str], Tensor]
    axes: int = 1  # of its weights; see `pooling`
    log_linear_only: bool = False  # weights of any sign, or of a sum that matters: not for probabilities

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces in which its weights are meaningful."""
        return tuple(name for name, row in SPACES.items() if row.log_linear or not self.log_linear_only)

    def __call__(self, logits: Tensor, labels: Tensor, space: str) -> Tensor:
        """Weights in float64: (b, n, k), (n,) -> (b,), (b, k) or (b, k, k + 1)."""
        return self.fit(logits.double(), labels, space)


# The simplest first: `fit_ensemble` prefers an earlier row where the data cannot tell two apart.
WEIGHTINGS = {
    "uniform": Weighting(uniform),
    "accuracy": Weighting(by_accuracy),
    "inverse_loss": Weighting(by_inverse_loss),
    "geometric": Weighting(geometric),
    "topk": Weighting(topk),
    "greedy": Weighting(greedy),
    "simplex": Weighting(simplex),
    "nonnegative": Weighting(nonnegative, log_linear_only=True),
    "per_class": Weighting(per_class, axes=2),
    "stacking": Weighting(stacking, axes=3, log_linear_only=True),
}
