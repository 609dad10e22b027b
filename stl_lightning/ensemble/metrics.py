"""Scores of predictions, and how far members differ.

Axes: n samples, b members, k classes. Predictions are log-probabilities (n, k); labels are int64 (n,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

N_BINS = 15  # of the expected calibration error, as in Guo et al. 2017


def sample_nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of every sample, in nats: (n, k), (n,) -> (n,)."""
    return -log_probs.gather(-1, labels[:, None]).squeeze(-1)


def nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats. Like `torch.nn.functional.nll_loss`."""
    return sample_nll(log_probs, labels).mean()


def accuracy(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Fraction of samples whose most probable class is the label."""
    return (log_probs.argmax(-1) == labels).to(log_probs.dtype).mean()


def brier(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples of the squared distance between probabilities and one-hot label: 0 (exact) to 2."""
    probs = log_probs.exp()
    # |p - e_y|^2 = |p|^2 - 2 p_y + 1
    return (probs.square().sum(-1) - 2 * probs.gather(-1, labels[:, None]).squeeze(-1) + 1).mean()


def ece(log_probs: Tensor, labels: Tensor) -> Tensor:
    """Expected calibration error: the mean distance between confidence and accuracy over equal-width bins.

    Like `torchmetrics.functional.classification.multiclass_calibration_error(..., n_bins=15, norm="l1")`.
    Source: Guo et al. 2017, equation 3.
    """
    confidence, predicted = log_probs.exp().max(-1)
    surplus = confidence - (predicted == labels).to(confidence.dtype)
    bins = (confidence * N_BINS).long().clamp(max=N_BINS - 1)
    return surplus.new_zeros(N_BINS).index_add(0, bins, surplus).abs().sum() / len(labels)


METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": accuracy,
    "nll": nll,
    "ece": ece,
    "brier": brier,
}


def disagreement(logits: Tensor) -> Tensor:
    """Fraction of samples on which two members predict different classes: (b, n, k) -> (b, b)."""
    votes = logits.argmax(-1)
    return torch.stack([(votes != vote).double().mean(-1) for vote in votes])
