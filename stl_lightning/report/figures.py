"""The figures of a run: `FIGURES`, and how they become files. matplotlib is imported when one is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stl_lightning.errors import ConfigError
from stl_lightning.paths import write_atomically
from stl_lightning.report.curves import draw_ensemble, draw_loss
from stl_lightning.report.looks import DPI, STYLE
from stl_lightning.report.material import Material
from stl_lightning.report.members import draw_disagreement, draw_members, draw_weights
from stl_lightning.report.overview import draw_overview
from stl_lightning.report.pictures import draw_slices

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Without the moment of writing, so that the same figure gives the same file.
FORMATS: dict[str, dict[str, Any]] = {"png": {}, "svg": {"metadata": {"Date": None}}}


def nothing(_: Material) -> None:
    """For figures that every evaluated run has."""


def no_epoch_logits(material: Material) -> str | None:
    if material.logits is None or material.logits[0].shape[1] < 2:
        return "not every branch has kept logits of two images or more after every epoch (run.epoch_logits)"
    if material.labels is None:
        return "the labels beside the logits cannot be read; repeat `stl ensemble`"
    return None


def no_members_table(material: Material) -> str | None:
    return None if material.results.get("by_members") else "results.json has no by_members; repeat `stl ensemble`"


def one_member(material: Material) -> str | None:
    return "there is one branch only" if len(material.rows) == 1 else None


@dataclass(frozen=True)
class Picture:
    """A row of `FIGURES`; `lacks` says why it cannot be drawn, if it cannot."""

    draw: Callable[["Figure", Material], None]
    lacks: Callable[[Material], str | None] = nothing


FIGURES = {
    "fig1-slices": Picture(draw_slices),
    "fig2-overview": Picture(draw_overview),
    "fig3-loss": Picture(draw_loss),
    "fig4-ensemble": Picture(draw_ensemble, no_epoch_logits),
    "members": Picture(draw_members, no_members_table),
    "weights": Picture(draw_weights),
    "disagreement": Picture(draw_disagreement, one_member),
}


def require_matplotlib() -> None:
    """Raises: ConfigError that says how to install it."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "stl report draws with matplotlib, which is not installed: pip install -e '.[report]' in the checkout"
        )


def make(name: str, material: Material) -> "Figure":
    """One figure of the table, drawn but not written."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained", dpi=DPI)  # not of pyplot, which would keep it
        FIGURES[name].draw(figure, material)
    return figure


def write_figures(material: Material, folder: Path) -> dict[str, str | None]:
    """Write every figure that this run has as PNG and as SVG; returns, by name, why one was left out.

    Files of an earlier report that would no longer be true are removed.
    Raises: RunError if the folder cannot be written to.
    """
    reasons = {name: picture.lacks(material) for name, picture in FIGURES.items()}
    for name, reason in reasons.items():
        paths = {kind: folder / f"{name}.{kind}" for kind in FORMATS}
        if reason is None:
            _write(make(name, material), paths)
        else:
            for path in paths.values():
                path.unlink(missing_ok=True)
    return reasons


def _write(figure: "Figure", paths: dict[str, Path]) -> None:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for kind, path in paths.items():
            write_atomically(path, partial(figure.savefig, format=kind, **FORMATS[kind]))
