"""`tools/reproduce`: its JSON from the logits that a run keeps, its tables from the JSON, what it leaves alone."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from reproducing import curve, readme
from reproducing.experiments import EXPERIMENTS, Experiment
from reproducing.records import gather, keep, pick, read_rows, record_of, rows_of, spread
from reproducing.train import Planned, Training, trainings

from stl_lightning.cli.cost import planned_costs

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "tools" / "results"
RECORDS = readme.read_records(RESULTS)


def test_the_spread_of_seeds() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5, abs=1e-5), "n": 2, "values": [1.0, 3.0]}
    assert spread([1.0, None]) == {"mean": 1.0, "std": 0.0, "n": 1, "values": [1.0, None]}
    assert readme.percent(spread([97.5])) == "97.50"
    assert readme.percent(spread([97.0, 98.0])) == "97.50 ± 0.71"
    assert readme.percent(spread([])) == "-"


@given(
    st.lists(
        st.fixed_dictionaries(
            {"ensemble": st.floats(0, 100), "chosen": st.text(), "baseline": st.none() | st.floats(0, 100)},
            optional={"topk": st.fixed_dictionaries({"ece": st.floats(0, 1)})},
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_rows_of_seeds_can_be_taken_out_again(rows: list[dict[str, Any]]) -> None:
    """What one seed has and another has not comes back as None."""
    gathered = gather(rows)
    for i, row in enumerate(rows):
        missing = {"topk": {"ece": None}} if any("topk" in other for other in rows) else {}
        assert pick(gathered, i) == missing | row


@pytest.mark.parametrize("name", RECORDS)
def test_the_json_is_that_of_its_seeds(name: str) -> None:
    """Taken apart into single seeds and put together, it is the same to the last number; so none is typed."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = rows_of(record, EXPERIMENTS[name])
    assert record_of(name, EXPERIMENTS[name], rows, record["settings"]) == record


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_recorded_is_of_the_settings_of_today(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    planned = trainings(name, EXPERIMENTS[name], Path("/nowhere"), None, [])
    read_rows(RESULTS / f"{name}.json", EXPERIMENTS[name], planned)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", RECORDS)
def test_a_row_of_the_table_is_that_of_its_json(name: str) -> None:
    """Read here by hand, not by the code that writes the table; mean and spread from the values of the seeds."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    columns = [record[column]["values"] for column in ("mean", "highest", "ensemble", "baseline")]
    cells = " | ".join(
        "-" if not of else f"{fmean(of):.2f} ± {stdev(of):.2f}" if len(of) > 1 else f"{of[0]:.2f}" for of in columns
    )
    row = f"| {record['title']}: measured | {len(record['seeds'])} | {cells} | "
    assert row in (CHECKOUT / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name, of in EXPERIMENTS.items() if of.goal or "unsplit" in of.variants])
def test_the_unsplit_network_costs_what_all_branches_do(name: str, request: pytest.FixtureRequest) -> None:
    """That of the variant of this name, or else the conventional network that the recipe is compared with."""
    experiment = EXPERIMENTS[name]
    config = ["--config", str(CHECKOUT / experiment.config), *experiment.settings]
    if experiment.group != "digits":
        config.append(f"--data.root={request.getfixturevalue('real_data')(experiment.group)}")
    unsplit = experiment.variants.get("unsplit")
    costs = planned_costs([*config, *(unsplit.settings if unsplit else ())])
    assert costs["ratios"]["all_branches"]["multiply_adds"] == pytest.approx(1, rel=0.02)


def test_every_run_has_a_name_and_a_place_of_its_own(tmp_path: Path) -> None:
    runs = [
        run
        for name, experiment in EXPERIMENTS.items()
        for of in trainings(name, experiment, tmp_path, None, []).values()
        for run in of
    ]
    assert len({run.folder for run in runs}) == len(runs)
    assert all(f"--seed_everything={run.seed}" in command for run in runs for command in run.commands()[:1])


def test_the_images_of_an_experiment_lie_in_its_folder(tmp_path: Path) -> None:
    experiment = Experiment("Photographs", "photos", "configs/imagenet.yaml", seeds=1, folder="pictures")
    planned = trainings("photos", experiment, tmp_path, None, [], "/data", n_processes=2)
    (run,), baselines = planned[""], planned["baseline"]
    (branches,) = run.commands()
    baseline, scored = baselines[0].commands()
    assert "--data.root=/data/pictures" in baseline
    assert branches[:2] == ["launch", "--local=2"]
    assert branches[2:] == baseline[1:]  # also its name: one run
    assert scored == ["ensemble", str(tmp_path / "photos-seed0" / "baseline")]


def test_the_curve_has_a_point_for_each_number_of_slices(tmp_path: Path) -> None:
    """The recipe's own number is that of the recipe, unless a variant of the same length of training has it."""
    record = {"slices_per_branch": 2, "name": "recipe", "variants": {"reads-4": {"name": "4"}, "random": {}}}
    assert {r: row["name"] for r, row in curve.points(record).items()} == {2: "recipe", 4: "4"}
    record["variants"] = {"reads-4": {"name": "4"}, "reads-2": {"name": "short"}, "reads-1": {"name": "1"}}
    assert list(curve.points(record).items()) == [(1, {"name": "1"}), (2, {"name": "short"}), (4, {"name": "4"})]


def test_the_curve_is_drawn_from_the_json(tmp_path: Path) -> None:
    row = {name: spread([90.0 + i]) for i, name in enumerate(("mean", "highest", "ensemble", "baseline"))}
    row["costs"] = {"branch": {"bytes_read_epoch": 2e6}, "all_branches": {"multiply_adds": 3_000_000}}
    record = {"title": "Somewhere", "slices_per_branch": 1, **row, "variants": {}}
    curve.draw(record, tmp_path / "new" / "slices")
    assert not list(tmp_path.iterdir())  # of one point there is no curve
    curve.draw(record | {"variants": {"reads-2": row}}, tmp_path / "new" / "slices")
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".png", ".svg"}
    assert "Somewhere" in (tmp_path / "new" / "slices.svg").read_text()


