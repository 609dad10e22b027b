"""Minibatches that Lightning sees as one batch: the same weights, the same counts."""

from pathlib import Path
from typing import Any

import pytest
from test_groups import Log, assert_bits, assert_same_branches, log, rows, state, train, train_until_killed
from test_training import assert_same, noisy_mlp

from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.module import BranchModule
from stl_lightning.training import BranchJob

__all__ = ["log"]


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> list[BranchJob]:
    """A branch whose minibatches are handed over one at a time."""
    return train(tmp_path_factory.mktemp("chunk"), [0], network=noisy_mlp, options={"chunk": 1})


@pytest.mark.parametrize("chunk", [7, 50])
def test_weights_do_not_depend_on_the_chunk(chunk: int, tmp_path: Path, one_by_one: Any) -> None:
    assert_bits(train(tmp_path, [0], network=noisy_mlp, options={"chunk": chunk}), one_by_one)


@pytest.mark.parametrize(("step", "then"), [(4, 7), (7, 1), (13, 7), (20, 50), (23, 1)])
def test_a_run_killed_between_chunks_resumes_to_the_same_bits(
    step: int, then: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_by_one: Any, log: Log
) -> None:
    train_until_killed(tmp_path, step, monkeypatch, branches=[0], network=noisy_mlp, options={"chunk": 7})
    again = train(tmp_path, [0], network=noisy_mlp, options={"chunk": then})
    assert_bits(again, one_by_one)
    assert log.groups[-1] == ([0], {4: 0, 7: 7, 13: 12, 20: 19, 23: 19}[step])


@pytest.mark.parametrize(("max_steps", "accumulate"), [(1, 1), (9, 1), (12, 1), (22, 1), (9, 2)])
def test_training_stops_exactly_at_max_steps(max_steps: int, accumulate: int, tmp_path: Path) -> None:
    """Wherever that lies in a chunk, and with the same scores: the last weights are validated in any case."""
    trainer = {"max_epochs": None, "max_steps": max_steps, "accumulate_grad_batches": accumulate}
    ways = [
        train(tmp_path / str(chunk), [0], network=noisy_mlp, trainer=trainer, options={"chunk": chunk})
        for chunk in (1, 7, 50)
    ]
    assert load_checkpoint(ways[0][0].paths.last)["global_step"] == max_steps
    assert rows(ways[0][0])[-1]["step"] == max_steps
    assert rows(ways[0][0])[-1]["val/acc"] > 0
    for way in ways[1:]:
        assert_bits(way, ways[0])


# Settings that count minibatches -> the steps they lead to in two epochs, the validations.
COUNTING: dict[str, tuple[dict[str, Any], int, int]] = {
    "some-batches": ({"limit_train_batches": 5}, 10, 2),
    "share-of-batches": ({"limit_train_batches": 0.5}, 12, 2),
    "fast-dev-run": ({"fast_dev_run": True}, 1, 1),
    "fast-dev-run-3": ({"fast_dev_run": 3}, 3, 1),
    "validate-twice": ({"val_check_interval": 0.5}, 24, 4),
    "validate-every-5": ({"val_check_interval": 5, "check_val_every_n_epoch": None}, 24, 4),
    "validate-late": ({"check_val_every_n_epoch": 2}, 24, 1),
    "never-validate": ({"limit_val_batches": 0}, 24, 0),
    "validate-after-the-end": ({"check_val_every_n_epoch": 5}, 24, 0),
    "five-a-step": ({"accumulate_grad_batches": 5}, 6, 2),  # the last two of an epoch are a step of their own
    "max-steps": ({"max_steps": 5, "limit_val_batches": 0}, 5, 0),
}


@pytest.mark.parametrize("row", COUNTING)
def test_settings_that_count_batches_count_minibatches(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, n_steps, n_validations = COUNTING[row]
    validated: list[int] = []
    start = BranchModule.on_validation_epoch_start
    monkeypatch.setattr(
        BranchModule, "on_validation_epoch_start", lambda module: (validated.append(0), start(module))[1]
    )
    stacked = train(tmp_path / "stacked", [0, 1], trainer=trainer)
    assert len(validated) == n_validations
    assert load_checkpoint(stacked[0].paths.last)["global_step"] == n_steps
    if n_validations == 0:
        assert_same(state(stacked[0], "best"), state(stacked[0], "last"))
    alone = train(tmp_path / "alone", [0, 1], stack=False, trainer=trainer)
    assert_same_branches(stacked, alone)


@pytest.mark.parametrize("every", [5, 6])
@pytest.mark.parametrize("step", [8, 19])
def test_a_run_with_validation_in_mid_epoch_resumes_to_the_same_bits(
    every: int, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation at 6 and 12: the best weights of that step must not be lost by a checkpoint at the same step."""
    changes = {"trainer": {"val_check_interval": 0.5}, "options": {"checkpoint_every_n_steps": every}}
    undisturbed = train(tmp_path / "undisturbed", [0], **changes)
    train_until_killed(tmp_path / "killed", step, monkeypatch, branches=[0], **changes)
    assert_bits(train(tmp_path / "killed", [0], **changes), undisturbed)
