"""What the figures of a run are drawn from: its result files, and a sample of its slices.

Letters: e epochs, n samples, b slices, c channels, h w space, k classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stl_lightning.cost import read_epochs
from stl_lightning.paths import BranchPaths, RunPaths, read_json
from stl_lightning.tracking import read_epoch_logits


@dataclass(frozen=True, eq=False)
class Sample:
    """An image of the validation split, its slices and their frequencies; the energy of each slice in many such images.

    Shapes: image (c, h, w) in [0, 1]; slices (c_k, h, w) each; energies (b,) of sum 1.
    """

    image: Tensor
    label: str
    slices: Sequence[Tensor]
    frequencies: Sequence[tuple[int, int]]
    energies: Sequence[float]


@dataclass(frozen=True, eq=False)
class Material:
    """The numbers of one run. What may be missing is None, or empty."""

    results: dict[str, Any]  # results.json
    epochs: dict[int, dict[str, list[float]]]  # metrics.csv of each member, a list a column
    baseline_epochs: dict[str, list[float]]
    logits: list[np.ndarray] | None  # of each member, (e, n, k) of the first validation images after every epoch
    baseline_logits: np.ndarray | None
    labels: Tensor | None  # (n,) of these images
    sample: Sample

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What results.json says of each member."""
        return self.results["branches"]

    @property
    def baseline(self) -> dict[str, Any] | None:
        """The scores of the baseline, if it has finished."""
        found = self.results["baseline"]
        return found if found and "accuracy" in found else None


def read_material(paths: RunPaths, sample: Sample) -> Material:
    """Raises: RunError if the run has not been evaluated."""
    results = read_json(paths.results)
    members = [paths.branch(branch) for branch in results["members"]]
    baseline = paths.baseline.branch(0)
    labels, *logits = _of_as_many(_labels(members[0]), [read_epoch_logits(of) for of in (*members, baseline)])
    known = [of_member for of_member in logits[:-1] if of_member is not None]
    return Material(
        results,
        {branch: read_epochs(member) for branch, member in zip(results["members"], members, strict=True)},
        read_epochs(baseline),
        known if len(known) == len(members) else None,
        logits[-1],
        labels,
        sample,
    )


def _of_as_many(labels: Tensor | None, logits: Sequence[np.ndarray | None]) -> list[Any]:
    """Labels (n,) and logits (e n k) of the images that all have: `run.epoch_logits` may change in between."""
    n = min((of.shape[1] for of in logits if of is not None), default=0)
    return [None if labels is None else labels[:n], *(None if of is None else of[:, :n] for of in logits)]


def _labels(paths: BranchPaths) -> Tensor | None:
    """The labels of the validation images, which `stl ensemble` keeps beside the logits; None if it cannot be read."""
    try:
        with safe_open(paths.logits("val"), framework="pt") as file:
            labels: Tensor = file.get_tensor("labels").to(torch.int64)
            return labels
    except (SafetensorError, OSError):
        return None
