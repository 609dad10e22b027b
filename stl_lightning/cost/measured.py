"""What the training of branches took, from the files it left: `metrics.csv` and `status.json`."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stl_lightning.paths import BranchPaths
from stl_lightning.status import read_status
from stl_lightning.traffic import total_bytes

Windows = Mapping[str, Sequence[int | None]]  # stretches of a process that trained, and what it sent and received


def read_epochs(paths: BranchPaths) -> dict[str, list[float]]:
    """The columns of `metrics.csv`, one number an epoch, NaN where there is none; empty before the first epoch."""
    if not paths.metrics.exists():
        return {}
    with paths.metrics.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name] or math.nan) for row in rows] for name in (rows[0] if rows else ())}


def measured(branches: Mapping[int, BranchPaths]) -> dict[int, dict[str, Any]]:
    """Seconds of training, bytes sent and received of each branch.

    Of branches that one process trains together, each has the numbers of that process.
    """
    return {
        branch: {"wall_s": _wall_s(paths), **total_bytes([_windows(paths, branch)])}
        for branch, paths in branches.items()
    }


def measured_in_all(branches: Mapping[int, BranchPaths]) -> dict[str, Any]:
    """The sums over branches; seconds and bytes of those that one process trained together count once."""
    windows = {branch: _windows(paths, branch) for branch, paths in branches.items()}
    seconds = {branch: _wall_s(paths) for branch, paths in branches.items()}
    together = [[seconds[branch] or 0.0 for branch in group] for group in _groups(windows)]
    return {"wall_s": sum(map(max, together)) if any(seconds.values()) else None, **total_bytes(windows.values())}


def _groups(windows: Mapping[int, Windows]) -> Iterable[list[int]]:
    """The branches in groups, such that any two with a window in common are in one."""
    groups: list[tuple[set[str], list[int]]] = []
    for branch, own in windows.items():
        joined = [group for group in groups if group[0] & own.keys()]
        groups = [group for group in groups if group not in joined]
        groups.append((set(own).union(*(names for names, _ in joined)), [*(b for _, of in joined for b in of), branch]))
    return [members for _, members in groups]


def _windows(paths: BranchPaths, branch: int) -> Windows:
    return read_status(paths, branch).traffic.get("windows", {})


def _wall_s(paths: BranchPaths) -> float | None:
    epochs = read_epochs(paths).get("epoch_s")
    return sum(epochs) if epochs else None
