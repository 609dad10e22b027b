"""`tools/reproduce`: its JSON from the logits that a run keeps, its tables from the JSON, what it leaves alone."""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from reproducing import curve, readme
from reproducing.experiments import EXPERIMENTS, GROUPS, N_TEST, Experiment, reads, shorter
from reproducing.records import (
    DERIVED,
    SHARED,
    check_rows,
    combine,
    gather,
    keep,
    pick,
    read_rows,
    record_of,
    rows_of,
    spread,
    take_apart,
    without,
)
from reproducing.summary import commit
from reproducing.train import Planned, Training, call, trainings

from stl_lightning.cli.cost import planned_costs
from stl_lightning.exits import INTERRUPTED
from stl_lightning.sources import open_source

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


def test_what_seeds_have_in_common_must_be_the_same() -> None:
    rows = {seed: {"trained": {"config": "a"}, "costs": {"n": 3}, "mean": float(seed)} for seed in (2, 0)}
    assert take_apart(combine(rows)) == rows
    rows[0]["costs"] = {"n": 4}
    with pytest.raises(ValueError, match=r"costs of seeds \[0\] differs from that of seed 2"):
        combine(rows)


@pytest.mark.parametrize("name", RECORDS)
def test_the_json_is_that_of_its_seeds(name: str) -> None:
    """Taken apart into single seeds and put together, it is the same to the last number; so none is typed."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = rows_of(record)
    assert record_of(name, EXPERIMENTS[name], rows, record["settings"]) == record


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_recorded_is_of_the_settings_of_today(name: str) -> None:
    _, others = read_rows(RESULTS / f"{name}.json", trainings(name, EXPERIMENTS[name], Path("/nowhere")))
    assert not others


@pytest.mark.parametrize("name", RECORDS)
def test_a_row_of_the_table_is_that_of_its_json(name: str) -> None:
    """Read here by hand, not by the code that writes the table; mean and spread from the values of the seeds."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    begin = f"| {record['title']}: measured | "
    (line,) = [line for line in (CHECKOUT / "README.md").read_text().splitlines() if line.startswith(begin)]
    n, reads, *cells, work, _parameters = line.removeprefix(begin).split(" | ")
    assert n == str(len(record["seeds"]))
    assert f"B = {reads.removeprefix(str(record['slices_per_branch']) + ' of ')}, " in record["title"] + ", "
    costs = record["costs"]
    of_all, of_baseline = (costs[part]["multiply_adds"] for part in ("all_branches", "baseline"))
    assert float(work) == pytest.approx(of_baseline / of_all, abs=0.005)
    for column, cell in zip(("mean", "highest", "ensemble", "baseline"), cells, strict=True):
        of = record[column]["values"]
        expected = "-" if not of else f"{fmean(of):.2f} ± {stdev(of):.2f}" if len(of) > 1 else f"{of[0]:.2f}"
        assert cell == expected + ("" if len(of) in (0, int(n)) else f" (n = {len(of)})")


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


def test_the_standard_error_is_that_of_a_binomial() -> None:
    assert readme.standard_error(90.0, 400) == pytest.approx(
        100 * (torch.distributions.Binomial(400, torch.tensor(0.9)).stddev / 400).item()
    )


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


def in_precision(*precisions: str) -> dict[str, Any]:
    """A row of the digits with a seed in each."""
    row = pick(without(RECORDS["digits"], (*DERIVED, *SHARED, "seeds")), 0)
    shared = {key: RECORDS["digits"][key] for key in SHARED}
    return combine({seed: row | shared | {"precision": name} for seed, name in enumerate(precisions)})


@pytest.mark.parametrize(
    ("recipe", "other", "told"),
    [
        (["bf16-mixed"], ["bf16-mixed"], "A"),
        (["bf16-mixed"], ["32-true"], "A, 32-true"),
        (["bf16-mixed", "32-true"], ["32-true"], "A, 32-true"),
        (["bf16-mixed"], ["bf16-mixed", "32-true", "32-true"], "A, bf16-mixed (1), 32-true (2)"),
        (["bf16-mixed", "32-true"], ["bf16-mixed", "32-true"], "A, bf16-mixed (1), 32-true (1)"),
    ],
)
def test_a_row_in_another_precision_says_so(recipe: list[str], other: list[str], told: str) -> None:
    variants = {"a": {"title": "A"} | in_precision(*other)}
    said = readme.variants({"digits": RECORDS["digits"] | in_precision(*recipe) | {"variants": variants}})
    assert f"| {told} | {len(other)} |" in said


