"""Real files of the loggers: CSV always, TensorBoard and offline W&B by option, continued after a resume."""

import csv
import os
from pathlib import Path

import pytest
from test_training import die_at, make_job, train_branch

from stl_lightning.paths import RunPaths
from stl_lightning.tracking import MetricsCSV, TrackingOptions, _wandb_is_offline, branch_loggers, log_ensemble


def test_csv_has_a_row_an_epoch_with_every_column(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    train_branch(job)
    with job.paths.metrics.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1, 2]
    assert set(rows[0]) == set(MetricsCSV.COLUMNS)
    assert all(value != "" for row in rows for value in row.values())
    assert float(rows[2]["train/loss"]) < float(rows[0]["train/loss"])


def test_csv_writes_the_rows_of_a_repeated_epoch_anew(tmp_path: Path) -> None:
    """A branch that resumes from an epoch before its last row."""
    paths = RunPaths(tmp_path).branch(0)
    for epochs in (range(3), range(1, 3)):
        logger = MetricsCSV(paths)
        for epoch in epochs:
            logger.log_metrics({"train/loss": len(epochs), "val/loss": 0.5, "epoch": epoch}, step=epoch)
        logger.save()
    with paths.metrics.open() as file:
        rows = [(row["epoch"], row["train/loss"]) for row in csv.DictReader(file)]
    assert rows == [("0", "3"), ("1", "2"), ("2", "2")]


def test_tensorboard_events_carry_the_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = make_job(tmp_path)
    job.tracking = TrackingOptions(tensorboard=True)
    train_branch(job)
    events = EventAccumulator(str(job.paths.folder / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/loss", "val/acc"} <= set(events.Tags()["scalars"])
    assert len(events.Scalars("val/loss")) == 3


@pytest.mark.slow
def test_wandb_runs_are_grouped_and_resume_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    options = TrackingOptions(wandb=True)
    for branch, callbacks in ((0, [die_at(15)]), (0, []), (1, [])):
        job = make_job(tmp_path / "run", branch, trainer={"callbacks": callbacks})
        job.tracking = options
        train_branch(job)
    log_ensemble(options, job.run, "name", {"ensemble": {"accuracy": 0.9}, "mean": 0.8, "highest": 0.85} | RESULTS)
    runs = sorted(path.name for path in tmp_path.glob("run/**/offline-run-*") if path.is_dir())
    names = [name.split("-", 3)[3].removeprefix(f"{job.run.id}-") for name in runs]
    assert names == ["b00", "b00", "b01", "ensemble"]
    for folder in tmp_path.glob("run/branches/00/wandb/offline-run-*"):
        (file,) = folder.glob("*.wandb")
        written = file.read_bytes()
        assert b"val/loss" in written


@pytest.mark.parametrize(("job_type", "name"), [("branch", "b03"), ("baseline", "baseline")])
def test_what_wandb_is_told(job_type: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, object] = {}
    monkeypatch.setattr("stl_lightning.tracking.WandbLogger", lambda **settings: told.update(settings))
    branch_loggers(TrackingOptions(wandb=True), RunPaths(tmp_path).branch(3), "mnist", "a1b2", 3, job_type)
    expected = {"group": "mnist", "job_type": job_type, "name": f"mnist-{name}", "id": f"a1b2-{name}"}
    assert expected.items() <= told.items()


RESULTS = {"weighting": "simplex", "space": "logits", "temperature": 1.0, "members": [0]}


def test_offline_unless_a_key_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert _wandb_is_offline(TrackingOptions(wandb=True))
    assert not _wandb_is_offline(TrackingOptions(wandb=True, wandb_mode="online"))
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert not _wandb_is_offline(TrackingOptions(wandb=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert _wandb_is_offline(TrackingOptions(wandb=True))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    os.chmod(tmp_path / ".netrc", 0o600)
    assert not _wandb_is_offline(TrackingOptions(wandb=True))


def test_only_the_csv_without_options(tmp_path: Path) -> None:
    loggers = branch_loggers(TrackingOptions(), RunPaths(tmp_path).branch(0), "name", "id", 0, "branch")
    assert [type(logger) for logger in loggers] == [MetricsCSV]
