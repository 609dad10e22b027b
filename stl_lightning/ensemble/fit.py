"""Fits an ensemble on validation logits: weighting and space by cross-validation, weights and temperature.

Axes: b members, n samples, k classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from stl_lightning.ensemble.metrics import accuracy, sample_nll
from stl_lightning.ensemble.pooling import cautious_temperature, fit_temperature, pool, space_named, temper
from stl_lightning.ensemble.weighting import WEIGHTINGS
from stl_lightning.errors import ConfigError, DataError, unknown

AUTO = "auto"
SEARCHED_SPACES = ("log_prob", "prob")  # `logits` gives one weight a member nothing that `log_prob` does not
# Logits held in float64 at once, here 1 GB: ImageNet's 50,000 x 1,000 of 16 members would be 6.4 GB, several times.
MAX_VALUES = 2**27
# A candidate so many standard errors behind on so many samples is not tried further.
HOPELESS_SE, HOPELESS_SAMPLES = 5.0, 200
MAX_SEARCHED_WEIGHTS = 200_000  # `auto` passes over weightings with more: one fit would take minutes

Candidate = tuple[str, str]  # weighting, space


class Score(TypedDict):
    """Cross-validated quality of one weighting in one space, after the temperature. Plain enough for JSON."""

    weighting: str
    space: str
    n_samples: int  # fewer than all where it was given up for far behind after some folds
    nll: float  # nats
    nll_se: float  # standard error of `nll` over samples
    accuracy: float


@dataclass(frozen=True, eq=False)
class FittedEnsemble:
    """Weighted members and a temperature: all that turns their logits into one prediction."""

    weighting: str
    space: str
    weights: Tensor  # (b,), (b, k) or (b, k, k + 1), float64; see `pooling`
    temperature: float
    members: tuple[int, ...]  # branch numbers, in the order of the weights
    cv: tuple[Score, ...]  # what was tried, in the order of the table
    flips: bool = False  # whether the members' logits are means over an image and its mirror image

    def log_probs(self, logits: Tensor) -> Tensor:
        """Log-probabilities of the ensemble: logits (b, n, k) in the order of `members` -> (n, k)."""
        if len(logits) != len(self.members):
            raise DataError(f"logits: expected members {self.members}, received {len(logits)} members")
        parts = logits.split(max(1, MAX_VALUES // logits[:, :1].numel()), dim=1)  # each copied to float64
        return torch.cat([temper(pool(part, self.weights, self.space), self.temperature) for part in parts])

    def member_weights(self) -> list[float]:
        """One number a member, for tables: the weight, its mean over classes, or its map's mean diagonal."""
        weights = self.weights
        if weights.ndim == 3:
            weights = weights.diagonal(dim1=1, dim2=2)
        return weights.flatten(1).mean(1).tolist() if weights.ndim > 1 else weights.tolist()

    def subset(self, members: Sequence[int]) -> "FittedEnsemble":
        """The ensemble of the named members alone, in the order of this one; the temperature stays.

        One weight a member, or a member and class: the remaining weights grow in proportion until their sum
        (of the class) is what it was; equal shares if all are zero. Affine maps: the sum of the lost maps is
        added to the kept ones in equal shares, as if each lost member had predicted the mean of the kept.
        """
        missing = set(members) - set(self.members)
        if missing or not members:
            raise DataError(f"members: expected some of {self.members}, received {tuple(members)}")
        kept = [i for i, member in enumerate(self.members) if member in members]
        weights = _share_out(self.weights, kept)
        return replace(self, weights=weights, members=tuple(self.members[i] for i in kept))


def _share_out(weights: Tensor, kept: list[int]) -> Tensor:
    """The weights of the kept members, changed so that the sum over members stays."""
    rest, total = weights[kept], weights.sum(0)
    if weights.ndim == 3:
        return rest + (total - rest.sum(0)) / len(kept)
    return torch.where(rest.sum(0) > 0, rest * (total / rest.sum(0)), total / len(kept))


