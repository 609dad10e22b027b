"""`tools/reproduce`: what it plans and trains, in which precision, what it leaves alone, its JSON from kept logits."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from reproducing import readme
from reproducing.experiments import EXPERIMENTS, GROUPS, N_TEST, Experiment
from reproducing.origin import commit
from reproducing.train import call, trainings

from stl_lightning.cli.cost import planned_costs
from stl_lightning.exits import INTERRUPTED
from stl_lightning.sources import open_source

CHECKOUT = Path(__file__).resolve().parent.parent
RESULTS = CHECKOUT / "tools" / "results"
RECORDS = readme.read_records(RESULTS)


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


SOURCES = {"photos": ("imagefolder", "imagenette")}  # others are called as their group


@pytest.mark.parametrize("group", GROUPS)
def test_the_number_of_test_images(group: str, request: pytest.FixtureRequest) -> None:
    (folder,) = {experiment.folder for experiment in EXPERIMENTS.values() if experiment.group == group}
    source, data = SOURCES.get(group, (group, group))
    root = Path() if group == "digits" else request.getfixturevalue("real_data")(data) / folder
    found = open_source(source, root, image_size=64 if source == "imagefolder" else None)
    assert len(found.load("test")) == N_TEST[group]


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    def git(*args: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(
            ["git", *who, "-C", str(tmp_path), *args], check=True, capture_output=True, text=True
        ).stdout

    assert commit(tmp_path) is None
    git("init")
    assert commit(tmp_path) is None
    git("commit", "--allow-empty", "--message=first")
    head = git("rev-parse", "HEAD")[:12]
    (tmp_path / "README.md").write_text("tables")
    assert commit(tmp_path) == head
    (tmp_path / "more.py").write_text("")
    assert commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "inside").mkdir()
    assert commit(tmp_path / "inside") is None


def test_every_run_has_a_name_and_a_place_of_its_own(tmp_path: Path) -> None:
    runs = [
        run
        for name, experiment in EXPERIMENTS.items()
        for of in trainings(name, experiment, tmp_path).values()
        for run in of
    ]
    assert len({run.folder for run in runs}) == len(runs)
    assert all(f"--seed_everything={run.seed}" in command for run in runs for command in run.commands()[:1])


def test_the_images_of_an_experiment_lie_in_its_folder(tmp_path: Path) -> None:
    experiment = Experiment("Photographs", "photos", "configs/imagenet.yaml", seeds=1, folder="pictures")
    planned = trainings("photos", experiment, tmp_path, data=Path("/data"), n_processes=2)
    (run,), (baseline,) = planned["recipe"], planned["baseline"]
    for training in (run, baseline):
        train, score = training.commands()
        assert "--data.root=/data/pictures" in train
        assert score == ["ensemble", str(training.folder), "--data.root=/data/pictures"]
    assert run.commands()[0][:2] == ["launch", "--local=2"]
    assert baseline.folder == run.folder / "baseline"


def test_a_run_is_scored_with_the_ensemble_of_today(tmp_path: Path) -> None:
    planned = trainings("c", EXPERIMENTS["cifar10-best"], tmp_path, None, ["--ensemble.space=prob"], n_processes=2)
    assert planned["recipe"][0].commands()[-1][2:] == ["--ensemble.flips=true", "--ensemble.space=prob"]


MIXED, FULL = "--trainer.precision=bf16-mixed", "--trainer.precision=32-true"


def precision_of(name: str, root: Path, *settings: str) -> list[str]:
    """The settings of `trainer.precision` that the first training gets; the last one counts."""
    (training, *_) = trainings(name, EXPERIMENTS[name], root, None, settings)["recipe"]
    of_today = trainings(name, EXPERIMENTS[name], root)["recipe"][0]
    assert training.trained()["settings"] == [*of_today.trained()["settings"], *settings[1:]]  # one row, any precision
    return [arg for arg in training.commands()[0] if arg.startswith("--trainer.precision=")]


@pytest.mark.parametrize("has_it", [True, False])
def test_a_recipe_in_bfloat16_is_trained_in_float32_where_that_is_emulated(
    has_it: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("stl_lightning.training.precision.has_bfloat16", lambda _: has_it)
    assert precision_of("cifar10-best", tmp_path) == ([] if has_it else [FULL])  # its config asks for it
    assert precision_of("cifar10-poster", tmp_path) == ([MIXED] if has_it else [MIXED, FULL])
    assert precision_of("mnist-poster", tmp_path) == []
    assert precision_of("cifar10-best", tmp_path, MIXED) == [MIXED]  # whoever names one gets it


@pytest.mark.parametrize(("begun_in", "has_it"), [("bf16-mixed", False), ("32-true", True)])
def test_a_training_goes_on_in_the_precision_it_began_in(
    begun_in: str, has_it: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("stl_lightning.training.precision.has_bfloat16", lambda _: has_it)
    branch = tmp_path / "cifar10-best-seed0" / "branches" / "02"
    branch.mkdir(parents=True)
    (branch / "config.yaml").write_text(f"trainer:\n  precision: {begun_in}\n")
    assert precision_of("cifar10-best", tmp_path) == [f"--trainer.precision={begun_in}"]


def test_the_conventional_network_is_left_scored_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    baseline = trainings("digits", EXPERIMENTS["digits"], tmp_path)["baseline"][0]
    (baseline.folder / "ensemble").mkdir(parents=True)

    def scored(command: list[str], **_: object) -> None:
        weighting = [arg.partition("=")[2] for arg in command if arg.startswith("--ensemble.weighting=")]
        (baseline.folder / "ensemble" / "results.json").write_text(json.dumps({"weighting": weighting}))

    monkeypatch.setattr(subprocess, "run", scored)
    assert baseline.stacked() == {"weighting": ["stacking"]}
    assert baseline.results() == {"weighting": []}


def test_where_a_training_was_begun_stays_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not where it goes on or is recorded; and of the conventional network apart from that of its branches."""
    planned = trainings("digits", EXPERIMENTS["digits"], tmp_path)
    run, baseline = planned["recipe"][0], planned["baseline"][0]
    assert run.origin() == {"machine": None, "commit": None}
    monkeypatch.setattr("reproducing.train.call", lambda command: 0)
    for place in ("first", "second"):
        monkeypatch.setattr("reproducing.train.origin", lambda place=place: {"machine": place, "commit": None})
        assert run.carry_out() == 0
        (run.folder / "branches").mkdir(parents=True, exist_ok=True)
    assert run.origin()["machine"] == "first"
    assert baseline.origin()["machine"] is None
    assert baseline.carry_out() == 0
    assert (run.origin()["machine"], baseline.origin()["machine"]) == ("first", "second")