def test_seeds_of_two_precisions_are_not_compared() -> None:
    found = {"baseline": spread([1.0, 1.0]), "precision": spread(["32-true", "32-true"]), "elapsed_s": spread([9.0])}
    record = RECORDS["digits"] | in_precision("bf16-mixed", "32-true") | {"goal": 97.0}
    record["variants"] = {"baseline": found | {"seeds": [0, 1]}}
    lead = record["ensemble"]["values"][1] - 1.0
    assert readme.goal(record).endswith(f"(+{lead:.2f})")
    assert "| bf16-mixed (1), 32-true (1); the baseline 32-true |" in readme.results({"digits": record})
    record["variants"] = {"baseline": found | {"seeds": [0, 7]}}
    assert "baseline" not in readme.goal(record)


def test_rows_of_an_older_version_are_refused_before_any_training(tmp_path: Path) -> None:
    planned, file = _planned(), tmp_path / "digits.json"
    _keep(file, "recipe", 0, 90.0)
    record = json.loads(file.read_text())
    del record["precision"]
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="recipe, seed 0: other columns, of an older version"):
        check_rows(file, planned, replace=False)


def test_the_conventional_network_is_left_scored_as_it_was(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    baseline = trainings("digits", EXPERIMENTS["digits"], tmp_path)["baseline"][0]
    (baseline.folder / "ensemble").mkdir(parents=True)

    def scored(command: list[str], **_: object) -> None:
        weighting = [arg.partition("=")[2] for arg in command if arg.startswith("--ensemble.weighting=")]
        (baseline.folder / "ensemble" / "results.json").write_text(json.dumps({"weighting": weighting}))

    monkeypatch.setattr(subprocess, "run", scored)
    assert baseline.stacked() == {"weighting": ["stacking"]}
    assert baseline.results() == {"weighting": []}


READS = Experiment("Somewhere", "digits", "configs/digits.yaml", 1, variants=reads(1, 1, 4))
SHORT = Experiment("Somewhere", "digits", "configs/digits.yaml", 1, variants=reads(1, 1, 2) | shorter(1, (), ""))


def test_the_curve_is_of_trainings_of_one_length() -> None:
    """The recipe and its baseline are in it unless a variant, and so a shorter training, has its number of slices."""
    record: dict[str, Any] = {"slices_per_branch": 2, "name": "recipe", "variants": {"reads-4": {"name": "4"}}}
    record["variants"] |= {"baseline": {"baseline": "long"}, "random": {}}
    assert {r: row["name"] for r, row in curve.points(record, READS).items()} == {2: "recipe", 4: "4"}
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {4: "4"}
    assert curve.conventional(record, READS) == "long"
    assert curve.conventional(record, SHORT) == {"n": 0}
    record["variants"] |= {"reads-2": {"name": "2"}, "baseline-short": {"baseline": "short"}}
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {2: "2", 4: "4"}
    assert curve.conventional(record, SHORT) == "short"


def test_the_curve_is_drawn_from_the_json(tmp_path: Path) -> None:
    row = {name: spread([90.0 + i]) for i, name in enumerate(("mean", "highest", "ensemble"))}
    row["costs"] = {"branch": {"bytes_read_epoch": 2e6}, "all_branches": {"multiply_adds": 3_000_000}}
    record = {"title": "Somewhere", "slices_per_branch": 1, **row, "variants": {}}
    curve.draw(record, SHORT, tmp_path / "new" / "slices")
    assert not list(tmp_path.iterdir())  # of one point there is no curve
    record["variants"] = {"reads-1": row, "reads-2": row, "baseline-short": {"baseline": spread([90.0])}}
    curve.draw(record, SHORT, tmp_path / "new" / "slices")
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".png", ".svg"}
    assert "Somewhere" in (tmp_path / "new" / "slices.svg").read_text()