@dataclass(frozen=True, eq=False)
class Search:
    """Candidates and how well they predicted the samples of folds that they were not fitted to. Made by `search`."""

    logits: Tensor  # (b, n, k), float64
    labels: Tensor  # (n,)
    members: tuple[int, ...]
    order: Tensor  # (n,) of the samples, fold by fold
    predictions: dict[Candidate, Tensor]  # log-probabilities (m, k) of the first m samples of `order`
    losses: dict[Candidate, Tensor]  # (m,) after the best temperature, in nats

    @property
    def chosen(self) -> Candidate:
        """The first whose loss is within one standard error (of the paired difference) of the lowest."""
        return _within(1.0, {c: loss for c, loss in self.losses.items() if len(loss) == len(self.order)})[0]

    def fitted(self, candidate: Candidate | None = None) -> FittedEnsemble:
        """The weights of a candidate, by default the chosen one, fitted to all samples.

        The temperature is fitted to the cross-validated predictions, which do not flatter many weights.
        """
        name, space = candidate = candidate or self.chosen
        predictions = self.predictions[candidate]
        return FittedEnsemble(
            weighting=name,
            space=space,
            weights=WEIGHTINGS[name](self.logits, self.labels, space),
            temperature=cautious_temperature(predictions, self.labels[self.order[: len(predictions)]]),
            members=self.members,
            cv=tuple(_score(c, self.losses[c], p, self.labels[self.order]) for c, p in self.predictions.items()),
        )

    def of_each_weighting(self) -> dict[str, FittedEnsemble]:
        """Every weighting fitted, in the space that suits it best; the chosen one in that which was chosen."""
        # Of two that were given up the one that was tried longer is better.
        ranked = sorted(self.losses, key=lambda c: (len(self.losses[c]), -self.losses[c].mean().item()))
        spaces = dict(ranked) | dict([self.chosen])
        return {name: self.fitted((name, spaces[name])) for name in WEIGHTINGS if name in spaces}


