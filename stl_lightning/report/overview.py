"""Training and inference as one picture: image, slices, branches, weights, ensemble, with the numbers of a run."""

from typing import TYPE_CHECKING, Any

from stl_lightning.ranges import as_ranges
from stl_lightning.report.looks import BLUE, GREY, ORANGE, RED, WIDTH, shortened, show_image, show_slice
from stl_lightning.report.material import Material
from stl_lightning.report.pictures import pixels, split_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 16  # branches that there is room for
MOST_READING = 8  # rows, up to which a line shows every slice that a branch reads
# All in inches.
ROW, HEAD, FOOT = 0.6, 0.62, 0.66
IMAGE, SLICE, BRANCH, WEIGHT, SUM = (0.12, 1.42), (2.0, 2.5), (2.85, 4.85), (5.35, 6.05), (6.85, 8.38)  # columns
EDGE = 6.2  # of weights and their numbers, where lines to the sum begin
ARROW = {"arrowstyle": "-|>", "color": GREY, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}


def draw_overview(figure: "Figure", material: Material) -> None:
    """One row a branch; of more than `MOST_ROWS`, the first and the last."""
    shown = _shown(material.rows)
    height = HEAD + FOOT + ROW * max(3, len(shown))
    figure.set_size_inches(WIDTH, height)
    figure.set_layout_engine("none")
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, WIDTH), ylim=(0, height))
    page.set_axis_off()
    middle = FOOT + (height - HEAD - FOOT) / 2
    top = middle + ROW * (len(shown) - 1) / 2
    ys = {row["slices"][0]: top - ROW * i for i, row in enumerate(shown) if row is not None}  # of the slice in a row
    _heads(page, material, height)
    _image(figure, page, material, middle)
    for i, row in enumerate(shown):
        y = top - ROW * i
        if row is None:
            page.text(sum(BRANCH) / 2, y, "⋮", ha="center", va="center", fontsize=14)
        else:
            _branch(figure, page, material, row, y, middle)
            for also_read in (ys[k] for k in row["slices"][1:] if k in ys and len(shown) <= MOST_READING):
                page.plot([SLICE[1] + 0.04, BRANCH[0]], [also_read, y], color=GREY, linewidth=0.5, alpha=0.6)
    _sum(page, material, middle)
    _foot(page, material)


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any] | None]:
    if len(rows) <= MOST_ROWS:
        return list(rows)
    return [*rows[: MOST_ROWS // 2], None, *rows[len(rows) - MOST_ROWS // 2 + 1 :]]


def _heads(page: "Axes", material: Material, height: float) -> None:
    n_slices, shape = len(material.sample.slices), material.sample.slices[0].shape
    heads = {
        IMAGE: f"image\n{pixels(material.sample.image.shape)}",
        SLICE: f"{n_slices} slice{'s' if n_slices > 1 else ''}\n{pixels(shape)}",
        BRANCH: "branches: parameters,\nvalidation accuracy",
        WEIGHT: "weights\n",
        SUM: "ensemble\n",
    }
    for (left, right), text in heads.items():
        page.text((left + right) / 2, height - 0.1, text, ha="center", va="top", fontsize=9.5, linespacing=1.3)


def _image(figure: "Figure", page: "Axes", material: Material, y: float) -> None:
    size = IMAGE[1] - IMAGE[0]
    show_image(_inset(figure, IMAGE[0], y - size / 2, size), material.sample.image)
    settings = material.results["settings"]
    for offset, text in ((0.08, shortened(material.sample.label)), (0.27, split_text(settings).replace(", ", "\n"))):
        page.text(sum(IMAGE) / 2, y - size / 2 - offset, text, ha="center", va="top", fontsize=8.5)


def _branch(figure: "Figure", page: "Axes", material: Material, row: dict[str, Any], y: float, middle: float) -> None:
    sample, k, size = material.sample, row["slices"][0], SLICE[1] - SLICE[0]
    page.annotate("", (SLICE[0] - 0.03, y), (IMAGE[1] + 0.06, middle), arrowprops=ARROW)
    show_slice(_inset(figure, SLICE[0], y - size / 2, size), sample.slices[k], len(sample.image))
    page.annotate("", (BRANCH[0], y), (SLICE[1] + 0.04, y), arrowprops=ARROW)
    reads = f": slices {as_ranges(sorted(row['slices']))}" if len(row["slices"]) > 1 else ""
    text = f"branch {row['branch']}{reads}\n{row['n_parameters']:,},  {100 * row['val']['accuracy']:.1f} %"
    _box(page, BRANCH, y, 0.46, text, BLUE)
    page.annotate("", (WEIGHT[0] - 0.04, y), (BRANCH[1], y), arrowprops=ARROW)
    _weight(page, material, row["weight"], y)
    page.annotate("", (SUM[0], middle), (EDGE, y), arrowprops=ARROW)


def _weight(page: "Axes", material: Material, weight: float | None, y: float) -> None:
    most = max((abs(row["weight"] or 0.0) for row in material.rows), default=0.0) or 1.0
    if weight is not None:
        length = (WEIGHT[1] - WEIGHT[0]) * abs(weight) / most
        page.barh(y + 0.1, length, 0.15, left=WEIGHT[0], color=ORANGE if weight >= 0 else RED)
    page.plot([WEIGHT[0]] * 2, [y + 0.01, y + 0.19], color="black", linewidth=0.8)
    page.text(WEIGHT[0], y - 0.02, "-" if weight is None else f"{weight:.3f}", va="top", fontsize=8.5)


def _sum(page: "Axes", material: Material, y: float) -> None:
    results = material.results
    lines = [f"{results['weighting']}", f"on {results['space']}", f"test {100 * results['ensemble']['accuracy']:.2f} %"]
    _box(page, SUM, y, 0.85, "\n".join(lines), ORANGE)
    beside = [f"best branch {100 * results['highest']:.2f} %"]
    beside += [f"baseline {100 * material.baseline['accuracy']:.2f} %"] if material.baseline else []
    page.text(sum(SUM) / 2, y - 0.52, "\n".join(beside), ha="center", va="top", fontsize=8.5, linespacing=1.4)


def _foot(page: "Axes", material: Material) -> None:
    sent = material.results["traffic"]["bytes_sent"]
    counted = "bytes sent: not counted" if sent is None else f"{sent:,} bytes sent"
    parts = {
        (SLICE[0], BRANCH[1]): f"training: each branch alone, {counted}",
        (WEIGHT[0], SUM[1]): "inference: the weighted sum of outputs",
    }
    for (left, right), text in parts.items():
        page.plot([left, left, right, right], [0.46, 0.38, 0.38, 0.46], color="black", linewidth=1)
        page.text((left + right) / 2, 0.31, text, ha="center", va="top", fontsize=9)


def _box(page: "Axes", column: tuple[float, float], y: float, height: float, text: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, right = column
    style = "round,pad=0,rounding_size=0.08"
    page.add_patch(
        FancyBboxPatch((left, y - height / 2), right - left, height, style, facecolor="white", edgecolor=colour, lw=1.5)
    )
    page.text((left + right) / 2, y, text, ha="center", va="center", fontsize=9, linespacing=1.25)


def _inset(figure: "Figure", left: float, bottom: float, size: float) -> "Axes":
    width, height = figure.get_size_inches()
    return figure.add_axes((left / width, bottom / height, size / width, size / height))
