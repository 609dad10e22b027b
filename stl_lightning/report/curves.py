"""Figures over epochs: the branches, and the ensemble they would have made."""

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, Any

from stl_lightning.report.looks import (
    BASELINE,
    BLUE,
    GREY,
    ORANGE,
    WIDTH,
    mapped_colourbar,
    of_branch,
    percent,
    scale_y,
    whole_epochs,
)
from stl_lightning.report.material import Material
from stl_lightning.report.progress import ensemble_curves, single_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_NAMES = 8  # branches that a legend names; of more, a colour bar tells
COLOURS = (BLUE, ORANGE, GREY)


def draw_loss(figure: "Figure", material: Material) -> None:
    """The validation loss of every branch after every epoch; a dot where it is lowest."""
    figure.set_size_inches(WIDTH, 4.2)
    axis = figure.subplots()
    values: list[float] = []
    for i, (branch, columns) in enumerate(material.epochs.items()):
        looks = {"color": of_branch(i, len(material.epochs)), "label": f"branch {branch}", "linewidth": 1.4}
        values += _line(axis, columns, looks)
    if material.baseline_epochs:
        values += _line(axis, material.baseline_epochs, BASELINE | {"label": "baseline"})
    scale_y(axis, values)
    axis.set(ylabel="validation loss (nats)", title="validation loss of every branch; dots: the lowest")
    whole_epochs(axis)
    if len(material.epochs) > MOST_NAMES:
        mapped_colourbar(figure, axis, list(material.epochs), "branch")
    handles, labels = axis.get_legend_handles_labels()
    named = [i for i, label in enumerate(labels) if len(material.epochs) <= MOST_NAMES or label == "baseline"]
    if named:
        figure.legend([handles[i] for i in named], [labels[i] for i in named], loc="outside lower center", ncols=5)


def _line(axis: "Axes", columns: Mapping[str, list[float]], looks: Mapping[str, Any]) -> list[float]:
    """Draw the losses of one network, with a dot at the lowest; returns those that are finite."""
    points = [
        (epoch + 1, loss)
        for epoch, loss in zip(columns.get("epoch", []), columns.get("val/loss", []), strict=True)
        if isfinite(loss)
    ]
    if points:
        axis.plot(*zip(*points, strict=True), **looks)
        axis.plot(*min(points, key=lambda point: point[1]), marker="o", markersize=5, color=looks["color"])
    return [loss for _, loss in points]


def draw_ensemble(figure: "Figure", material: Material) -> None:
    """Loss and accuracy after every epoch of the branches' weighted sum, of the best branch and of the baseline."""
    assert material.logits is not None, "the table of figures asks for them"
    assert material.labels is not None, "the table of figures asks for them"
    figure.set_size_inches(WIDTH, 4.4)
    loss, accuracy = figure.subplots(1, 2)
    curves = ensemble_curves(material.logits, material.labels)
    # The first on top: a weighted sum that gives one branch all the weight has the curve of that branch.
    looks: dict[str, dict[str, Any]] = {
        name: {"color": colour, "zorder": 3 - 0.1 * i}
        for i, (name, colour) in enumerate(zip(curves, COLOURS, strict=True))
    }
    if material.baseline_logits is not None:
        curves["baseline"] = single_curve(material.baseline_logits, material.labels)
        looks["baseline"] = BASELINE
    for name, curve in curves.items():
        epochs = [epoch + 1 for epoch in curve.epochs]
        marker = "o" if len(epochs) == 1 else ""
        loss.plot(epochs, curve.nll, label=name, marker=marker, **looks[name])
        accuracy.plot(epochs, percent(curve.accuracy), marker=marker, **looks[name])
    scale_y(loss, [value for curve in curves.values() for value in curve.nll])
    loss.set(ylabel="validation loss (nats)")
    accuracy.set(ylabel="validation accuracy (%)")
    whole_epochs(loss)
    whole_epochs(accuracy)
    n = len(material.labels)
    figure.suptitle(f"weights fitted on {n // 2:,} validation images, shown on {n - n // 2:,} others", fontsize=10)
    figure.legend(loc="outside lower center", ncols=4)