def search(
    logits: Tensor,
    labels: Tensor,
    members: Sequence[int],
    weighting: str = AUTO,
    space: str = AUTO,
    n_folds: int = 5,
    seed: int = 0,
) -> Search:
    """Cross-validates what the settings leave open on validation logits (b, n, k), labels (n,) of numbered members.

    At most `MAX_VALUES` logits are used, of the first samples: a validation split is in random order.

    Raises ConfigError for unknown or unfit settings and DataError for unfit logits or labels.
    """
    _check(logits, labels, members, n_folds)
    candidates = find_candidates(weighting, space, len(members), logits.shape[-1])
    logits, labels = _at_most(max(n_folds, MAX_VALUES // logits[:, :1].numel()), logits, labels)
    folds = _folds(len(labels), n_folds, seed, labels.device)
    predictions = _cross_predict(logits, labels, candidates, folds)
    order = torch.cat(folds)
    losses = {c: _tempered_losses(p, labels[order[: len(p)]]) for c, p in predictions.items()}
    return Search(logits, labels, tuple(members), order, predictions, losses)


def fit_ensemble(
    logits: Tensor,
    labels: Tensor,
    members: Sequence[int],
    weighting: str = AUTO,
    space: str = AUTO,
    n_folds: int = 5,
    seed: int = 0,
) -> FittedEnsemble:
    """The best that a `search` with these arguments finds, fitted to all samples."""
    return search(logits, labels, members, weighting, space, n_folds, seed).fitted()


def refit(logits: Tensor, labels: Tensor, members: Sequence[int], weighting: str, space: str) -> FittedEnsemble:
    """One weighting without cross-validation: the temperature is fitted to the same samples as the weights.

    That flatters weightings of many weights, and takes a sixth of the time of `fit_ensemble`.
    """
    logits, labels = _at_most(MAX_VALUES // logits[:, :1].numel(), logits, labels)
    weights = WEIGHTINGS[weighting](logits, labels, space)
    return FittedEnsemble(
        weighting, space, weights, cautious_temperature(pool(logits, weights, space), labels), tuple(members), ()
    )


def _at_most(n: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The first n samples, in float64."""
    return logits[:, :n].double(), labels[:n]


def find_candidates(weighting: str, space: str, n_members: int, n_classes: int) -> list[Candidate]:
    """The pairs to try, the simplest first; one pair if neither setting is `auto`, or one member needs no weights."""
    if weighting not in (AUTO, *WEIGHTINGS):
        raise unknown("ensemble.weighting", weighting, [AUTO, *WEIGHTINGS])
    if space != AUTO:
        space_named(space)
    names = _searched(n_members, n_classes) if weighting == AUTO else [weighting]
    spaces = SEARCHED_SPACES if space == AUTO else (space,)
    candidates = [(name, s) for name in names for s in spaces if s in WEIGHTINGS[name].spaces]
    if not candidates:
        valid = ", ".join(WEIGHTINGS[weighting].spaces)
        raise ConfigError(f"ensemble.space: weighting {weighting!r} works in {valid}; received {space!r}")
    return candidates if n_members > 1 else candidates[:1]


def _searched(n_members: int, n_classes: int) -> list[str]:
    """The weightings that `auto` tries."""
    return [name for name, row in WEIGHTINGS.items() if n_members * n_classes ** (row.axes - 1) <= MAX_SEARCHED_WEIGHTS]


def check_n_folds(n_folds: int, n_samples: int) -> None:
    """Raises: ConfigError if a validation split of so many samples has no so many parts."""
    if n_samples < 2:
        raise ConfigError(f"data.val_size: expected 2 validation images or more to weigh branches by, got {n_samples}")
    if not 2 <= n_folds <= n_samples:
        raise ConfigError(f"ensemble.n_folds: expected 2 to {n_samples}, the validation images; received {n_folds}")


def _check(logits: Tensor, labels: Tensor, members: Sequence[int], n_folds: int) -> None:
    if labels.ndim != 1 or labels.dtype != torch.int64:
        received = f"{labels.dtype} {tuple(labels.shape)}"
        raise DataError(f"labels: expected int64 of shape (samples,), received {received}")
    expected = (len(members), len(labels))
    if logits.ndim != 3 or logits.shape[:2] != expected or not logits.is_floating_point():
        raise DataError(
            f"logits: expected floats (members, samples, classes) with (members, samples) = {expected}, "
            f"received {logits.dtype} {tuple(logits.shape)}"
        )
    if len(set(members)) != len(members) or not members:
        raise DataError(f"members: expected different numbers, at least one; received {tuple(members)}")
    check_n_folds(n_folds, len(labels))
    if labels.min() < 0 or labels.max() >= logits.shape[-1]:
        valid, received = f"0 to {logits.shape[-1] - 1}", f"{labels.min()} to {labels.max()}"
        raise DataError(f"labels: expected {valid} (the classes of the logits), received {received}")
    broken = [m for m, ours in zip(members, logits, strict=True) if not ours.isfinite().all()]
    if broken:
        raise DataError(f"logits: expected finite numbers, received NaN or infinity from member(s) {broken}")


def _folds(n: int, n_folds: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Shuffled sample numbers in n_folds parts that differ in size by one at most."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(device).tensor_split(n_folds)


def _cross_predict(
    logits: Tensor, labels: Tensor, candidates: list[Candidate], folds: tuple[Tensor, ...]
) -> dict[Candidate, Tensor]:
    """Log-probabilities for each fold from weights fitted to the others, folds in order: (n, k) a candidate.

    A candidate that is far behind is not fitted to further folds; its rows end there.
    """
    predictions = {candidate: logits.new_empty(0, logits.shape[-1]) for candidate in candidates}
    alive = candidates
    for i, held in enumerate(folds):
        rest, seen = torch.cat(folds[:i] + folds[i + 1 :]), torch.cat(folds[: i + 1])
        for name, space in alive:
            weights = WEIGHTINGS[name](logits[:, rest], labels[rest], space)
            pooled = pool(logits[:, held], weights, space)
            predictions[name, space] = torch.cat([predictions[name, space], pooled])
        if len(seen) >= HOPELESS_SAMPLES:
            alive = _within(HOPELESS_SE, {c: _tempered_losses(predictions[c], labels[seen]) for c in alive})
    return predictions


def _tempered_losses(log_probs: Tensor, labels: Tensor) -> Tensor:
    """NLL of every sample after the best temperature for all of them: (n, k), (n,) -> (n,)."""
    return sample_nll(temper(log_probs, fit_temperature(log_probs, labels)), labels)


def _within(n_se: float, losses: dict[Candidate, Tensor]) -> list[Candidate]:
    """The candidates at most n_se standard errors (of the paired difference) above the lowest mean loss."""
    best = min(losses.values(), key=lambda loss: loss.mean().item())
    behind = {candidate: loss - best for candidate, loss in losses.items()}
    return [candidate for candidate, d in behind.items() if d.mean() <= n_se * _standard_error(d)]


def _standard_error(x: Tensor) -> float:
    return (x.std() / len(x) ** 0.5).item()


def _score(candidate: Candidate, losses: Tensor, log_probs: Tensor, labels: Tensor) -> Score:
    return Score(
        weighting=candidate[0],
        space=candidate[1],
        n_samples=len(losses),
        nll=losses.mean().item(),
        nll_se=_standard_error(losses),
        accuracy=accuracy(log_probs, labels[: len(losses)]).item(),
    )
