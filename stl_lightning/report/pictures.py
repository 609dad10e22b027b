"""The slices of one image, as a figure."""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from stl_lightning.report.looks import WIDTH, share_text, shortened, show_image, show_slice
from stl_lightning.report.material import Material, Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_slices(figure: "Figure", material: Material) -> None:
    """The image on the left, its slices on the right, where frequencies have two axes in their order."""
    sample = material.sample
    n_rows, n_columns = grid(sample)
    figure.set_size_inches(WIDTH, max(3.2, 4.9 * n_rows / n_columns + 0.25 * n_rows + 0.4))
    panels: Any = figure.subfigures(1, 2, width_ratios=(3.0, 5.5))
    left, right = panels
    axis = left.subplots()
    show_image(axis, sample.image)
    axis.set_title(f"validation image: {shortened(sample.label)}")
    axis.set_xlabel(f"{pixels(sample.image.shape)} pixels\n{split_text(material.results['settings'])}  →")
    axes = right.subplots(n_rows, n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for k, (row, column) in enumerate(places(sample)):
        axes[row][column].set_axis_on()
        show_slice(axes[row][column], sample.slices[k], len(sample.image))
        u, v = sample.frequencies[k]
        title = f"{k}: ({u}, {v})\n{share_text(sample.energies[k])}"
        axes[row][column].set_title(title, fontsize=8, loc="center")
    text = f"slices of {pixels(sample.slices[0].shape)} with (u, v) and their share of the energy of validation images"
    right.supxlabel(text, fontsize=9)


def grid(sample: Sample) -> tuple[int, int]:
    """Rows and columns for the slices: one each for the frequencies of a plane, near a square otherwise."""
    if is_plane(sample):
        return max(u for u, _ in sample.frequencies) + 1, max(v for _, v in sample.frequencies) + 1
    n_columns = ceil(len(sample.slices) ** 0.5)
    return ceil(len(sample.slices) / n_columns), n_columns


def places(sample: Sample) -> Sequence[tuple[int, int]]:
    """Row and column of every slice."""
    _, n_columns = grid(sample)
    return sample.frequencies if is_plane(sample) else [divmod(k, n_columns) for k in range(len(sample.slices))]


def is_plane(sample: Sample) -> bool:
    return any(u for u, _ in sample.frequencies)


def pixels(shape: Sequence[int]) -> str:
    return f"{shape[-2]} × {shape[-1]}"


def split_text(settings: dict[str, Any]) -> str:
    height, width = settings["block"]
    return f"{settings['reorganisation']} {height} × {width}, {settings['transform']}"
