"""A training that has lost its branch to a newer attempt, or has to wait for one."""

import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from test_attempts import branch
from test_groups import N_STEPS, assert_close, jobs_of, state, train
from test_training import assert_same

from stl_lightning import attempts, leaving
from stl_lightning.attempts import begin_attempt, refuse_owned
from stl_lightning.checkpoint import load_checkpoint, put_together
from stl_lightning.errors import CheckpointError, FencedError, LeaveError, RunError
from stl_lightning.module import BranchModule
from stl_lightning.paths import BranchPaths, write_json
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.training import groups, train_branches
from stl_lightning.training.heartbeat import Heartbeat

__all__ = ["branch"]


def test_a_fenced_training_ends_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued task takes the branch over in mid-training: the old process finds out when it writes, and stops."""
    nested = {"trainer": {"precision": "32-true"}}  # 64 bits would be the outer training's choice for the inner one
    undisturbed = train(tmp_path / "undisturbed", [0], **nested)
    stale = jobs_of(tmp_path / "run", [0], **nested)
    make_step = BranchModule._step_if_due

    def step_if_due(module: BranchModule) -> None:
        make_step(module)
        if module.trainer.global_step == N_STEPS + 4:
            monkeypatch.setattr(BranchModule, "_step_if_due", make_step)
            assert train_branches(jobs_of(tmp_path / "run", [0], **nested)) == 0

    monkeypatch.setattr(BranchModule, "_step_if_due", step_if_due)
    with pytest.raises(FencedError):
        train_branches(stale)
    assert leaving.asked() is None
    status = read_status(stale[0].run.paths.branch(0), 0)
    assert (status.state, status.attempt) == ("finished", 2)
    assert_same(state(undisturbed[0]), state(stale[0]))


def test_siblings_of_a_fenced_branch_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose status cannot be read, or that trains elsewhere, takes nobody down either."""
    jobs = jobs_of(tmp_path, range(4), options={"stack": True})
    make_step = BranchModule._step_if_due

    def step_if_due(module: BranchModule) -> None:
        make_step(module)
        if module.trainer.global_step == N_STEPS + 4:
            monkeypatch.setattr(BranchModule, "_step_if_due", make_step)
            begin_attempt(jobs[1].run.paths.branch(1), 1)

    monkeypatch.setattr(BranchModule, "_step_if_due", step_if_due)
    jobs[2].paths.folder.mkdir(parents=True)
    jobs[2].paths.status.write_text("{")
    write_status(jobs[3].paths, Status(3, "running", pid=os.getppid()))
    with pytest.raises(RunError, match=r"status\.json"):
        train_branches(jobs)
    states = [json.loads(jobs[b].run.paths.branch(b).status.read_text())["state"] for b in (0, 1, 3)]
    assert states == ["finished", "running", "running"]
    assert_close(state(train(tmp_path / "alone", [0])[0]), state(jobs[0]))


def test_a_branch_that_another_process_finished_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tmp_path, [0, 1], options={"stack": False})
    finish, begin = jobs_of(tmp_path, [1]), groups.Attempt.begin

    def begin_late(attempt: groups.Attempt) -> None:
        if attempt.job is jobs[1]:
            monkeypatch.setattr(groups.Attempt, "begin", begin)
            assert train_branches(finish) == 0
        begin(attempt)

    monkeypatch.setattr(groups.Attempt, "begin", begin_late)
    outcomes = []
    assert train_branches(jobs, lambda job, outcome: outcomes.append((job.branch, outcome))) == 0
    assert outcomes == [(0, "finished"), (1, "skipped")]
    assert read_status(finish[0].paths, 1).attempt == 1


def test_the_last_beat_does_not_overwrite_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat that began before the end of the training and is written after it."""
    jobs = jobs_of(tmp_path, [0])
    stop = Heartbeat.__exit__

    def slow_stop(heartbeat: Heartbeat, *args: object) -> None:
        heartbeat.beat()
        stop(heartbeat, *args)

    monkeypatch.setattr(Heartbeat, "__exit__", slow_stop)
    assert train_branches(jobs) == 0
    assert read_status(jobs[0].paths, 0).state == "finished"


def test_who_waits_for_his_turn_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault of the group its branches go on one by one: those that wait have no heart that beats for them."""
    jobs = jobs_of(tmp_path, [0, 1, 2], options={"stack": True})
    fit, seen = groups._fit, []

    def failing_once(group: list[groups.Attempt], heartbeat: Heartbeat) -> object:
        seen.append([read_status(job.paths, job.branch).state for job in jobs])
        if len(group) > 1:
            raise MemoryError
        return fit(group, heartbeat)

    monkeypatch.setattr(groups, "_fit", failing_once)
    assert train_branches(jobs) == 0
    r, w, f = "running", "interrupted", "finished"
    assert seen == [[r, r, r], [r, w, w], [f, r, w], [f, f, r]]


def test_owners_are_waited_for_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LOST_AFTER_S", 0.4)
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.2)
    branches = [(BranchPaths(tmp_path / f"{b}"), b) for b in range(8)]
    for folder, b in branches:
        write_json(folder.status, asdict(Status(b, "running", 4, host="elsewhere")))
    before = time.monotonic()
    lost = refuse_owned(branches)
    for folder, b in branches:
        begin_attempt(folder, b, lost[b])
    assert time.monotonic() - before < 1.5
    write_json(branches[0][0].status, asdict(Status(0, "running", 4, host="elsewhere")))
    with leaving.listening():
        leaving.note("SIGTERM")
        with pytest.raises(LeaveError):
            refuse_owned(branches[:1])


def test_checkpoints_of_different_steps_do_not_go_on_together(tmp_path: Path) -> None:
    jobs = train(tmp_path, [0, 1])
    parts = [load_checkpoint(job.paths.last) for job in jobs]
    put_together(parts)
    parts[1]["global_step"] += 1
    with pytest.raises(CheckpointError, match="different steps"):
        put_together(parts)
