"""Asked to leave: saved at the very next step, also in mid-chunk, and resumed to the same bits."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_groups import EXACT, N_STEPS, jobs_of, rows, state, train
from test_training import assert_same

from stl_lightning import leaving
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.errors import ConfigError, LeaveError
from stl_lightning.module import BranchModule
from stl_lightning.status import read_status
from stl_lightning.training import BranchJob, train_branches

WAYS: dict[str, dict[str, Any]] = {
    "chunks": {},  # one for all 12 minibatches of an epoch
    "small chunks": {"options": {"chunk": 5}},
    "no chunks": {"trainer": {"val_check_interval": 0.5}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2}},
    "alone": {"options": {"stack": False}},
}


@pytest.fixture(autouse=True)
def _nobody_asks_afterwards() -> Iterator[None]:
    with leaving.listening():
        yield


def ask_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the signal come while a given step is made."""
    make_step = BranchModule._step_if_due

    def step_if_due(module: BranchModule) -> None:
        make_step(module)
        if module.trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(BranchModule, "_step_if_due", step_if_due)


def leave_at(root: Path, step: int, monkeypatch: pytest.MonkeyPatch, **way: Any) -> list[BranchJob]:
    jobs = jobs_of(root, [0, 1], **way)
    with monkeypatch.context() as patch:
        ask_at(step, patch)
        with leaving.listening(), pytest.raises(LeaveError, match="SIGUSR1"):
            train_branches(jobs)
    return jobs


def test_who_was_asked_before_leaves_before_a_stage_without_steps() -> None:
    leaving.note("SIGUSR1")
    with pytest.raises(LeaveError, match="asked to leave by SIGUSR1"), leaving.at_once():
        pytest.fail("the stage was begun")


STEPS = [1, 5, 7, N_STEPS, N_STEPS + 1, 2 * N_STEPS - 1]
CASES = [("chunks", step) for step in STEPS] + [(way, step) for way in WAYS if way != "chunks" for step in (1, 6, 13)]


@pytest.mark.parametrize(("way", "step"), CASES)
def test_who_left_at_any_step_resumes_to_the_same_bits(
    way: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "accumulated":
        step = max(1, step // 2)  # half as many steps an epoch
    settings = {"options": {"stack": True, "checkpoint_every_s": 1e9, "checkpoint_every_n_steps": None}} | WAYS[way]
    settings["options"] = {"stack": True} | settings["options"]
    undisturbed = jobs_of(tmp_path / "undisturbed", [0, 1], **settings)
    assert train_branches(undisturbed) == 0

    left = leave_at(tmp_path / "left", step, monkeypatch, **settings)
    saved = load_checkpoint(left[0].paths.last)["global_step"]
    assert saved == step or (way == "no chunks" and saved == step + 1)  # where a validation was due, the next one
    assert read_status(left[0].paths, 0).state == "interrupted"

    again = jobs_of(tmp_path / "left", [0, 1], **settings)
    assert train_branches(again) == 0
    for a, b in zip(undisturbed, again, strict=True):
        assert_same(state(a), state(b))
        assert_same(state(a, "best"), state(b, "best"))
        assert rows(a) == rows(b)


def test_who_is_asked_in_the_last_step_finishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask_at(2 * N_STEPS, monkeypatch)
    jobs = train(tmp_path, [0, 1])
    assert read_status(jobs[0].paths, 0).state == "finished"


def test_who_is_asked_before_the_first_step_begins_nothing(tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path, [0])
    leaving.note("SIGTERM")
    with pytest.raises(LeaveError, match="before"):
        train_branches(jobs)
    assert not jobs[0].paths.folder.exists()


@pytest.mark.parametrize("steps", [(3, 4, 9), (3, 5), (3, N_STEPS + 5), (3, N_STEPS, N_STEPS + 10)], ids=str)
def test_left_again_and_again(steps: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a chunk, at the end of one, at the end of an epoch: no validation is left out after any."""
    settings = {"trainer": EXACT, "options": {"stack": True, "chunk": 5}}
    undisturbed = train(tmp_path / "undisturbed", [0, 1], **settings)
    for step in steps:
        left = leave_at(tmp_path / "left", step, monkeypatch, **settings)
    assert read_status(left[0].paths, 0).attempt == len(steps)
    again = train(tmp_path / "left", [0, 1], **settings)
    for a, b in zip(undisturbed, again, strict=True):
        assert_same(state(a), state(b))
        assert_same(state(a, "best"), state(b, "best"))
        assert rows(a) == rows(b)


def test_a_second_interrupt_ends_at_once() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert leaving.asked() == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_the_signals_are_the_users_choice() -> None:
    before = signal.getsignal(signal.SIGUSR2)
    with leaving.listening({"STL_SIGNALS": "SIGUSR2,SIGTERM"}):
        os.kill(os.getpid(), signal.SIGUSR2)
        assert leaving.asked() == "SIGUSR2"
    assert leaving.asked() is None
    assert signal.getsignal(signal.SIGUSR2) == before
    with pytest.raises(ConfigError, match="STL_SIGNALS"), leaving.listening({"STL_SIGNALS": "USR9"}):
        pass
