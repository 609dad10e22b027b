"""Accuracy against the slices that a branch reads, drawn from an experiment's JSON."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stl_lightning.report.looks import BASELINE, BLUE, DPI, GREEN, ORANGE, STYLE

Row = Mapping[str, Any]

LINES = {"ensemble": ("ensemble", GREEN), "highest": ("highest branch", BLUE), "mean": ("mean branch", ORANGE)}


def points(record: Row) -> dict[int, Row]:
    """By number of slices, in order: the variants called `reads-R`, and the recipe itself where none has its R."""
    found = {record["slices_per_branch"]: record}
    for key, row in record["variants"].items():
        if matched := re.fullmatch(r"reads-(\d+)", key):
            found[int(matched[1])] = row
    return dict(sorted(found.items()))


def draw(record: Row, stem: Path) -> None:
    """Writes STEM.png and STEM.svg; nothing if there is one point only. Percent of the test images, over the seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = points(record)
    if len(rows) < 2:
        return
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4), layout="constrained", dpi=DPI)
        axis = figure.subplots()
        places = range(len(rows))
        for column, (label, colour) in LINES.items():
            means = [row[column]["mean"] for row in rows.values()]
            spread = [row[column]["std"] for row in rows.values()]
            axis.errorbar(places, means, spread, label=label, color=colour, marker="o", capsize=3)
        baseline = record["variants"].get("unsplit", record)["baseline"]
        if baseline["n"]:
            axis.axhline(baseline["mean"], label="conventional network", **BASELINE)
        axis.set_xticks(places, [tick(r, row) for r, row in rows.items()])
        axis.set(ylabel="test accuracy, %", xlabel="slices a branch reads; training bytes it reads an epoch; "
                 "multiply-adds of all branches", title=record["title"])  # fmt: skip
        axis.legend()
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(stem.with_suffix(".png"))
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None})


def tick(r: int, row: Row) -> str:
    sizes = row["costs"]
    return (
        f"{r}\n{sizes['branch']['bytes_read_epoch'] / 1e6:.0f} MB\n{sizes['all_branches']['multiply_adds'] / 1e6:.1f} M"
    )
