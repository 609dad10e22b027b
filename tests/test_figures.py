"""Figures: readable whatever the run looks like, true to its files, and the same each time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from stl_lightning.__main__ import main
from stl_lightning.cli.report import take_sample
from stl_lightning.ensemble.metrics import disagreement
from stl_lightning.errors import ConfigError
from stl_lightning.paths import RunPaths
from stl_lightning.report.figures import FIGURES, FORMATS, make, write_figures
from stl_lightning.report.looks import WIDTH
from stl_lightning.report.material import Material, Sample
from stl_lightning.report.progress import ensemble_curves, single_curve
from stl_lightning.spectral import SpectralSplit

pytest.importorskip("matplotlib")

DIGITS = str(Path(__file__).resolve().parent.parent / "configs" / "digits.yaml")
QUICK = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

# image shape, block, reorganisation, transform, members that are missing, epochs, baseline, class name
CASES: dict[str, tuple[tuple[int, int, int], Any, str, str, int, int, bool, str]] = {
    "digits": ((1, 8, 8), 2, "polyphase", "dct2", 0, 30, True, "7"),
    "photographs": ((3, 64, 64), 4, "polyphase", "dct2", 0, 20, True, "tench, Tinca tinca, a fish of still waters"),
    "complex": ((3, 8, 8), 4, "tiles", "dft", 0, 3, False, "cat"),
    "one branch": ((1, 8, 8), 1, "polyphase", "identity", 0, 1, True, "0"),
    "many branches": ((1, 64, 64), 8, "polyphase", "hadamard", 0, 5, False, "sandal"),
    "partial": ((3, 32, 32), 4, "polyphase", "dct2", 13, 12, True, "airplane"),
    "oblong": ((1, 8, 12), (1, 3), "polyphase", "dct2", 0, 7, False, "shirt"),
}


def smooth(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Something like images in [0, 1]: noise of which high frequencies hold little."""
    noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(seed))
    blurred = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1)
    return ((blurred - blurred.min()) / (blurred.max() - blurred.min())).float()


def material(case: str) -> Material:
    shape, block, reorganisation, transform, n_missing, n_epochs, has_baseline, label = CASES[case]
    split, rng = SpectralSplit(shape, block, reorganisation, transform), np.random.default_rng(0)
    images = smooth(shape)
    slices = split(images)
    energy = torch.stack([part.square().sum() for part in slices])
    members = list(range(n_missing, split.n_slices))
    n, n_classes = 60, 10
    labels = torch.from_numpy(rng.integers(0, n_classes, n))
    truth = torch.nn.functional.one_hot(labels, n_classes).numpy()

    def logits(skill: float) -> np.ndarray:
        growth = np.linspace(0.2, 1, n_epochs)[:, None, None]
        return (growth * skill * truth + rng.normal(size=(n_epochs, n, n_classes))).astype(np.float16)

    def metrics(skill: float) -> dict[str, list[float]]:
        return {
            "epoch": [float(e) for e in range(n_epochs)],
            "val/loss": list(2.3 * np.exp(-skill * np.arange(n_epochs))),
        }

    def scores(accuracy: float) -> dict[str, float]:
        return {"accuracy": accuracy, "nll": 1.0}

    of_members = [logits(4 / (1 + i)) for i in range(len(members))]
    rows = [
        {"branch": b, "slices": [b], "frequency": list(split.frequencies[b]), "n_parameters": 123_456_789,
         "val": scores(0.9 / (1 + i)), "test": scores(0.9 / (1 + i)), "weight": 1 / (1 + i) - 0.05}
        for i, b in enumerate(members)
    ]  # fmt: skip
    results = {
        "settings": {"reorganisation": reorganisation, "block": list(split.block), "transform": transform},
        "members": members, "branches": rows, "highest": 0.9, "ensemble": scores(0.95),
        "baseline": scores(0.96) if has_baseline else None, "weighting": "inverse_loss", "space": "log_prob",
        "traffic": {"bytes_sent": 1_234_567 if n_missing else 0},
        "disagreement": disagreement(torch.from_numpy(np.stack([x[-1] for x in of_members]))).tolist(),
        "by_members": [
            {"n": i + 1, "weighting": "simplex", "test": scores(0.9 + 0.05 * (i + 1) / len(members))}
            for i in range(len(members))
        ],
        "lost": {"worst": [{"k": k, "test": scores(0.9 - 0.4 * k / len(members))} for k in range(1, len(members))]},
    }  # fmt: skip
    return Material(
        results,
        {b: metrics(0.1 / (1 + i)) for i, b in enumerate(members)},
        metrics(0.2) if has_baseline else {},
        of_members,
        logits(4) if has_baseline else None,
        labels,
        Sample(images[0], label, [part[0] for part in slices], split.frequencies, (energy / energy.sum()).tolist()),
    )


