"""Stacked branches of which one diverges, fails or runs out of patience, and networks that cannot be stacked."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_groups import (
    BRANCHES,
    NOISY,
    Log,
    assert_same_branches,
    jobs_of,
    log,
    rows,
    small_mlp,
    state,
    train,
    undisturbed,
)
from test_training import assert_same
from torch import Tensor, nn, optim

from stl_lightning import training
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.errors import ConfigError
from stl_lightning.module import BranchModule
from stl_lightning.status import read_status
from stl_lightning.training import check_branch, train_branches

__all__ = ["log", "undisturbed"]


def poison(monkeypatch: pytest.MonkeyPatch, of_branches: dict[int, int], value: float) -> None:
    """Logits `value` times as large from a step on, in the training of some branches: no finite gradient is left."""
    forward = BranchModule.forward

    def poisoned(module: BranchModule, x: Tensor) -> Tensor:
        logits = forward(module, x)
        if not module.training:
            return logits
        steps = [of_branches.get(identity["branch"], math.inf) for identity in module.identities]
        factors = logits.new_tensor([value if module.trainer.global_step >= first else 1.0 for first in steps])
        return logits * (factors[:, None, None] if logits.ndim == 3 else factors)

    monkeypatch.setattr(BranchModule, "forward", poisoned)


@pytest.mark.parametrize(("value", "step"), [(math.nan, 0), (math.inf, 7), (math.nan, 17), (math.inf, 23)])
def test_a_branch_that_diverges_fails_with_its_step_and_changes_no_other(
    value: float, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    poison(monkeypatch, {1: step}, value)
    changes = NOISY | {"options": {"chunk": 4, "stack": True}}
    jobs = jobs_of(tmp_path, **changes)
    assert train_branches(jobs) == 1
    assert read_status(jobs[1].paths, 1).state == "failed"
    assert f"not finite at step {step};" in read_status(jobs[1].paths, 1).error
    others = [0, 2, 3]
    assert_same_branches([jobs[i] for i in others], [undisturbed[False][i] for i in others])


def test_a_branch_that_diverged_keeps_the_weights_it_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    poison(monkeypatch, {1: 17}, math.nan)
    jobs = jobs_of(tmp_path, **NOISY)
    assert train_branches(jobs) == 1
    assert all(value.isfinite().all() for file in ("last", "best") for value in state(jobs[1], file).values())
    assert load_checkpoint(jobs[1].paths.last)["global_step"] == 16


def test_branches_that_all_diverge_fail_each_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one chunk, with two minibatches a step."""
    steps = {0: 4, 1: 2, 2: 1, 3: 2}
    poison(monkeypatch, steps, math.nan)
    jobs = jobs_of(tmp_path, trainer={"accumulate_grad_batches": 2}, options={"chunk": 7})
    assert train_branches(jobs) == 4
    for job in jobs:
        assert f"at step {steps[job.branch]};" in read_status(job.paths, job.branch).error


def test_without_validation_the_best_weights_are_the_last_though_a_sibling_diverged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, {1: 5}, math.nan)
    jobs = jobs_of(tmp_path, trainer={"limit_val_batches": 0})
    assert train_branches(jobs) == 1
    for i in (0, 2, 3):
        assert_same(state(jobs[i], "best"), state(jobs[i], "last"))


def test_branches_that_run_out_of_patience_end_each_in_its_own_epoch(tmp_path: Path, log: Log) -> None:
    changes = {"trainer": {"max_epochs": 8}, "lr": 0.03, "options": {"patience": 2, "monitor": "val/acc"}}
    changes["scheduler"] = lambda optimizer: optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 3.0**epoch)
    stacked = train(tmp_path / "stacked", **changes)
    groups = log.groups.copy()
    alone = train(tmp_path / "alone", stack=False, **changes)
    assert_same_branches(stacked, alone)
    assert len(groups) > 1
    assert all(len(rows(job)) < 8 for job in stacked)


def test_a_network_that_cannot_run_stacked_is_trained_branch_by_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], log: Log
) -> None:
    class Reads(nn.Module):
        """Looks at a number, which nothing stacked can."""

        def __init__(self, in_shape: tuple[int, int, int], n_classes: int) -> None:
            super().__init__()
            self.layers = small_mlp(in_shape, n_classes)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x) if x.sum().item() else self.layers(-x)

    changes = {"network": Reads, "trainer": {"max_epochs": 1}}
    stacked = train(tmp_path / "stacked", **changes)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "go on one after the other" in line]
    assert "branches 0, 1, 2, 3" in line
    assert "item()" in line
    assert sorted(log.groups) == sorted([([0, 1, 2, 3], 0), *(([branch], 0) for branch in BRANCHES)])
    assert_same_branches(stacked, train(tmp_path / "alone", stack=False, **changes))


