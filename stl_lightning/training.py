"""Train the branches of a process from their configs: resume them, finish them, or record why they failed.

Branches of one architecture that are at the same step train together, as one group with one Trainer.
"""

import copy
import math
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger
from torch import nn

from stl_lightning.checkpoint import BestCheckpoint, BranchFiles, LastCheckpoint, load_checkpoint
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.errors import CheckpointError, ConfigError, RunError, STLError
from stl_lightning.module import BranchModule, branch_seed
from stl_lightning.paths import BranchPaths, write_atomically
from stl_lightning.run import Run, RunOptions, different_keys
from stl_lightning.stacked import ELEMENTWISE, can_stack
from stl_lightning.status import State, Status, StatusWriter, read_status, write_status
from stl_lightning.strategy import alone, pick_device
from stl_lightning.tracking import EpochLogger, TrackingOptions, branch_loggers, close

Outcome = Literal["finished", "skipped", "failed"]

# Trainer settings that this toolkit decides: one device a branch, a folder a branch, loggers by `tracking`.
OWN_TRAINER_SETTINGS = (
    "strategy", "devices", "num_nodes", "logger", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
)  # fmt: skip

# Settings that may change between two attempts at a branch: where and how it runs, not what it computes.
FREE_SETTINGS = (
    "config", "run.name", "run.root", "run.branches", "run.checkpoint_every_n_steps", "run.checkpoint_every_s", "run.stack", "run.chunk", "tracking",
    "ensemble",
    "baseline", "data.root", "data.download", "data.store", "data.num_workers", "data.eval_batch_size", "data.predict_split",
    "data.branch", "model.compile", "trainer.accelerator", "trainer.enable_progress_bar", "trainer.enable_model_summary",
    "trainer.profiler", "trainer.log_every_n_steps",
)  # fmt: skip


@dataclass
class BranchJob:
    """Everything needed to train one branch; the command line builds it from a config.

    `trainer_settings` are arguments of Lightning's Trainer; `config_yaml` is the resolved config, which is kept beside
    the weights; `job_type` is what W&B is told: branch or baseline.
    """

    run: Run
    data: SpectralDataModule
    module: BranchModule
    trainer_settings: dict[str, Any]
    config_yaml: str
    options: RunOptions
    tracking: TrackingOptions
    local_rank: int = 0
    job_type: Literal["branch", "baseline"] = "branch"

    @property
    def branch(self) -> int:
        return self.data.branch

    @property
    def paths(self) -> BranchPaths:
        return self.run.paths.branch(self.branch)

    def predicting_trainer(self) -> Trainer:
        """A Trainer with the device and precision of the training, for anything but training."""
        return make_trainer([self], logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[])

    def built_module(self) -> BranchModule:
        """A module of its own with the network as it is before training."""
        data = self.data
        return copy.deepcopy(self.module).build(data.in_shape, data.n_classes, data.seed, [self.branch])


