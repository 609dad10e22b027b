"""What each branch costs, all branches together, and the baseline, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from torch import Tensor, nn

from stl_lightning.cost.measured import measured, measured_in_all
from stl_lightning.cost.network import (
    Shape,
    activation_bytes,
    in_precision,
    multiply_adds,
    n_parameters,
    weight_bytes,
)
from stl_lightning.paths import BranchPaths


@dataclass(frozen=True, eq=False)
class Training:
    """A network, what it reads of an image and how often, as far as costs depend on it."""

    network: nn.Module
    in_shape: Shape
    n_classes: int
    n_images: int  # of the training split
    epochs: float  # as many as are planned, or were trained
    batch_size: int
    read_shape: Shape  # of what it reads of an image: in_shape, or the image's, if it makes its slices itself
    stored_as: str  # type of the numbers it reads: of a slice store, or uint8 for images
    has_store: bool = False  # or reads what a store would have
    transform_multiply_adds: int = 0  # to make of an image what the network reads
    precision: str = "32-true"  # as `trainer.precision`
    paths: BranchPaths | None = None  # what it left, once it was trained


def costs(branches: Mapping[int, Training], baseline: Training) -> dict[str, Any]:
    """Numbers of every branch, of all branches and of the baseline, and how often the baseline's the others are.

    Returns, as JSON can hold it: `branches` (rows), `all_branches` and `baseline` with equal keys, of which those that
    were not measured are None; `ratios` of the costliest branch and of all branches to the baseline, by key; and the
    `batch_size`, `precision`, `stored_as` and `has_store` of the first branch.
    """
    first = next(iter(branches.values()))
    rows = {branch: _planned(training) for branch, training in branches.items()}
    trained = {branch: training.paths for branch, training in branches.items() if training.paths is not None}
    measures = measured(trained)
    total = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
    total |= measured_in_all(trained) if trained else NOT_MEASURED
    of_branches = [{"branch": branch} | row | measures.get(branch, NOT_MEASURED) for branch, row in rows.items()]
    of_baseline = _planned(baseline) | (measured({0: baseline.paths})[0] if baseline.paths else NOT_MEASURED)
    return {
        "branches": of_branches,
        "all_branches": total,
        "baseline": of_baseline,
        "ratios": {
            "branch": _ratios({key: _most([row[key] for row in of_branches]) for key in total}, of_baseline),
            "all_branches": _ratios(total, of_baseline),
        },
        **{name: getattr(first, name) for name in ("batch_size", "precision", "stored_as", "has_store")},
    }


NOT_MEASURED = dict.fromkeys(("wall_s", "bytes_sent", "bytes_received"))


def slice_multiply_adds(rows: Tensor, row_shape: Shape) -> int:
    """To compute slices of one image as products with rows (r, b) of the transform, each of which gives (c, h, w).

    Entries that are 0 or 1 multiply nothing.
    """
    n_products = int(((rows != 0) & (rows.abs() != 1)).sum())
    return n_products * prod(row_shape)


def _planned(training: Training) -> dict[str, Any]:
    network = in_precision(training.network, training.precision)
    an_epoch = training.n_images * prod(training.read_shape) * np.dtype(training.stored_as).itemsize
    return {
        "n_parameters": n_parameters(network),
        "weight_bytes": weight_bytes(network),
        "multiply_adds": multiply_adds(network, training.in_shape),
        "transform_multiply_adds": training.transform_multiply_adds,
        "activation_bytes": activation_bytes(
            network, training.in_shape, training.n_classes, training.batch_size, training.precision
        ),
        "bytes_read_epoch": an_epoch,
        "bytes_read": round(an_epoch * training.epochs),
    }


def _most(values: list[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)


def _ratios(ours: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float | None]:
    return {key: ours[key] / baseline[key] if ours[key] is not None and baseline[key] else None for key in baseline}