def test_the_seeds_of_a_row_are_counted_where_they_differ() -> None:
    record = RECORDS["digits"] | {"goal": 97.0, "baseline": spread([95.0])}
    assert "| 3 | " in readme.results({"digits": record})
    assert "| 95.00 (n = 1) |" in readme.results({"digits": record})
    ours = dict(zip(record["seeds"], record["ensemble"]["values"], strict=True))
    found = {"precision": spread(["32-true"])}
    record["variants"] = {"baseline": found | {"seeds": [2], "baseline": spread([ours[2] - 1])}}
    assert readme.goal(record) == "97.0: met; above the baseline of equal multiply-adds: met (+1.00)"
    record["variants"] = {"baseline": found | {"seeds": [7], "baseline": spread([99.0])}}
    assert readme.goal(record) == "97.0: met"


def test_seeds_of_several_calls_come_together(tmp_path: Path) -> None:
    file = tmp_path / "new" / "digits.json"
    rows = (("identity", 1, 6.0), ("recipe", 1, 20.0), ("recipe", 0, 10.0), ("baseline", 1, 7.0), ("recipe", 1, 30.0))
    for key, seed, value in rows:
        _keep(file, key, seed, value)
    record = json.loads(file.read_text())
    assert (record["seeds"], record["ensemble"]["mean"], record["ensemble"]["values"]) == ([0, 1], 20.0, [10.0, 30.0])
    assert record["variants"]["identity"]["ensemble"]["values"] == [6.0]
    assert record["baseline"] == record["variants"]["baseline"]["baseline"] == spread([7.0])


def test_rows_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    """By threads, which the lock of a file keeps apart as it does processes."""
    file, seeds = tmp_path / "digits.json", range(24)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_keep, repeat(file), repeat("recipe"), seeds, map(float, seeds)))
    assert json.loads(file.read_text())["ensemble"]["values"] == [float(seed) for seed in seeds]


def test_what_was_trained_otherwise_is_named_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "digits.json"
    _keep(file, "recipe", 0, 10.0)
    assert read_rows(file, _planned()) == ({"recipe": {0: _row(_planned()["recipe"][0], 10.0)}}, [])
    before, other = file.read_bytes(), _planned("--trainer.max_epochs=1")
    training = other["recipe"][1]
    with pytest.raises(SystemExit, match="recipe, seed 0: other settings\nexpected --out"):
        keep(file, training, _row(training, 1.0), other)
    assert file.read_bytes() == before
    keep(file, training, _row(training, 1.0), other, replace=True)
    assert json.loads(file.read_text())["seeds"] == [1]


def test_a_row_that_no_experiment_has_is_named(tmp_path: Path) -> None:
    file = tmp_path / "digits.json"
    _keep(file, "identity", 0, 10.0)
    fewer = {key: runs for key, runs in _planned().items() if key != "identity"}
    assert read_rows(file, fewer) == ({"recipe": {}}, ["identity: no row of the experiment any more"])


BAD = {
    "a row": (["--rows=recipe,identiy"], "--rows: expected some of recipe, baseline, identity"),
    "seeds": (["--seeds=4-3"], "expected a number of seeds, or the first and the last, as 3-4; got 4-3"),
    "a setting": (["--trainer.max_epochs", "3"], "settings for `stl` as --key=value; got --trainer.max_epochs"),
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


def _planned(*settings: str) -> Planned:
    return trainings("digits", EXPERIMENTS["digits"], Path("/nowhere"), range(24), settings)


def _row(training: Training, value: float) -> dict[str, Any]:
    name = "baseline" if training.only_baseline else "ensemble"
    return {"trained": training.trained(), "precision": "32-true", name: value}


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


def reproduce(folder: Path) -> dict[str, Any]:
    """The recipe of the digits alone, with one seed and few epochs."""
    places = [f"--runs={folder}/runs", f"--out={folder}/out"]
    few = ["--rows=recipe", "--seeds=1", "--trainer.max_epochs=3"]
    command = [sys.executable, CHECKOUT / "tools" / "reproduce", "digits", *places, *few]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    found: dict[str, Any] = json.loads((folder / "out" / "digits.json").read_text())
    return found


def read(folder: Path, branch: int, name: str) -> torch.Tensor:
    path = folder / "runs" / "digits-seed0" / "branches" / f"{branch:02d}" / "logits" / "test.safetensors"
    return safetensors.torch.load_file(path)[name]