def check_trainer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy without the settings that are ours, if those were left alone.

    Raises: ConfigError if one was set, or if there is no end to the training.
    """
    untouched = (None, "auto", 1, True)
    for key in OWN_TRAINER_SETTINGS:
        if settings.get(key) not in untouched:
            raise ConfigError(
                f"trainer.{key}: expected to be left unset, got {settings[key]!r}; every branch trains alone on one "
                "device (choose it by trainer.accelerator and by starting ranks), logs as `tracking` says, and keeps "
                "its checkpoints in the run directory"
            )
    if settings.get("max_epochs") is None and settings.get("max_steps", -1) == -1 and not settings.get("fast_dev_run"):
        raise ConfigError(
            "trainer.max_epochs: expected a number of epochs (or trainer.max_steps), got neither; is there a --config?"
        )
    if settings.get("precision") in ("16-mixed", "16", 16):
        raise ConfigError(
            f"trainer.precision: expected 32-true, bf16-mixed or bf16-true, got {settings['precision']}; the loss scaling "
            "of half precision would be shared between branches"
        )
    return {key: value for key, value in settings.items() if key not in OWN_TRAINER_SETTINGS}


def check_branch(job: BranchJob) -> None:
    """Find out whether a branch may be trained, before any is.

    Raises: RunError if it was begun with other settings, is in training by another process of this machine, or its
    files cannot be read; ConfigError if it is to be stacked and cannot.
    """
    check_same_config(job)
    if job.options.stack is True and (reason := why_not_stacked(job)):
        raise ConfigError(f"run.stack=true: {reason}; run.stack=auto trains the branches one after the other")
    status = read_status(job.paths, job.branch)
    is_here = status.state == "running" and status.host == socket.gethostname() and status.pid != os.getpid()
    if is_here and _is_alive(status.pid):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
        raise RunError(
            f"branch {job.branch} of {job.run.paths.folder} is in training by process {status.pid} on {status.host} "
            f"since {since}; wait for it, or delete {job.paths.status} if that process is another program by now"
        )


def train_branches(jobs: Sequence[BranchJob], report: Callable[[BranchJob, Outcome], None] = lambda *_: None) -> int:
    """Train branches to their end, from `last.ckpt` where there is one; those that had ended before are left alone.

    What goes wrong with a branch is recorded in its `status.json`, and the others go on. `report` is called with each
    branch when it ends. Returns how many failed.

    Raises: RunError if `status.json` or `config.yaml` cannot be written.
    """
    n_failed = 0
    waiting = []
    for job in jobs:
        status = read_status(job.paths, job.branch)
        if status.state == "finished" and job.paths.best.exists():
            report(job, "skipped")
        else:
            waiting.append(Attempt(job, status))
    while waiting:
        group, waiting = next_group(waiting)
        for attempt in train_group(group):
            if attempt.outcome is None:
                waiting.insert(0, attempt)
                continue
            n_failed += attempt.outcome == "failed"
            report(attempt.job, attempt.outcome)
    return n_failed


@dataclass
class Attempt:
    """A branch between its first step in this process and its end. Without an outcome, it is to go on."""

    job: BranchJob
    status: Status
    outcome: Outcome | None = None
    is_alone: bool = False  # after a fault of the group it was in, to find out whose it was
    loggers: list[Logger] = field(default_factory=list)

    def begin(self) -> None:
        if self.loggers:
            return
        job, old = self.job, self.status
        write_atomically(job.paths.config, lambda file: file.write(job.config_yaml.encode()))
        self.status = Status(job.branch, "running", old.attempt + 1, old.epoch, old.step, started=time.time())
        write_status(job.paths, self.status)
        self.loggers = branch_loggers(job.tracking, job.paths, job.options.name, job.run.id, job.branch, job.job_type)

    def end(self, state: State, error: str | None = None) -> None:
        self.status.state, self.status.error = state, error
        self.outcome = "finished" if state == "finished" else "failed"
        write_status(self.job.paths, self.status)
        close(self.loggers)


def next_group(waiting: Sequence[Attempt]) -> tuple[list[Attempt], list[Attempt]]:
    """Those that can train together with the first, and the others."""
    keys = [_group_key(attempt) for attempt in waiting]
    group = [attempt for attempt, key in zip(waiting, keys, strict=True) if key == keys[0]]
    return group, [attempt for attempt, key in zip(waiting, keys, strict=True) if key != keys[0]]


def stacks(job: BranchJob) -> bool:
    """Whether a branch may train with others as one network: as `run.stack` says; on a CPU, convolutions may not.

    There a convolution of one branch keeps every core busy, and the grouped convolution of several is slower.
    """
    if job.options.stack is False or why_not_stacked(job) is not None:
        return False
    on_gpu = pick_device(job.trainer_settings.get("accelerator") or "auto", job.local_rank).type != "cpu"
    has_convolutions = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in job.built_module().modules())
    return job.options.stack is True or on_gpu or not has_convolutions


def why_not_stacked(job: BranchJob) -> str | None:
    """What in the settings of a branch makes it a branch that must train alone, if anything."""
    module = job.built_module()
    optimizer = module.configure_optimizers()
    optimizer = optimizer[0][0] if isinstance(optimizer, tuple | list) else optimizer
    if type(optimizer) not in ELEMENTWISE:
        return f"model.optimizer {type(optimizer).__name__} does not treat each weight alone"
    if len(optimizer.param_groups) > 1:
        return "model.optimizer has several groups of parameters"
    if not can_stack(module.network):
        return "model.network has buffers that are not in its state_dict, or weights that are there twice"
    if job.trainer_settings.get("callbacks"):
        return "trainer.callbacks act on one branch"
    return None


def _group_key(attempt: Attempt) -> Any:
    """Equal for branches that can train together: same network, same step, nothing that keeps one apart."""
    job = attempt.job
    try:
        if attempt.is_alone or not stacks(job):
            return id(attempt)
        resume_from = resume_point(job)
        checkpoint = load_checkpoint(resume_from) if resume_from else None
        at = checkpoint and (checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["state_dict"])
        return job.data.in_shape, str(job.built_module().network), at
    except Exception:  # whatever it is, it is found again and recorded when the branch trains alone
        return id(attempt)


def train_group(group: Sequence[Attempt]) -> Sequence[Attempt]:
    """Train branches together until one of them ends; those without an outcome then are to go on."""
    try:
        for attempt in group:
            attempt.begin()
        _fit(group)
    except (KeyboardInterrupt, SystemExit) as end:
        for attempt in group:
            attempt.end("interrupted")
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes it an exit with code 1, as of an error
            raise KeyboardInterrupt from end
        raise
    except STLError as error:
        _blame(group, str(error))
    except Exception:
        # A fault of this branch (its network, the machine's memory) must not take the branches after it down.
        _blame(group, traceback.format_exc())
    return group


def _blame(group: Sequence[Attempt], error: str) -> None:
    """A fault in a group may be that of one branch: each goes on alone, and the one at fault fails alone."""
    if len(group) == 1:
        group[0].end("failed", error)
        return
    numbers = ", ".join(str(attempt.job.branch) for attempt in group)
    print(
        f"branches {numbers} go on one after the other, since they failed together: {error}",
        file=sys.stderr,
        flush=True,
    )
    for attempt in group:
        attempt.is_alone = True


def _fit(group: Sequence[Attempt]) -> None:
    jobs = [attempt.job for attempt in group]
    first = jobs[0]
    data = copy.copy(first.data)
    data.select_branches([job.branch for job in jobs])
    module = copy.deepcopy(first.module).build(data.in_shape, data.n_classes, data.seed, data.branches)
    module.identities = [job.run.identity(job.branch) for job in jobs]
    resume_from = resume_point(first)
    # Dropout masks must not be shared between branches, whatever the network's construction consumed.
    seed_everything(branch_seed(data.seed, first.branch), verbose=False)
    best = BestCheckpoint(first.options.monitor, first.options.patience, len(jobs))
    trainer = _training_trainer(group, module, data, best, resume_from)
    trainer.fit(module, datamodule=data, ckpt_path=resume_from and resume_from.name, weights_only=True)
    missing = [i for i, job in enumerate(jobs) if not job.paths.best.exists() and module.is_alive(i)]
    if missing:  # trainer.max_steps ended it before the first validation
        trainer.save_checkpoint("best.ckpt", weights_only=True, storage_options=missing)
        trainer.strategy.checkpoint_io.flush()
    for i, attempt in enumerate(group):
        if not module.is_alive(i):
            attempt.end("failed", str(module.divergence(i)))
        elif len(group) == 1 or best.has_ended(i) or not trainer.should_stop:
            attempt.end("finished")


def resume_point(job: BranchJob) -> Path | None:
    """`last.ckpt`, if there is one and the best weights so far are there too.

    Where the user deleted a damaged `best.ckpt`, only training from the beginning finds those weights again.
    """
    if not job.paths.last.exists():
        return None
    checkpoint = load_checkpoint(job.paths.last, job.run.identity(job.branch))
    has_best = checkpoint["callbacks"][BestCheckpoint.__qualname__]["best"][0] > -math.inf
    return None if has_best and not job.paths.best.exists() else job.paths.last


def chunk_of(checkpoint: dict[str, Any], wanted: int | None) -> int | None:
    """Minibatches a chunk: as wanted, but an epoch that was begun goes on as Lightning has counted its chunks."""
    (loader,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    return loader["chunk"] if progress["processed"] == progress["completed"] and loader["batches"] else wanted


def _training_trainer(
    group: Sequence[Attempt],
    module: BranchModule,
    data: SpectralDataModule,
    best: BestCheckpoint,
    resume_from: Path | None,
) -> Trainer:
    """The Trainer of a group. What Lightning would do at each step is done by the module, a chunk at a time."""
    job = group[0].job
    settings = job.trainer_settings
    limit = settings.get("gradient_clip_val")
    module.gradient_clip = (float(limit), settings.get("gradient_clip_algorithm") or "norm") if limit else None
    module.accumulate = settings.get("accumulate_grad_batches") or 1
    data.chunk = job.options.chunk if chunks(settings) else None
    if resume_from is not None:
        data.chunk = chunk_of(load_checkpoint(resume_from), data.chunk)
    shows_bar = job.local_rank == 0 and settings.get("enable_progress_bar") is not False
    users = settings.get("callbacks") or []
    callbacks = [
        *(callback for callback in users if shows_bar or not isinstance(callback, ProgressBar)),
        StatusWriter([(attempt.job.paths, attempt.status) for attempt in group]),
        epochs := EpochLogger([attempt.loggers for attempt in group]),
        best,
        LastCheckpoint(job.options.checkpoint_every_s, job.options.checkpoint_every_n_steps, epochs.save),
    ]
    loggers = group[0].loggers if len(group) == 1 else False
    own = {"gradient_clip_val": None, "gradient_clip_algorithm": None, "accumulate_grad_batches": 1}
    jobs = [attempt.job for attempt in group]
    return make_trainer(jobs, logger=loggers, callbacks=callbacks, enable_progress_bar=shows_bar, **own)


def make_trainer(jobs: Sequence[BranchJob], **own: Any) -> Trainer:
    """A Trainer for these branches and no others, with the user's settings and `own` ones that go before them."""
    first = jobs[0]
    settings = check_trainer_settings(first.trainer_settings)
    independent = alone(settings.pop("accelerator", None) or "auto", first.local_rank)
    independent["plugins"] += [BranchFiles([job.paths for job in jobs]), *(settings.pop("plugins", None) or [])]
    settings = {key: value for key, value in settings.items() if value is not None}
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**defaults | settings | {"default_root_dir": first.paths.folder} | independent | own)


