"""Figures over branches: how many are needed, what each weighs, how far they differ."""

from typing import TYPE_CHECKING

import numpy as np

from stl_lightning.report.looks import BASELINE, BLUE, GREY, MAPPED, ORANGE, RED, WIDTH, percent, scale_y
from stl_lightning.report.material import Material

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CELLS = 10  # branches up to which every number of the matrix is written out


def draw_members(figure: "Figure", material: Material) -> None:
    """Test accuracy of the best n branches, and of what is left when the heaviest are lost."""
    figure.set_size_inches(WIDTH, 4.2)
    axis = figure.subplots()
    results = material.results
    best = results["by_members"]
    axis.plot(
        [row["n"] for row in best], percent([row["test"]["accuracy"] for row in best]), "o-", color=BLUE,
        label=f"the best n by validation accuracy, {best[-1]['weighting']} weights fitted anew",
    )  # fmt: skip
    lost = results.get("lost", {}).get("worst", [])
    if lost:
        n_left = [len(results["members"]) - k for k in (0, *(row["k"] for row in lost))]
        accuracy = percent([scores["accuracy"] for scores in (results["ensemble"], *(row["test"] for row in lost))])
        axis.plot(n_left, accuracy, "s--", color=ORANGE, label="the ensemble, the heaviest lost first")
    axis.axhline(100 * results["highest"], color=GREY, linestyle=":", label="best branch")
    if material.baseline:
        axis.axhline(100 * material.baseline["accuracy"], label="baseline", **BASELINE)
    axis.set(xlabel="branches in the ensemble", ylabel="test accuracy (%)")
    axis.set_xticks(_few([row["n"] for row in best]))
    figure.legend(loc="outside lower center", ncols=2)


def draw_weights(figure: "Figure", material: Material) -> None:
    """What every branch weighs in the sum, above the energy of its slice."""
    figure.set_size_inches(WIDTH, 4.4)
    above, below = figure.subplots(2, 1, sharex=True)
    places = range(len(material.rows))
    weights = [row["weight"] or 0.0 for row in material.rows]
    above.bar(places, weights, color=[ORANGE if weight >= 0 else RED for weight in weights])
    above.set(ylabel="weight", title=f"weight of every branch ({material.results['weighting']})")
    above.axhline(1 / len(weights), color=GREY, linestyle=":")
    above.annotate("equal", (1.005, 1 / len(weights)), xycoords=("axes fraction", "data"), fontsize=8, va="center")
    energies = [sum(material.sample.energies[k] for k in row["slices"]) for row in material.rows]
    below.bar(places, percent(energies), color=BLUE)
    scale_y(below, percent(energies))
    below.set(ylabel="energy (%)", title="energy of what it reads", xlabel="branch: frequency (u, v) of its slice")
    names = [f"{row['branch']}\n({row['frequency'][0]}, {row['frequency'][1]})" for row in material.rows]
    shown = _few(list(places))
    below.set_xticks(shown, [names[i] for i in shown], fontsize=8)
    for axis in (above, below):
        axis.grid(axis="x", visible=False)


def draw_disagreement(figure: "Figure", material: Material) -> None:
    """On how many test images each two branches predict different classes: colours from the least to the most."""
    matrix = np.array([percent(row) for row in material.results["disagreement"]])
    np.fill_diagonal(matrix, np.nan)  # its zeros would take most of the colours
    figure.set_size_inches(6.2, 5.2)
    axis = figure.subplots()
    axis.grid(visible=False)
    drawn = axis.imshow(matrix, cmap=MAPPED)
    shown = _few(list(range(len(matrix))))
    names = [str(material.results["members"][i]) for i in shown]
    axis.set_xticks(shown, names)
    axis.set_yticks(shown, names)
    axis.set(xlabel="branch", ylabel="branch")
    figure.colorbar(drawn, label="different predictions (% of test images)", shrink=0.85)
    if len(matrix) > MOST_CELLS:
        return
    middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
    for (i, j), value in np.ndenumerate(matrix):
        if i != j:
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if value <= middle else "black")


def _few(places: list[int]) -> list[int]:
    """So many of them, evenly, that their names do not touch."""
    return places[:: -(-len(places) // 16)]