@pytest.fixture(scope="module", params=CASES)
def drawn_case(request: pytest.FixtureRequest) -> Material:
    return material(request.param)


@pytest.fixture
def written_texts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any]]]:
    """What is really written when a figure is drawn, and where, in pixels."""
    from matplotlib.text import Text

    written: list[tuple[str, Any]] = []
    draw = Text.draw

    def note(self: Text, renderer: Any, *args: Any, **kwargs: Any) -> None:
        if self.get_visible() and self.get_text().strip():
            written.append((self.get_text(), Text.get_window_extent(self, renderer)))
        draw(self, renderer, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", note)
    return written


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_touches_another_or_the_edge(
    name: str, drawn_case: Material, written_texts: list[tuple[str, Any]]
) -> None:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if FIGURES[name].lacks(drawn_case):
        pytest.skip("this run has no such figure")
    figure = make(name, drawn_case)
    FigureCanvasAgg(figure).draw()
    width, height = figure.bbox.width, figure.bbox.height
    assert figure.get_size_inches()[0] <= WIDTH
    assert len(written_texts) > 3
    for i, (text, box) in enumerate(written_texts):
        assert box.x0 >= -1, text
        assert box.y0 >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text
        touching = [other for other, its in written_texts[:i] if box.padded(-0.5).overlaps(its.padded(-0.5))]
        assert not touching, text
    for axis in figure.findobj(Axes):
        for one, side in ((axis.xaxis, "labelbottom"), (axis.yaxis, "labelleft")):
            has_numbers = axis.axison and len(one.get_majorticklocs()) and one.get_tick_params()[side]
            assert one.get_label_text() or not has_numbers, "an axis with numbers says of what"


def test_figures_are_the_same_each_time_and_those_without_data_are_removed(tmp_path: Path) -> None:
    full = material("oblong")
    assert set(write_figures(full, tmp_path).values()) == {None}
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(before) == len(FIGURES) * len(FORMATS)
    less = Material(**vars(full) | {"logits": None, "results": full.results | {"by_members": []}})
    reasons = {name: reason for name, reason in write_figures(less, tmp_path).items() if reason is not None}
    assert set(reasons) == {"fig4-ensemble", "members"}
    assert "run.epoch_logits" in reasons["fig4-ensemble"]
    assert "stl ensemble" in reasons["members"]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == {name: content for name, content in before.items() if name.split(".")[0] not in reasons}


def test_plotted_numbers_are_those_of_the_run() -> None:
    """Read from the figures: in percent, at their epoch or number of branches, each under its name."""
    run = material("digits")

    def lines(name: str, panel: int = 0) -> dict[str, tuple[list[float], list[float]]]:
        drawn = make(name, run).axes[panel].get_lines()
        return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn}

    of_members = lines("members")
    best = of_members["the best n by validation accuracy, simplex weights fitted anew"]
    assert best == ([1, 2, 3, 4], pytest.approx([91.25, 92.5, 93.75, 95]))
    assert of_members["the ensemble, the heaviest lost first"] == ([4, 3, 2, 1], pytest.approx([95, 80, 70, 60]))
    assert of_members["best branch"][1] == pytest.approx([90, 90])
    assert of_members["baseline"][1] == pytest.approx([96, 96])

    losses = lines("fig3-loss")
    for label, columns in {**{f"branch {b}": run.epochs[b] for b in range(4)}, "baseline": run.baseline_epochs}.items():
        assert losses[label] == ([epoch + 1 for epoch in columns["epoch"]], columns["val/loss"])

    assert run.logits is not None
    assert run.labels is not None
    assert run.baseline_logits is not None
    curves = ensemble_curves(run.logits, run.labels) | {"baseline": single_curve(run.baseline_logits, run.labels)}
    of_loss, of_accuracy = lines("fig4-ensemble"), lines("fig4-ensemble", panel=1)
    for (name, curve), accuracy in zip(curves.items(), of_accuracy.values(), strict=True):
        epochs = [epoch + 1 for epoch in curve.epochs]
        assert of_loss[name] == (epochs, curve.nll)
        assert accuracy == (epochs, pytest.approx([100 * value for value in curve.accuracy]))

    weights, energies = ([bar.get_height() for bar in axis.patches] for axis in make("weights", run).axes)
    assert weights == [row["weight"] for row in run.rows]
    assert energies == pytest.approx([100 * share for share in run.sample.energies])
    (shown,) = make("disagreement", run).axes[0].images
    expected = 100 * np.array(run.results["disagreement"])
    np.fill_diagonal(expected, np.nan)
    np.testing.assert_allclose(shown.get_array().filled(np.nan), expected)