def test_seeds_of_several_calls_come_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "digits.json"
    _keep(file, "identity", 0, 5.0)
    assert "recorded when the recipe itself" in capsys.readouterr().err
    for key, seed, value in (("", 1, 20.0), ("", 0, 10.0), ("identity", 1, 6.0), ("baseline", 1, 7.0), ("", 1, 30.0)):
        _keep(file, key, seed, value)
    record = json.loads(file.read_text())
    assert (record["seeds"], record["ensemble"]["mean"], record["ensemble"]["values"]) == ([0, 1], 20.0, [10.0, 30.0])
    assert record["baseline"] == record["variants"]["baseline"]["baseline"] == spread([7.0])
    assert record["variants"]["identity"]["ensemble"]["values"] == [6.0]
    assert [path.name for path in file.parent.iterdir()] == ["digits.json"]


def test_what_was_trained_otherwise_does_not_count_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "digits.json"
    _keep(file, "", 0, 10.0)
    other = _planned("--trainer.max_epochs=1")
    assert read_rows(file, EXPERIMENTS["digits"], _planned()) == {"": {0: _row(_planned()[""][0], 10.0)}}
    assert capsys.readouterr().err == ""
    assert not read_rows(file, EXPERIMENTS["digits"], other)[""]
    assert "digits, seed 0: was recorded with other settings" in capsys.readouterr().err


def _planned(*settings: str) -> Planned:
    return trainings("digits", EXPERIMENTS["digits"], Path("/nowhere"), None, settings)


def _row(training: Training, value: float) -> dict[str, Any]:
    name = "baseline" if training.only_baseline else "ensemble"
    return {"trained": training.trained(), name: value}


def _keep(file: Path, key: str, seed: int, value: float) -> None:
    planned = _planned()
    keep(file, planned[key][seed], _row(planned[key][seed], value), planned)


@pytest.mark.slow
def test_the_json_follows_from_the_logits_that_are_kept(tmp_path: Path) -> None:
    first = reproduce(tmp_path)
    logits = [read(tmp_path, branch, "logits") for branch in range(4)]
    labels = read(tmp_path, 0, "labels")
    correct = [100 * (of.argmax(-1) == labels).double().mean().item() for of in logits]
    assert first["mean"]["mean"] == pytest.approx(sum(correct) / 4, abs=1e-3)
    results = json.loads((tmp_path / "runs" / "digits-seed0" / "ensemble" / "results.json").read_text())
    assert first["highest"]["mean"] == pytest.approx(correct[results["highest_branch"]], abs=1e-3)
    uniform = torch.stack(logits).log_softmax(-1).mean(0)
    accuracy = 100 * (uniform.argmax(-1) == labels).double().mean().item()
    (row,) = [row for row in results["weightings"] if row["weighting"] == "uniform"]
    assert row["space"] != "log_prob" or 100 * row["test"]["accuracy"] == pytest.approx(accuracy, abs=1e-3)

    best = tmp_path / "runs" / "digits-seed0" / "branches" / "00" / "best.ckpt"
    trained_at = best.stat().st_mtime_ns
    (tmp_path / "out" / "digits.json").unlink()
    assert reproduce(tmp_path) == first  # from what is in the folder of the runs
    assert best.stat().st_mtime_ns == trained_at


def reproduce(folder: Path) -> dict[str, Any]:
    """The recipe of the digits alone, with one seed and few epochs."""
    places = [f"--runs={folder}/runs", f"--out={folder}/out"]
    few = ["--variants=", "--seeds=1", "--trainer.max_epochs=3"]
    command = [sys.executable, CHECKOUT / "tools" / "reproduce", "digits", *places, *few]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    found: dict[str, Any] = json.loads((folder / "out" / "digits.json").read_text())
    return found


def read(folder: Path, branch: int, name: str) -> torch.Tensor:
    path = folder / "runs" / "digits-seed0" / "branches" / f"{branch:02d}" / "logits" / "test.safetensors"
    return safetensors.torch.load_file(path)[name]