BAD = {
    "a row": (["--rows=recipe,identiy"], "--rows: expected some of recipe, baseline, identity"),
    "seeds": (["--seeds=4-3"], "expected a number of seeds, or the first and the last, as 3-4; got 4-3"),
    "a setting": (["--trainer.max_epochs", "3"], "settings for `stl` as --key=value; got --trainer.max_epochs"),
    "branches": (["--run.branches=[0,1]"], "--run.branches=[0,1] is set by this program"),
    "a seed": (["--seed_everything=5"], "--seed_everything=5 is set by this program: expected --seeds"),
    "no row": (["--rows="], "--rows: expected some of recipe"),
    "a misplaced name": (["--seeds", "1", "mnist"], "expected names first"),
    "data": (["--data=/nowhere"], "--data: expected the images of digits in /nowhere"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_training(case: str, tmp_path: Path) -> None:
    args, said = BAD[case]
    command = [sys.executable, CHECKOUT / "tools" / "reproduce", "digits", f"--out={tmp_path}", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    assert done.returncode
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_what_stl_refuses_is_not_tried_again(tmp_path: Path) -> None:
    where = ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "tools/reproduce", "digits", *where, "--rows=recipe,identity", "--trainer.max_epoch=2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 2
    assert done.stdout.count("== ") == 1
    assert "not carried out: digits, recipe, seed 0" in done.stderr


SLOW_TO_LEAVE = """
import signal, sys, time
signal.signal(signal.{name}, lambda *_: (time.sleep(1), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "to_group"), [("SIGINT", True), ("SIGTERM", False)])
def test_a_training_that_is_interrupted_has_time_to_save(name: str, to_group: bool) -> None:
    """Ctrl-C reaches both processes, a plain kill only the one that waits."""
    command = [sys.executable, "-c", SLOW_TO_LEAVE.format(name=name)]
    code = f"import sys; from reproducing.train import call; sys.exit(call({command!r}))"
    environment = os.environ | {"PYTHONPATH": f"{CHECKOUT / 'tools'}:{CHECKOUT}"}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True, env=environment
    ) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"ready\n"
        number = getattr(signal, name)
        os.killpg(waiting.pid, number) if to_group else os.kill(waiting.pid, number)
        assert waiting.wait(30) == 75


def test_no_other_training_begins_after_a_command_that_died_of_a_signal() -> None:
    """As `stl ensemble` does, which has nothing to save."""
    command = [sys.executable, "-c", "print('ready', flush=True); __import__('time').sleep(60)"]
    code = f"import sys; from reproducing.train import call; sys.exit(call({command!r}))"
    environment = os.environ | {"PYTHONPATH": f"{CHECKOUT / 'tools'}:{CHECKOUT}"}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"ready\n"
        waiting.terminate()
        assert waiting.wait(30) == INTERRUPTED


def test_the_code_of_a_command_is_handed_on() -> None:
    assert call([sys.executable, "-c", "raise SystemExit(3)"]) == 3


@pytest.mark.slow
def test_the_json_follows_from_the_logits_that_are_kept(tmp_path: Path) -> None:
    first = reproduce(tmp_path)
    logits = [read(tmp_path, branch, "logits") for branch in range(4)]
    labels = read(tmp_path, 0, "labels")
    correct = [100 * (of.argmax(-1) == labels).double().mean().item() for of in logits]
    assert first["mean"]["mean"] == pytest.approx(sum(correct) / 4, abs=1e-3)
    results = json.loads((tmp_path / "runs" / "digits-seed0" / "ensemble" / "results.json").read_text())
    assert first["highest"]["mean"] == pytest.approx(correct[results["highest_branch"]], abs=1e-3)
    (row,) = [row for row in results["weightings"] if row["weighting"] == "uniform"]
    outputs = torch.stack(logits).double()
    spaces = {"logits": outputs, "log_prob": outputs.log_softmax(-1), "prob": outputs.softmax(-1)}
    uniform = spaces[row["space"]].mean(0)
    accuracy = 100 * (uniform.argmax(-1) == labels).double().mean().item()
    assert first["weightings"]["uniform"]["accuracy"]["values"] == [pytest.approx(accuracy, abs=1e-3)]

    best = tmp_path / "runs" / "digits-seed0" / "branches" / "00" / "best.ckpt"
    trained_at = best.stat().st_mtime_ns
    (tmp_path / "out" / "digits.json").unlink()
    assert reproduce(tmp_path) == first  # from what is in the folder of the runs
    assert best.stat().st_mtime_ns == trained_at

    file = tmp_path / "out" / "digits.json"
    file.write_text(json.dumps(first | {"ensemble": first["ensemble"] | {"values": [12.34]}}))
    assert "has no run whose accuracy is in" in call_reproduce(tmp_path, "--figures").stderr
    assert not (tmp_path / "out" / "digits").exists()

    file.unlink()
    best.write_bytes(best.read_bytes()[:1000])
    partial = call_reproduce(tmp_path)
    assert partial.returncode
    assert "digits, recipe, seed 0: not recorded, for the ensemble lacks branches: branch 0: " in partial.stderr
    assert not file.exists()


def call_reproduce(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    """The recipe of the digits alone, with one seed and few epochs."""
    places = [f"--runs={folder}/runs", f"--out={folder}/out"]
    few = ["--rows=recipe", "--seeds=1", "--trainer.max_epochs=3"]
    command = [sys.executable, CHECKOUT / "tools" / "reproduce", "digits", *places, *few, *args]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})


def reproduce(folder: Path) -> dict[str, Any]:
    done = call_reproduce(folder)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "out" / "digits.json").read_text())
    return found


def read(folder: Path, branch: int, name: str) -> torch.Tensor:
    path = folder / "runs" / "digits-seed0" / "branches" / f"{branch:02d}" / "logits" / "test.safetensors"
    return safetensors.torch.load_file(path)[name]