def chunks(settings: dict[str, Any]) -> bool:
    """Whether minibatches may be handed to Lightning many at a time: not where a setting counts or sees each of them."""
    counting = {"fast_dev_run": (False, None), "limit_train_batches": (None, 1.0), "overfit_batches": (None, 0, 0.0)}
    counting |= {"val_check_interval": (None, 1.0), "check_val_every_n_epoch": range(1, 10**9), "profiler": (None,)}
    if any(settings.get(name, usual[0]) not in usual for name, usual in counting.items()):
        return False
    return not any(_sees_batches(callback) for callback in settings.get("callbacks") or [])


def _sees_batches(callback: Callback) -> bool:
    hooks = ("on_train_batch_start", "on_train_batch_end", "on_before_optimizer_step", "on_after_backward")
    is_own = lambda hook: getattr(type(callback), hook) is not getattr(Callback, hook)  # noqa: E731
    return not isinstance(callback, ProgressBar) and any(is_own(hook) for hook in hooks)


def check_same_config(job: BranchJob) -> None:
    """Raises: RunError if the branch was begun with settings that would change what it computes."""
    if not job.paths.config.exists():
        return
    differing = different_settings(job.paths.config.read_text(), job.config_yaml)
    if differing:
        listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, (a, b) in differing.items())
        raise RunError(
            f"branch {job.branch} in {job.paths.folder} was begun with other settings: {listed}. "
            "Choose another `run.name`, or delete the branch's folder"
        )


def different_settings(kept: str, wanted: str) -> dict[str, tuple[Any, Any]]:
    """Keys at which two configs in YAML differ, those aside that are free to change."""
    return {
        key: values
        for key, values in different_keys(yaml.safe_load(kept), yaml.safe_load(wanted)).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_SETTINGS)
    }


def load_best(job: BranchJob) -> BranchModule:
    """The branch with the weights of `best.ckpt`, in evaluation mode on the CPU; its data as they were standardised.

    Raises: CheckpointError if there is none, or it is not of this branch, run and network.
    """
    checkpoint = load_checkpoint(job.paths.best, job.run.identity(job.branch))
    job.data.restore(checkpoint["SpectralDataModule"])
    module = job.built_module()
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise CheckpointError(f"{job.paths.best} does not fit model.network: {error}") from error
    return module.eval()


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
