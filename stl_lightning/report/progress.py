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
    """One number for each epoch that was validated, counted from 0: NLL in nats, accuracy as a share."""

    epochs: list[int]
    nll: list[float]
    accuracy: list[float]


def ensemble_curves(members: Sequence[np.ndarray], labels: Tensor) -> dict[str, Curve]:
    """The members' weighted sum after every epoch: weights fitted anew, equal weights, and the best member alone.

    What is fitted or chosen is so on the first half of the images; all is scored on the second. A member that ended
    before the others keeps its last outputs. Shapes: members (e, n, k) each, labels (n,).
    """
    epochs = [e for e in range(max(map(len, members))) if all(_is_known(member, e) for member in members)]
    return {
        name: _curve(epochs, (combine(_at(members, e), labels) for e in epochs), labels)
        for name, combine in COMBINED.items()
    }


def single_curve(logits: np.ndarray, labels: Tensor) -> Curve:
    """The same of one network (e, n, k), on the same second half of the images."""
    epochs = [e for e in range(len(logits)) if _is_known(logits, e)]
    return _curve(epochs, (_second_half(_float(logits[e])).log_softmax(-1) for e in epochs), labels)


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
    return torch.stack([_float(_outputs(member, epoch)) for member in members])


def _is_known(member: np.ndarray, epoch: int) -> bool:
    """Whether there are outputs: rows of epochs without validation are NaN, and those of a branch that diverged."""
    return bool(np.isfinite(_outputs(member, epoch)).all())


def _outputs(member: np.ndarray, epoch: int) -> np.ndarray:
    return member[min(epoch, len(member) - 1)]


def _float(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float64))


def _second_half(values: Tensor) -> Tensor:
    return values[len(values) // 2 :]


def _curve(epochs: list[int], log_probs: Iterable[Tensor], labels: Tensor) -> Curve:
    held_out = _second_half(labels)
    scores = [(nll(of_epoch, held_out).item(), accuracy(of_epoch, held_out).item()) for of_epoch in log_probs]
    return Curve(epochs, [loss for loss, _ in scores], [share for _, share in scores])