def random_members(n_epochs: tuple[int, ...] = (3, 3, 2)) -> tuple[list[np.ndarray], Tensor]:
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 5, 40))
    truth = 3 * torch.nn.functional.one_hot(labels, 5).numpy()
    return [
        (rng.normal(size=(n, 40, 5)) + truth * (i + 1) / 3).astype(np.float16) for i, n in enumerate(n_epochs)
    ], labels


def test_equal_weights_are_the_mean_of_log_probabilities() -> None:
    """Recomputed in NumPy on the second half; the member that ended first keeps its last outputs."""
    members, labels = random_members()
    curve = ensemble_curves(members, labels)["ensemble, equal weights"]
    for epoch, (loss, accuracy) in enumerate(zip(curve.nll, curve.accuracy, strict=True)):
        logits = np.stack([of[min(epoch, len(of) - 1)] for of in members]).astype(np.float64)
        mean = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).mean(0)
        log_probs = (mean - np.log(np.exp(mean).sum(-1, keepdims=True)))[20:]
        assert loss == pytest.approx(-log_probs[np.arange(20), labels[20:]].mean())
        assert accuracy == pytest.approx((log_probs.argmax(-1) == labels[20:].numpy()).mean())


def test_curves_are_scored_on_images_that_nothing_was_fitted_to() -> None:
    """With the first half of the labels wrong, weights go wrong; with the second half wrong, scores alone do."""
    members, labels = random_members()
    skilled = [10 * members[2], members[0] * 0]  # one knows, one does not
    honest = ensemble_curves(skilled, labels)
    wrong = (labels + 1) % 5
    misled = ensemble_curves(skilled, torch.cat([wrong[:20], labels[20:]]))
    assert misled["ensemble, weights fitted"].nll[0] > honest["ensemble, weights fitted"].nll[0] + 0.3
    assert misled["ensemble, equal weights"] == honest["ensemble, equal weights"]


def test_an_ensemble_of_one_is_that_one() -> None:
    members, labels = random_members()
    alone = single_curve(members[0], labels)
    for curve in ensemble_curves(members[:1], labels).values():
        assert curve.nll == pytest.approx(alone.nll)
        assert curve.accuracy == pytest.approx(alone.accuracy)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    root = tmp_path_factory.mktemp("runs")
    settings = ["--config", DIGITS, f"--run.root={root}", *QUICK]
    assert main(["run", *settings]) == 0
    return RunPaths(root / "digits")


def test_a_run_is_reported(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run.folder), "--image", "3"]) == 0
    printed = capsys.readouterr().out
    assert "left out" not in printed
    assert f"{100 * json.loads(run.results.read_text())['ensemble']['accuracy']:.2f}" in printed
    written = {path.name for path in (run.folder / "report").iterdir()}
    assert written == {f"{name}.{kind}" for name in FIGURES for kind in FORMATS}


def test_the_sample_is_of_the_validation_images(run: RunPaths, tmp_path: Path) -> None:
    """The slices of a store and those of the images are the same; their energies add up; the inverse is an image."""
    sample = take_sample(run, image=5)
    with safe_open(run.branch(0).logits("val"), framework="pt") as file:
        labels = file.get_tensor("labels").tolist()
    assert sample.label == str(labels[5]) != str(labels[0])
    assert sum(sample.energies) == pytest.approx(1)
    assert float(sample.image.min()) > -1e-5
    assert float(sample.image.max()) < 1 + 1e-5
    assert main(["prepare", "--config", DIGITS, f"--data.store={tmp_path / 'store'}"]) == 0
    stored = take_sample(run, image=5, overrides=[f"--data.store={tmp_path / 'store'}"])
    assert stored.label == sample.label
    torch.testing.assert_close(stored.slices, sample.slices)
    torch.testing.assert_close(stored.image, sample.image)
    assert stored.energies == pytest.approx(sample.energies)
    with pytest.raises(ConfigError, match="--image"):
        take_sample(run, image=10_000)


def test_what_cannot_be_reported(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "stl ensemble" in capfd.readouterr().err
    monkeypatch.setattr("stl_lightning.report.figures.find_spec", lambda name: None)
    assert main(["report", str(tmp_path)]) == 2
    assert ".[report]" in capfd.readouterr().err
