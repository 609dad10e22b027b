"""Branches that train as one network, against branches trained one by one.

Compared in float64, where the two ways to sum differ by far less than any fault; what is said to be exact is compared
to the bit. 12 minibatches an epoch.
"""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_training import assert_same, make_job, noisy_mlp
from torch import Tensor, nn, optim

from stl_lightning.augment import Augment
from stl_lightning.checkpoint import load_checkpoint, put_together, take_apart
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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_correct_answers_are_counted_in_any_precision(precision: str, tmp_path: Path) -> None:
    """Of 1150 images, a number that bfloat16 does not know."""
    (job,) = train(tmp_path, [0], trainer={"precision": precision, "max_epochs": 1})
    n_correct = rows(job)[0]["train/acc"] * 1150
    assert n_correct == pytest.approx(round(n_correct), abs=1e-3)
    assert load_checkpoint(job.paths.last)["train_totals"][0, 2] == 1150
