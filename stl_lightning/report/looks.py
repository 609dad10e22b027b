"""How figures look: colours that the colour-blind can tell apart, sizes that are readable in a README."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
WIDTH = 8.5  # inches; at this DPI as wide as a README
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "stl",  # the same figure, the same file
}
# Source of the colours: Okabe and Ito 2008; they differ in grey too.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "0.45"
BASELINE: dict[str, Any] = {"color": "black", "linestyle": (0, (5, 2)), "linewidth": 1.5}
MAPPED = "cividis"  # where numbers become colours
# Values that differ by more than so many times are drawn on a logarithmic axis; up to the second number, it names 1, 2
# and 5 of each decade.
MOST_LINEAR, MOST_FINE = 10.0, 300.0


def percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def share_text(share: float) -> str:
    """93.1 %, 0.012 %."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 0.95 else f"{value:.1g} %" if value < 0.095 else f"{value:.2f} %"


def shortened(text: str, n_characters: int = 22) -> str:
    return text if len(text) <= n_characters else f"{text[: n_characters - 1]}…"


def of_branch(position: int, n_branches: int) -> Any:
    """The colour of the branch at a position among its siblings: low frequencies dark, high ones bright."""
    from matplotlib import colormaps

    return colormaps[MAPPED](position / max(1, n_branches - 1) * 0.9)


def scale_y(axis: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis for values of very different sizes, with plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    positive = [value for value in values if 0 < value < float("inf")]
    spread = max(positive) / min(positive) if positive else 1.0
    if spread > MOST_LINEAR:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if spread < MOST_FINE else (1.0,)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_formatter(NullFormatter())


def mapped_colourbar(figure: "Figure", axis: "Axes", branches: Sequence[int], name: str) -> None:
    """The colours of `of_branch` beside an axis."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap([of_branch(i, len(branches)) for i in range(len(branches))])
    places = list(range(0, len(branches), -(-len(branches) // 16)))
    bar = figure.colorbar(ScalarMappable(Normalize(-0.5, len(branches) - 0.5), colours), ax=axis, label=name)
    bar.set_ticks(places, labels=[str(branches[i]) for i in places])


def whole_epochs(axis: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlim(0.5, max(1.5, axis.get_xlim()[1]))
    axis.set_xlabel("epoch")


def show_image(axis: "Axes", image: Tensor) -> None:
    """An image (c, h, w) in [0, 1]: in colours if c is 3, otherwise the mean over channels in grey."""
    _show(axis, image.clamp(0, 1))


def show_slice(axis: "Axes", slice_: Tensor, n_channels: int) -> None:
    """A slice (c_k, h, w), brightened to its own range; zero is grey, or black where nothing is negative.

    One of several rows, as the DFT has, is shown by its absolute value.
    """
    rows = slice_.unflatten(0, (-1, n_channels))
    x = rows[0] if len(rows) == 1 else rows.square().sum(0).sqrt()
    peak = x.abs().max().clamp(min=1e-12)
    _show(axis, x / peak if (x > -0.01 * peak).all() else 0.5 + x / (2 * peak))


def _show(axis: "Axes", image: Tensor) -> None:
    pixels: np.ndarray = (image.movedim(0, -1) if len(image) == 3 else image.mean(0)).to(torch.float32).numpy()
    axis.imshow(pixels.clip(0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(True)
    axis.spines[:].set_color("0.6")
