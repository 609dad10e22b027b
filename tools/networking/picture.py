"""`network.json` as a picture: above what was measured, below what the model on paper makes of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from networking.model import FASTER
from networking.nodes import LINKS
from networking.table import NAMES, Row

# method -> colour and hatch; light to dark, so that they differ in grey too
LOOKS = {
    "spectral": ("#0b3c5d", ""),
    "ddp": ("#d1495b", "//"),
    "powersgd": ("#edae49", ".."),
    "local-sgd": ("#b9d6c2", "xx"),
}
MARKERS = dict(zip(LOOKS, "osd^", strict=True))
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6}
CONTROL = "0.35"
BOUNDS = {"model: nothing overlaps": "-", "model: exchange hidden in the backward pass": ":"}
# For both pictures of what was measured: column, its spread, title, unit.
MEASURED = (
    ("epoch_s", "spread", "Measured, 4 workers: time of an epoch", "seconds"),
    (
        "efficiency", "spread_efficiency", "Measured, 4 workers: scaling efficiency",
        "time of one worker / (4 × time of four)",
    ),
)  # fmt: skip


def draw(record: Row, path: Path) -> None:
    """Raises: SystemExit without matplotlib."""
    try:
        import matplotlib.pyplot as plt
        from matplotlib.lines import Line2D
    except ModuleNotFoundError as error:
        raise SystemExit(f"tools/network: the picture needs matplotlib ({error}): pip install matplotlib") from error
    links = [name for name in LINKS if any(row["link"] == name for row in record["modelled"])]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1 + len(FASTER), 2, figsize=(11, 11.5), layout="constrained")
        for axis, measure in zip(axes[0], MEASURED, strict=True):
            bars(axis, record, links, *measure)
        for row, faster in zip(axes[1:], FASTER, strict=True):
            for axis, link in zip(row, links, strict=False):
                curves(axis, record, link, faster)
            for axis in row[len(links) :]:
                axis.set_axis_off()
        handles, _ = axes[0][0].get_legend_handles_labels()
        handles += [Line2D([], [], color="black", linestyle=style, label=label) for label, style in BOUNDS.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def bars(axis: Any, record: Row, links: Sequence[str], value: str, spread: str, title: str, unit: str) -> None:
    """A group of bars per link, one per method, each with its number above it."""
    width = 0.8 / len(LOOKS)
    rows = {(row["method"], row["link"]): row for row in record["rows"]}
    for i, (method, (colour, hatch)) in enumerate(LOOKS.items()):
        found = [rows[method, link] for link in links]
        places = [j + (i - (len(LOOKS) - 1) / 2) * width for j in range(len(links))]
        heights, errors = [row[value] for row in found], [row[spread] for row in found]
        label = NAMES[method].format(**record["work"]).replace("`", "") + f": {size(found[-1])}"
        drawn = axis.bar(
            places, heights, 0.92 * width, yerr=errors, color=colour, hatch=hatch, edgecolor="black", linewidth=0.6,
            label=label, error_kw={"linewidth": 1, "capsize": 3},
        )  # fmt: skip
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        axis.bar_label(drawn, [f"{height:.2f}" for height in heights], padding=4, fontsize=9, bbox=box)
    without = rows["no exchange", "unshaped"][value]
    axis.axhline(without, color=CONTROL, linestyle="--", linewidth=1.2, zorder=0)
    axis.annotate(
        "conventional,\nno exchange", (1.01, without), xycoords=("axes fraction", "data"), fontsize=8, color=CONTROL,
        va="center",
    )  # fmt: skip
    axis.margins(x=0.02, y=0.1)
    axis.set_xticks(range(len(links)), links)
    axis.set(title=title, ylabel=unit, xlabel="link of each worker")


def size(row: Row) -> str:
    n_bytes = row["bytes_per_step_per_worker"]
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= factor / 10:
            return f"{n_bytes / factor:.2g} {unit} a step"
    return f"{n_bytes:.0f} bytes a step"


def curves(axis: Any, record: Row, link: str, faster: float) -> None:
    """Efficiency over the number of nodes, and that with overlap where a method can have it."""
    slow, fast = BOUNDS.values()
    for method, (colour, _) in LOOKS.items():
        same = (method, link, faster)
        rows = [row for row in record["modelled"] if (row["method"], row["link"], row["faster"]) == same]
        nodes = [row["n_nodes"] for row in rows]
        low, high = ([row[name] for row in rows] for name in ("efficiency", "overlapped_efficiency"))
        looks = {"color": colour, "marker": MARKERS[method], "markeredgecolor": "black", "markeredgewidth": 0.6}
        axis.plot(nodes, low, linewidth=2, linestyle=slow, clip_on=False, **looks)
        if high != low:
            axis.plot(nodes, high, linewidth=1.2, linestyle=fast, markersize=4, clip_on=False, **looks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(nodes, [f"{n:,}" for n in nodes])
    axis.set_ylim(0, 1.03)
    axis.grid(axis="y", color="0.9")
    speed = "workers as measured" if faster == 1 else f"workers {faster:g} times as fast"
    axis.set(title=f"Model: {link}, {speed}", xlabel="nodes, each with its batch and its link")
    axis.set_ylabel("efficiency")
