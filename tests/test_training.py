"""One branch in training: exact resume, isolation of seeds, failure of one branch, the run directory."""

import os
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from torch import Tensor, nn

from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.ensemble.members import branch_outputs
from stl_lightning.errors import RunError
from stl_lightning.module import BranchModule
from stl_lightning.networks import MLP
from stl_lightning.paths import RunPaths
from stl_lightning.run import RunOptions, claim_run
from stl_lightning.slices import Statistics
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.strategy import alone
from stl_lightning.tracking import TrackingOptions
from stl_lightning.training import (
    BranchJob,
    check_branch,
    check_branches,
    train_branches,
)


class Dropped(Exception):
    """Stands for the death of the process: nothing after it is run or saved."""


class CallAt(Callback):
    """Calls a function before a given step, after the checkpoints of the step before it were written."""

    def __init__(self, step: int, function: Callable[[], None]) -> None:
        self.step = step
        self.function = function

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.function()


def die() -> None:
    raise Dropped


def die_at(step: int) -> CallAt:
    return CallAt(step, die)


def noisy_mlp(in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
    """Dropout and BatchNorm: both keep state that a resumed run has to find again."""
    return MLP(in_shape, n_classes, depth=3, width=16, batch_norm=True, dropout=0.2)


def make_job(root: Path, branch: int = 0, seed: int = 0, config: str = "a: 1", **changes: Any) -> BranchJob:
    data = SpectralDataModule("digits", val_size=0.2, batch_size=100, seed=seed, branch=branch)
    paths = RunPaths(root)
    trainer = {"max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False}
    trainer |= changes.pop("trainer", {})
    lr = changes.pop("lr", 1e-3)
    module = BranchModule(
        changes.pop("network", noisy_mlp),
        lambda parameters: torch.optim.Adam(parameters, lr=lr),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * 12),
        lr_interval="step",
    )
    options = RunOptions(**{"checkpoint_every_n_steps": 5, "checkpoint_every_s": 0.0} | changes.pop("options", {}))
    return BranchJob(claim_run(paths, data.agreement()), data, module, trainer, config, options, TrackingOptions())


def train_branch(job: BranchJob) -> str:
    """Train one branch alone; how it ended."""
    outcomes: list[str] = []
    train_branches([job], lambda _, outcome: outcomes.append(outcome))
    return outcomes[0]


def weights(job: BranchJob) -> dict[str, Tensor]:
    return load_checkpoint(job.paths.last)["state_dict"]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("step", [3, 7, 12, 15, 24, 30])
def test_a_run_that_died_resumes_to_the_same_bits(tmp_path: Path, step: int) -> None:
    """12 steps an epoch, a checkpoint every 5: before the first, in mid-epoch, at the boundary of an epoch."""
    undisturbed = make_job(tmp_path / "undisturbed")
    assert train_branch(undisturbed) == "finished"

    killed = make_job(tmp_path / "killed", trainer={"callbacks": [die_at(step)]})
    assert train_branch(killed) == "failed"
    again = make_job(tmp_path / "killed")
    assert train_branch(again) == "finished"

    assert_same(weights(undisturbed), weights(again))
    best = [load_checkpoint(job.paths.best)["state_dict"] for job in (undisturbed, again)]
    assert_same(*best)
    rows = [
        [line.split(",")[:7] for line in job.paths.metrics.read_text().splitlines()] for job in (undisturbed, again)
    ]
    assert rows[0] == rows[1]
    assert read_status(again.paths, 0).attempt == 2


def test_weights_depend_on_seed_and_branch_alone(tmp_path: Path) -> None:
    def built(branch: int, seed: int) -> dict[str, Tensor]:
        return BranchModule(noisy_mlp, torch.optim.Adam).build((1, 4, 4), 10, seed, [branch]).state_dict()

    first = built(1, 0)
    torch.rand(7)
    assert_same(first, built(1, 0))
    for other in (built(2, 0), built(1, 1)):
        name = next(name for name in first if name.endswith("weight"))
        assert not torch.equal(first[name], other[name])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    BranchModule(noisy_mlp, torch.optim.Adam).build((1, 4, 4), 10, 0, [0])
    assert torch.equal(torch.rand(3), expected)


def test_a_diverged_branch_fails_with_its_step_and_its_sibling_finishes(tmp_path: Path) -> None:
    diverging = make_job(tmp_path, branch=0, lr=float("inf"))
    assert train_branch(diverging) == "failed"
    status = read_status(diverging.paths, 0)
    assert status.state == "failed"
    assert "not finite at step 1" in status.error
    assert train_branch(make_job(tmp_path, branch=1)) == "finished"
    assert read_status(diverging.run.paths.branch(1), 1).state == "finished"


def test_a_finished_branch_is_left_alone(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    train_branch(job)
    before = {path.name: path.stat().st_mtime_ns for path in job.paths.folder.iterdir()}
    assert train_branch(make_job(tmp_path)) == "skipped"
    assert before == {path.name: path.stat().st_mtime_ns for path in job.paths.folder.iterdir()}


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    train_branch(make_job(tmp_path, config="model: {lr: 1}\nrun: {root: a}"))
    with pytest.raises(RunError, match=r"model\.lr was 1 and is now 2"):
        check_branch(make_job(tmp_path, config="model: {lr: 2}\nrun: {root: b}"))
    with pytest.raises(RunError, match=r"run\.monitor"):
        check_branch(make_job(tmp_path, config="model: {lr: 1}\nrun: {monitor: val/loss}"))
    check_branch(make_job(tmp_path, config="model: {lr: 1}\nrun: {root: elsewhere, name: moved}"))
    with pytest.raises(RunError, match="seed is 0 there and 1 here"):
        make_job(tmp_path, seed=1)


def forge(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        checkpoint = torch.load(path, weights_only=True)
        torch.save(change(checkpoint), path)

    return apply


class Payload:
    """A pickle that would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("executed"),))


def identity(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda checkpoint: checkpoint | {"stl_lightning": [checkpoint["stl_lightning"][0] | changes]}


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:1000]), "truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "truncated or damaged"),
    "text": (lambda path: path.write_text("not a checkpoint"), "no checkpoint"),
    "raw pickle": (lambda path: path.write_bytes(pickle.dumps(Payload())), "would execute code"),
    "executes": (forge(lambda checkpoint: checkpoint | {"x": Payload()}), "would execute code"),
    "other branch": (forge(identity(branch=3)), "branch is 3, expected 0"),
    "other run": (forge(identity(run="ffffffff")), "run is 'ffffffff'"),
    "foreign": (forge(lambda checkpoint: checkpoint["state_dict"]), "not written by this version"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_checkpoint_fails_its_branch_alone(tmp_path: Path, damage: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_job(tmp_path / "run", trainer={"callbacks": [die_at(13)]})
    train_branch(first)
    apply, message = DAMAGES[damage]
    apply(first.paths.last)
    again = make_job(tmp_path / "run")
    assert train_branch(again) == "failed"
    assert re.search(message, read_status(again.paths, 0).error)
    assert not (tmp_path / "executed").exists()
    assert train_branch(make_job(tmp_path / "run", branch=1)) == "finished"


def test_a_branch_refuses_data_it_was_not_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_job(tmp_path, trainer={"callbacks": [die_at(13)]})
    train_branch(first)
    again = make_job(tmp_path)
    other = Statistics(torch.full((1, 1, 1, 1), 9.0), torch.ones(1, 1, 1, 1))
    monkeypatch.setattr("stl_lightning.datamodule.measure", lambda _: other)
    assert train_branch(again) == "failed"
    assert "data.root" in read_status(again.paths, 0).error


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up in mid-epoch: the branch fails by name, and what was saved before still resumes."""
    undisturbed = make_job(tmp_path / "undisturbed")
    train_branch(undisturbed)

    def full_disk(checkpoint: dict[str, Any], file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    job = make_job(
        tmp_path / "full",
        trainer={"max_epochs": 3, "callbacks": [CallAt(17, lambda: monkeypatch.setattr(torch, "save", full_disk))]},
    )
    assert train_branch(job) == "failed"
    monkeypatch.undo()
    assert "No space left on device" in read_status(job.paths, 0).error
    assert not list(job.paths.folder.glob(".*"))
    again = make_job(tmp_path / "full")
    assert train_branch(again) == "finished"
    assert_same(weights(undisturbed), weights(again))


def test_a_run_that_was_moved_keeps_its_best_weights(tmp_path: Path) -> None:
    """The best value of the first epochs still counts under another path, so a worse epoch does not replace it."""

    def job(root: Path, **trainer: Any) -> BranchJob:
        made = make_job(root, trainer={"max_epochs": 6} | trainer)
        # After two epochs it climbs the loss, so all later ones are worse.
        made.module.scheduler_factory = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda s: 1 if s < 24 else -10)
        return made

    undisturbed = job(tmp_path / "undisturbed")
    train_branch(undisturbed)
    killed = job(tmp_path / "killed", callbacks=[die_at(50)])
    train_branch(killed)
    (tmp_path / "killed").rename(tmp_path / "moved")
    moved = job(tmp_path / "moved")
    assert train_branch(moved) == "finished"
    best = [load_checkpoint(each.paths.best) for each in (undisturbed, moved)]
    assert_same(best[0]["state_dict"], best[1]["state_dict"])
    assert best[0]["epoch"] == 1


@pytest.mark.parametrize("step", [3, 4, 6])
def test_accumulated_steps_resume_to_the_same_bits(tmp_path: Path, step: int) -> None:
    """Two batches a step: a checkpoint between the two would lose the gradient of the first."""
    trainer = {"accumulate_grad_batches": 2}
    undisturbed = make_job(tmp_path / "undisturbed", trainer=trainer)
    train_branch(undisturbed)
    train_branch(make_job(tmp_path / "killed", trainer=trainer | {"callbacks": [die_at(step)]}))
    again = make_job(tmp_path / "killed", trainer=trainer)
    assert train_branch(again) == "finished"
    assert_same(weights(undisturbed), weights(again))


def test_a_branch_in_training_elsewhere_on_this_machine_is_left_to_it(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    write_status(job.paths, Status(0, "running", pid=os.getppid()))
    with pytest.raises(RunError, match=f"process {os.getppid()} on {socket.gethostname()}"):
        check_branches([job])
    write_status(job.paths, Status(0, "running", pid=2**22 + 1))  # above any process number: it was killed
    check_branches([job])


def test_a_tracker_that_cannot_start_fails_its_branch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the server")

    monkeypatch.setattr("stl_lightning.tracking.wandb_logger", unreachable)
    job = make_job(tmp_path)
    job.tracking = TrackingOptions(wandb=True)
    assert train_branch(job) == "failed"
    assert "no route" in read_status(job.paths, 0).error


def test_users_callbacks_and_settings_are_kept(tmp_path: Path) -> None:
    """A ModelCheckpoint of the user's own works beside ours and is not asked to predict."""
    own = ModelCheckpoint(tmp_path / "own", save_top_k=-1)
    job = make_job(tmp_path, trainer={"callbacks": [own, RichProgressBar()], "enable_model_summary": True})
    assert train_branch(job) == "finished"
    assert len(list((tmp_path / "own").glob("*.ckpt"))) == 3
    assert branch_outputs(job, "val").logits.shape == (288, 10)


def test_module_and_data_serve_a_trainer_of_ones_own(tmp_path: Path) -> None:
    """Lightning's own test and predict, without a run directory."""
    job = make_job(tmp_path)
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, **alone("cpu", 0))
    module = job.built_module()
    (scores,) = trainer.test(module, datamodule=job.data, verbose=False)
    assert scores["test/acc"] < 0.3
    batches = trainer.predict(module, datamodule=job.data)
    assert sum(len(labels) for _, labels in batches) == 288


@pytest.mark.parametrize("step", [20, 999])
def test_best_weights_that_were_deleted_are_trained_again(tmp_path: Path, step: int) -> None:
    """After an interruption and after the end: never the last weights under the name of the best."""
    undisturbed = make_job(tmp_path / "undisturbed")
    train_branch(undisturbed)
    first = make_job(tmp_path / "lost", trainer={"callbacks": [die_at(step)]})
    train_branch(first)
    first.paths.best.unlink()
    again = make_job(tmp_path / "lost")
    assert train_branch(again) == "finished"
    assert_same(*(load_checkpoint(job.paths.best)["state_dict"] for job in (undisturbed, again)))
    assert_same(weights(undisturbed), weights(again))


def test_a_callback_of_the_users_sees_the_training_loss(tmp_path: Path) -> None:
    stops = EarlyStopping("train/loss", patience=1, min_delta=1e9)
    job = make_job(tmp_path, trainer={"max_epochs": 9, "callbacks": [stops]})
    assert train_branch(job) == "finished"
    assert read_status(job.paths, 0).epoch == 2


class Calls(Callback):
    """Does something of the network in the middle of training."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function

    def on_train_epoch_start(self, *_: Any) -> None:
        self.function()
