"""Test error against the slices that a branch reads, drawn from an experiment's JSON."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reproducing.experiments import Experiment
from stl_lightning.report.looks import BASELINE, BLUE, DPI, GREEN, ORANGE, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, Any]

# Percent, at the axis: the finer ones where they are few.
FINE = (*(i / 10 for i in range(2, 10)), *range(1, 10), *range(10, 20, 2), *range(20, 100, 5))
COARSE = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70)
MOST_FINE = 8
LINES = {"ensemble": ("ensemble", GREEN), "highest": ("highest branch", BLUE), "mean": ("mean branch", ORANGE)}


def points(record: Row, experiment: Experiment) -> dict[int, Row]:
    """By number of slices, in order: the variants of a `family`, and the recipe if it is one of `reads`."""
    own, name = record["slices_per_branch"], family(record)
    found = {own: record} if name == "reads" and f"reads-{own}" not in experiment.rows else {}
    for key, row in record["variants"].items():
        if matched := re.fullmatch(rf"{name}-(\d+)", key):
            found[int(matched[1])] = row
    return dict(sorted(found.items()))


def family(record: Row) -> str:
    """The variants that the curve is of: `aligned-R`, which need no image, if there are as many as `reads-R`."""
    counts = Counter(key.partition("-")[0] for key in record["variants"])
    return "aligned" if counts["aligned"] > 1 and counts["aligned"] >= counts["reads"] else "reads"


def conventional(record: Row, experiment: Experiment) -> Row:
    """The accuracy of the conventional network that is trained as long as the points of the curve, if it is there."""
    key = "baseline-short" if "baseline-short" in experiment.rows else "baseline"
    found: Row = record["variants"].get(key, {"baseline": {"n": 0}})["baseline"]
    return found


def draw(record: Row, experiment: Experiment, stem: Path) -> None:
    """Writes STEM.png and STEM.svg; nothing if there is one point only."""
    import matplotlib

    if (figure := make(record, experiment)) is None:
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure.savefig(stem.with_suffix(".png"))
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def make(record: Row, experiment: Experiment) -> "Figure | None":
    """Percent of the test images, over the seeds; None if there is one point only.

    Errors on a logarithmic axis: a branch that reads a high frequency alone has many times those of the ensemble.
    """
    import matplotlib
    from matplotlib.figure import Figure

    rows = points(record, experiment)
    if len(rows) < 2:
        return None
    name = family(record)
    drawn = experiment.rows.get(f"{name}-{record['slices_per_branch']}")
    note = (", crops by whole blocks" if name == "aligned" else "") + (drawn.note if drawn else "")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained", dpi=DPI)
        axis = figure.subplots()
        places = range(len(rows))
        for column, (label, colour) in LINES.items():
            found = [row[column] for row in rows.values()]
            spread = [of["std"] if of["n"] > 1 else math.nan for of in found]
            axis.errorbar(
                places, [100 - of["mean"] for of in found], spread, label=label, color=colour, marker="o", capsize=3
            )
        baseline = conventional(record, experiment)
        if baseline["n"]:
            axis.axhline(100 - baseline["mean"], label="conventional network", **BASELINE)
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        fine, coarse = ([tick for tick in ticks if low <= tick <= high] for ticks in (FINE, COARSE))
        axis.set_yticks(fine if len(fine) <= MOST_FINE else coarse, minor=False)
        axis.set_yticks([], minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_xticks(places, [tick(r, row) for r, row in rows.items()])
        axis.set_ylabel("test error, % (logarithmic)")
        axis.set_xlabel("slices a branch reads; training bytes it reads an epoch; multiply-adds of all branches")
        axis.set_title(record["title"] + note)
        axis.legend()
    return figure


def tick(r: int, row: Row) -> str:
    sizes = row["costs"]
    return (
        f"{r}\n{sizes['branch']['bytes_read_epoch'] / 1e6:.0f} MB\n{sizes['all_branches']['multiply_adds'] / 1e6:.1f} M"
    )