def test_a_fault_of_one_branch_is_found_and_recorded_as_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    """The group fails; alone, only the one at fault does."""
    make_step = BranchModule._step_if_due

    def broken(module: BranchModule) -> None:
        if module.trainer.global_step == 14 and 2 in [of["branch"] for of in module.identities]:
            raise OSError("a fault of branch 2")
        make_step(module)

    monkeypatch.setattr(BranchModule, "_step_if_due", broken)
    jobs = jobs_of(tmp_path, **NOISY)
    assert train_branches(jobs) == 1
    assert "a fault of branch 2" in read_status(jobs[2].paths, 2).error
    others = [0, 1, 3]
    assert_same_branches([jobs[i] for i in others], [undisturbed[False][i] for i in others])


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"optimizer": lambda parameters: optim.Adafactor(parameters)}, "model.optimizer Adafactor"),
        ({"optimizer": lambda parameters: optim.SGD([{"params": [p]} for p in parameters])}, "groups of parameters"),
        ({"trainer": {"callbacks": [Callback()]}}, "trainer.callbacks"),
    ],
    ids=["adafactor", "parameter-groups", "callbacks"],
)
def test_what_cannot_be_stacked_is_refused_before_training_by_name(
    changes: dict[str, Any], setting: str, tmp_path: Path, log: Log
) -> None:
    (job,) = jobs_of(tmp_path, [0], **changes, options={"stack": True})
    with pytest.raises(ConfigError, match=r"run\.stack=true") as refused:
        check_branch(job)
    assert setting in str(refused.value)
    assert not log.groups
    (auto,) = jobs_of(tmp_path, [0], **changes)
    check_branch(auto)
    assert training.groups.stacked_design(auto) is None


class Shuffled(nn.Module):
    """A network with a state of its own beside its weights."""

    def __init__(self, in_shape: tuple[int, int, int], n_classes: int) -> None:
        super().__init__()
        self.order = torch.randperm(math.prod(in_shape)).tolist()
        self.head = nn.Linear(math.prod(in_shape), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.flatten(1)[:, self.order])


class Listening(Callback):
    def on_after_backward(self, *_: Any) -> None:
        """Would never be called."""


def test_branches_that_differ_in_more_than_weights_are_not_one_network(tmp_path: Path, log: Log) -> None:
    train(tmp_path, network=Shuffled, stack=True)
    assert [branches for branches, _ in log.groups] == [[0], [1], [2], [3]]


def with_torch_dropout(in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(math.prod(in_shape), n_classes))


class Forgetful(nn.Linear):
    """Draws numbers without a layer that says so."""

    def __init__(self, in_shape: tuple[int, int, int], n_classes: int) -> None:
        super().__init__(math.prod(in_shape), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x.flatten(1), 0.5, self.training))


class Untrainable(Forgetful):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise ValueError("not to be trained")
        return super().forward(x)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"network": with_torch_dropout}, "draws random numbers"),
        ({"network": Forgetful}, "draws random numbers"),
        ({"network": Untrainable}, "or fails"),
        ({"trainer": {"min_epochs": 2}, "options": {"patience": 1}}, "min_epochs"),
    ],
)
def test_what_would_change_when_stacked_trains_alone_and_says_so(
    changes: dict[str, Any], reason: str, tmp_path: Path, log: Log, capsys: pytest.CaptureFixture[str]
) -> None:
    options = changes.get("options", {}) | {"stack": "auto"}
    train_branches(jobs_of(tmp_path, **changes | {"options": options}))
    assert [branches for branches, _ in log.groups] == [[0], [1], [2], [3]]
    assert re.search(f"train one after the other: .*{reason}", capsys.readouterr().out)


def test_a_callback_that_would_never_be_called_is_refused(tmp_path: Path) -> None:
    (job,) = jobs_of(tmp_path, [0], trainer={"callbacks": [Listening()]})
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: Listening acts in on_after_backward"):
        check_branch(job)


def test_the_best_weights_of_a_branch_that_fails_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: BranchModule) -> None:
        if module.trainer.global_step == 20:
            raise OSError("a fault in the second epoch")
        make_step(module)

    make_step = BranchModule._step_if_due
    monkeypatch.setattr(BranchModule, "_step_if_due", broken)
    (job,) = jobs_of(tmp_path, [0], options={"checkpoint_every_s": 1e9, "checkpoint_every_n_steps": None})
    assert train_branches([job]) == 1
    assert load_checkpoint(job.paths.best)["epoch"] == 0
