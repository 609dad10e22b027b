"""Branches that train as one network, and minibatches handed over in chunks, against branches trained one by one.

Compared in float64, where the two ways to sum differ by far less than any fault; what is said to be exact is compared
to the bit. 12 minibatches an epoch.
"""

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from test_training import assert_same, make_job, noisy_mlp
from torch import Tensor, nn, optim

from stl_lightning import training
from stl_lightning.augment import Augment
from stl_lightning.checkpoint import load_checkpoint, put_together, take_apart
from stl_lightning.errors import ConfigError
from stl_lightning.module import BranchModule
from stl_lightning.networks import MLP, ConvNet, ResNet
from stl_lightning.ranges import by_number
from stl_lightning.status import read_status
from stl_lightning.training import BranchJob, check_branch, train_branches

BRANCHES = range(4)
EXACT = {"precision": "64-true"}
N_STEPS = 12  # an epoch


def small_mlp(in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    return MLP(in_shape, n_classes, depth=2, width=8)


def convnet(in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    return ConvNet(in_shape, n_classes, widths=(4, "P", 6), dropout=0.2)


def resnet(in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    return ResNet(in_shape, n_classes, depth=[1, 1], width=3)


def jobs_of(root: Path, branches: Sequence[int] = BRANCHES, **changes: Any) -> list[BranchJob]:
    """Jobs of a small fast network unless `changes` say otherwise; what is not for `make_job` is set afterwards."""
    changes = {"network": small_mlp} | changes
    changes["trainer"] = {"max_epochs": 2} | EXACT | changes.get("trainer", {})
    label_smoothing, augment = changes.pop("label_smoothing", 0.0), changes.pop("augment", None)
    averaging, network_of = changes.pop("averaging", None), changes.pop("network_of", {})
    optimizer, scheduler = changes.pop("optimizer", None), changes.pop("scheduler", None)
    jobs = [make_job(root, branch, **changes) for branch in branches]
    for job in jobs:
        job.module.label_smoothing, job.module.averaging = label_smoothing, averaging
        job.module.networks = replace(job.module.networks, options=by_number("network_of", network_of))
        job.data.augment = augment
        job.module.optimizer_factory = optimizer or job.module.optimizer_factory
        if scheduler is not None:
            job.module.scheduler_factory, job.module.lr_interval = scheduler, "epoch"
    return jobs


def momentum(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.05, momentum=0.9)


def train(root: Path, branches: Sequence[int] = BRANCHES, stack: bool = True, **changes: Any) -> list[BranchJob]:
    """Train to the end, stacked or one by one; all must finish."""
    changes["options"] = {"stack": stack} | changes.get("options", {})
    jobs = jobs_of(root, branches, **changes)
    for job in jobs:
        check_branch(job)
    assert train_branches(jobs) == 0
    return jobs


class Log:
    """The groups that were trained: (branches, step at which they began)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[tuple[list[int], int]] = []
        start = BranchModule.on_train_start

        def on_train_start(module: BranchModule) -> None:
            self.groups.append(([of["branch"] for of in module.identities], module.trainer.global_step))
            start(module)

        monkeypatch.setattr(BranchModule, "on_train_start", on_train_start)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    return Log(monkeypatch)


def state(job: BranchJob, file: str = "last") -> dict[str, Tensor]:
    return load_checkpoint(getattr(job.paths, file))["state_dict"]


def rows(job: BranchJob) -> list[dict[str, float]]:
    """metrics.csv without the times."""
    with job.paths.metrics.open(newline="") as file:
        return [{k: float(v or "nan") for k, v in row.items() if k != "epoch_s"} for row in csv.DictReader(file)]


def assert_close(a: Any, b: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_same_branches(jobs: Sequence[BranchJob], others: Sequence[BranchJob], tolerance: float = 1e-9) -> None:
    """The same files to the tolerance: weights and all that resuming needs, the best weights, metrics, status."""
    for job, other in zip(jobs, others, strict=True):
        assert job.branch == other.branch
        a, b = load_checkpoint(job.paths.last), load_checkpoint(other.paths.last)
        for checkpoint in (a, b):
            checkpoint.pop("rng")  # of the process
            checkpoint["stl_lightning"][0].pop("run")  # random
        assert_close(comparable(a), comparable(b), tolerance)
        assert_close(dict(state(job, "best")), dict(state(other, "best")), tolerance)
        assert_close(rows(job), rows(other), tolerance)
        assert status_of(job) == status_of(other)


def comparable(value: Any) -> Any:
    """A checkpoint with plain dictionaries, and strings as what `assert_close` takes."""
    if isinstance(value, dict):
        return {key: comparable(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(of) for of in value]
    return value if isinstance(value, Tensor | int | float) else list(str(value).encode())


def status_of(job: BranchJob) -> tuple[Any, ...]:
    status = read_status(job.paths, job.branch)
    return status.state, status.epoch, status.step, status.error


def assert_bits(jobs: Sequence[BranchJob], others: Sequence[BranchJob]) -> None:
    for job, other in zip(jobs, others, strict=True):
        assert_same(state(job), state(other))
        assert_same(state(job, "best"), state(other, "best"))
        assert str(rows(job)) == str(rows(other))


def lowered(optimizer: optim.Optimizer) -> optim.lr_scheduler.LRScheduler:
    return optim.lr_scheduler.StepLR(optimizer, 1, 0.1)


def nesterov(parameters: Any) -> optim.Optimizer:
    return optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


# name -> changes of the job, tolerance. In bfloat16 a weight has 8 bits, and sums of other order round differently.
SETTINGS: dict[str, tuple[dict[str, Any], float]] = {
    "mlp": ({"network": noisy_mlp}, 1e-9),
    # Not Adam: it divides by the size of a gradient, so rounding decides the sign of a step where there is almost none.
    "mlp-float32": ({"network": noisy_mlp, "trainer": {"precision": "32-true"}, "optimizer": momentum}, 1e-4),
    "convnet": ({"network": convnet}, 1e-9),
    "resnet": ({"network": resnet}, 1e-9),
    "clip-norm": ({"network": noisy_mlp, "trainer": {"gradient_clip_val": 0.5}}, 1e-9),
    "clip-value": ({"trainer": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}}, 1e-9),
    "accumulate": ({"network": noisy_mlp, "trainer": {"accumulate_grad_batches": 5}}, 1e-9),
    "label-smoothing": ({"label_smoothing": 0.1}, 1e-9),
    "schedule": ({"scheduler": lowered}, 1e-9),
    "sgd": ({"optimizer": nesterov}, 1e-9),
    "bf16": ({"network": convnet, "trainer": {"precision": "bf16-mixed"}}, 5e-2),
    "mixup": ({"augment": Augment(mixup=0.4)}, 1e-9),
    "aligned": ({"augment": Augment(crop_pad=2, aligned=True, flip=True, cutmix=1.0)}, 1e-9),
    "max-steps": ({"trainer": {"max_epochs": None, "max_steps": 17}}, 1e-9),
    "no-validation": ({"trainer": {"limit_val_batches": 0}}, 1e-9),
    "averaging": ({"network": noisy_mlp, "averaging": 0.9}, 1e-9),
}


@pytest.fixture(scope="module", params=SETTINGS)
def two_ways(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, float]:
    changes, tolerance = SETTINGS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    return train(root / "stacked", **changes), train(root / "alone", stack=False, **changes), tolerance


def test_stacked_branches_become_what_each_becomes_alone(two_ways: Any) -> None:
    stacked, alone, tolerance = two_ways
    assert_same_branches(stacked, alone, tolerance)
    assert all(status_of(job)[0] == "finished" for job in stacked)


def test_a_file_of_a_branch_holds_that_branch_alone(two_ways: Any) -> None:
    """A view of the stacked weights would bring those of all branches into each file."""
    stacked, alone, _ = two_ways
    for job, other in zip(stacked, alone, strict=True):
        for file in ("last", "best"):
            sizes = [getattr(each.paths, file).stat().st_size for each in (job, other)]
            assert sizes[0] < 1.1 * sizes[1]


def test_checkpoints_put_together_and_taken_apart_are_the_same(two_ways: Any) -> None:
    for jobs in two_ways[:2]:
        parts = [load_checkpoint(job.paths.last) for job in jobs]
        together = put_together(parts)
        for i, part in enumerate(parts):
            again = take_apart(together, i)
            assert again.keys() == part.keys()
            for key in part.keys() - {"rng"}:
                assert_close(comparable(again[key]), comparable(part[key]), 0)


class Killed(BaseException):
    """Nothing of ours catches it: the process is gone."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, branches: Sequence[int] | None = None) -> None:
    """The process dies at a global step, once; of these branches, if they are given."""
    make_step = BranchModule._step_if_due

    def step_or_die(module: BranchModule) -> None:
        numbers = [of["branch"] for of in module.identities]
        if module.trainer.global_step == step and branches in (None, numbers):
            raise Killed
        make_step(module)

    monkeypatch.setattr(BranchModule, "_step_if_due", step_or_die)


def train_until_killed(
    root: Path, step: int, monkeypatch: pytest.MonkeyPatch, killed: Sequence[int] | None = None, **changes: Any
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, step, killed)
        with pytest.raises(Killed):
            train(root, **changes)


NOISY = {"network": noisy_mlp, "options": {"chunk": 4}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[BranchJob]]:
    """Four branches with dropout and BatchNorm, trained stacked (True) and one by one (False)."""
    root = tmp_path_factory.mktemp("undisturbed")
    return {stack: train(root / str(stack), stack=stack, **NOISY) for stack in (True, False)}


@pytest.mark.parametrize("step", [3, 14, 23])
def test_a_group_that_was_killed_resumes_to_the_same_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, log: Log
) -> None:
    train_until_killed(tmp_path, step, monkeypatch, **NOISY)
    assert_bits(train(tmp_path, **NOISY), undisturbed[True])
    begun = {3: 0, 14: 12, 23: 20}[step]  # the last chunk of 4 that passed a multiple of 5, or an epoch
    assert log.groups == [([0, 1, 2, 3], 0), ([0, 1, 2, 3], begun)]


def test_a_group_goes_on_as_branches_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, log: Log
) -> None:
    train_until_killed(tmp_path, 19, monkeypatch, **NOISY)
    jobs = train(tmp_path, stack=False, **NOISY)
    assert log.groups == [([0, 1, 2, 3], 0), *(([branch], 16) for branch in BRANCHES)]
    assert_same_branches(jobs, undisturbed[False])


def test_branches_alone_go_on_as_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, log: Log
) -> None:
    for branch in BRANCHES:
        train_until_killed(tmp_path, 19, monkeypatch, branches=[branch], **NOISY)
    jobs = train(tmp_path, **NOISY)
    assert log.groups == [*(([branch], 0) for branch in BRANCHES), ([0, 1, 2, 3], 16)]
    assert_same_branches(jobs, undisturbed[True])


