"""How good the ensemble was after every epoch of its branches, on validation images.

Letters: e epochs, b members, n samples, k classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_lightning.ensemble.metrics import accuracy, nll
from stl_lightning.ensemble.pooling import pool
from stl_lightning.ensemble.weighting import WEIGHTINGS

FITTED, SPACE = "simplex", "log_prob"


@dataclass(frozen=True)
class Curve:
    """One number an epoch: negative log-likelihood in nats, accuracy as a share."""

    nll: list[float]
    accuracy: list[float]


def ensemble_curves(members: Sequence[np.ndarray], labels: Tensor) -> dict[str, Curve]:
    """The members' weighted sum after every epoch: weights fitted anew, equal weights, and the best member alone.

    What is fitted or chosen is so on the first half of the images; all is scored on the second. A member that ended
    before the others keeps its last outputs. Shapes: members (e, n, k) each, labels (n,).
    """
    n_epochs = max(map(len, members))
    return {
        name: _curve((combine(_at(members, e), labels) for e in range(n_epochs)), labels)
        for name, combine in COMBINED.items()
    }


def single_curve(logits: np.ndarray, labels: Tensor) -> Curve:
    """The same of one network (e, n, k), on the same second half of the images."""
    return _curve((_second_half(_float(of_epoch)).log_softmax(-1) for of_epoch in logits), labels)


def fitted(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities (n / 2, k) of the second half, with weights that the first half gives."""
    half = len(labels) // 2
    weights = WEIGHTINGS[FITTED](logits[:, :half], labels[:half], SPACE)
    return pool(logits[:, half:], weights, SPACE)


def uniform(logits: Tensor, labels: Tensor) -> Tensor:
    equal = logits.new_full((len(logits),), 1 / len(logits))
    return pool(logits[:, len(labels) // 2 :], equal, SPACE)


def best(logits: Tensor, labels: Tensor) -> Tensor:
    half = len(labels) // 2
    scores = [accuracy(member[:half], labels[:half]) for member in logits]
    return logits[int(torch.stack(scores).argmax()), half:].log_softmax(-1)


COMBINED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ensemble, weights fitted": fitted,
    "ensemble, equal weights": uniform,
    "best branch": best,
}


def _at(members: Sequence[np.ndarray], epoch: int) -> Tensor:
    return torch.stack([_float(member[min(epoch, len(member) - 1)]) for member in members])


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))


def _second_half(values: Tensor) -> Tensor:
    return values[len(values) // 2 :]


def _curve(log_probs: Iterable[Tensor], labels: Tensor) -> Curve:
    held_out = _second_half(labels)
    scores = [(nll(of_epoch, held_out).item(), accuracy(of_epoch, held_out).item()) for of_epoch in log_probs]
    return Curve(*map(list, zip(*scores, strict=True)))