@pytest.mark.parametrize("stack", [True, False])
def test_what_is_loaded_is_what_the_other_way_saved(
    stack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, the state of the optimiser too: the first checkpoint after resuming, before any step, is the old."""
    for branches in [BRANCHES] if stack else [[branch] for branch in BRANCHES]:
        train_until_killed(tmp_path, 19, monkeypatch, branches=branches, stack=stack, **NOISY)
    saved = [load_checkpoint(job.paths.last) for job in jobs_of(tmp_path, **NOISY)]
    found: dict[int, dict[str, Any]] = {}

    def look(module: BranchModule, *_: Any) -> None:
        checkpoint = module.trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        for i, identity in enumerate(module.identities):
            found[identity["branch"]] = take_apart(checkpoint, i)
        raise Killed

    monkeypatch.setattr(BranchModule, "training_step", look)
    for branches in [[branch] for branch in BRANCHES] if stack else [BRANCHES]:
        with pytest.raises(Killed):
            train(tmp_path, branches, stack=not stack, **NOISY)
    for branch in BRANCHES:
        for key in saved[branch].keys() - {"rng", "callbacks", "loops"}:
            assert_close(comparable(found[branch][key]), comparable(saved[branch][key]), 0)


def test_finished_begun_and_new_branches_in_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any, log: Log
) -> None:
    train(tmp_path, [2], **NOISY)
    train_until_killed(tmp_path, 15, monkeypatch, branches=[1], **NOISY)
    log.groups.clear()
    outcomes: list[tuple[int, str]] = []
    jobs = jobs_of(tmp_path, **NOISY)
    assert train_branches(jobs, lambda job, outcome: outcomes.append((job.branch, outcome))) == 0
    assert log.groups == [([0, 3], 0), ([1], 12)]
    assert sorted(outcomes) == [(0, "finished"), (1, "finished"), (2, "skipped"), (3, "finished")]
    for job, alone in zip(jobs, undisturbed[False], strict=True):
        assert_close(dict(state(job)), dict(state(alone)))
        assert_close(rows(job), rows(alone))


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_correct_answers_are_counted_in_any_precision(precision: str, tmp_path: Path) -> None:
    """Of 1150 images, a number that bfloat16 does not know."""
    (job,) = train(tmp_path, [0], trainer={"precision": precision, "max_epochs": 1})
    n_correct = rows(job)[0]["train/acc"] * 1150
    assert n_correct == pytest.approx(round(n_correct), abs=1e-3)
    assert load_checkpoint(job.paths.last)["train_totals"][0, 2] == 1150


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
