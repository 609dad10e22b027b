"""Train the branches of a process: resume them, finish them, or record why they failed.

Branches of one architecture that are at the same step train together, as one group with one Trainer. When one of them
ends before the others, they go on without it from the checkpoint of that epoch.
"""

import copy
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger
from torch import nn

from stl_lightning import leaving
from stl_lightning.attempts import begin_attempt
from stl_lightning.checkpoint import BestCheckpoint, LastCheckpoint, load_checkpoint, progress
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.errors import DivergedError, FencedError, LeaveError, RunError, STLError, say
from stl_lightning.module import BranchModule
from stl_lightning.networks import branch_seed
from stl_lightning.ranks import job_id
from stl_lightning.stacked import describe
from stl_lightning.status import State, Status, read_status, write_status
from stl_lightning.strategy import pick_device
from stl_lightning.tracking import EpochLogger, EpochLogits, branch_loggers, close
from stl_lightning.traffic import forbid_process_groups
from stl_lightning.training.heartbeat import Heartbeat
from stl_lightning.training.job import BranchJob, resume_point, why_not_stacked
from stl_lightning.training.trainer import STEPS_ARE_OURS, chunks, make_trainer, users_callbacks

Outcome = Literal["finished", "skipped", "failed", "lost"]  # lost to another process


@dataclass
class Attempt:
    """A branch between its first step in this process and its end. Without an outcome, it is to go on."""

    job: BranchJob
    status: Status
    outcome: Outcome | None = None
    design: str | None = None  # what branches have in common that train as one network
    is_alone: bool = False  # after a fault of the group it was in, to find out whose it was
    has_begun: bool = False
    loggers: list[Logger] = field(default_factory=list)

    def begin(self) -> None:
        """Take the branch; one that another process has finished meanwhile is left alone.

        Raises: RunError if it is in training by another process, or its files cannot be written.
        """
        if self.has_begun:
            return
        job = self.job
        old = read_status(job.paths, job.branch)
        if old.state == "finished":
            self.status, self.outcome = old, "skipped"
            return
        number, paths = begin_attempt(job.paths, job.branch, job.lost_attempt)
        job.desk = paths.desk
        paths.write(paths.config, lambda file: file.write(job.config_yaml.encode()))
        n_failures = old.n_failures if old.job == job_id() else 0
        self.status = Status(
            job.branch, "running", number, old.epoch, old.n_epochs, old.step, old.epoch_s, old.loss, job=job_id(),
            n_failures=n_failures, traffic=old.traffic,
        )  # fmt: skip
        write_status(paths, self.status)
        goes_on = f", goes on after epoch {old.epoch}, step {old.step}" if old.step else ""
        say(f"{job.job_type} {job.branch}: attempt {number}{goes_on}; {job.paths.folder}", sys.stdout)
        self.has_begun = True

    def open_loggers(self) -> None:
        job, name = self.job, self.job.options.name
        self.loggers = self.loggers or branch_loggers(
            job.tracking, job.paths, name, job.run.id, job.branch, job.job_type
        )

    def end(self, state: State, error: str | None = None) -> None:
        """Raises: FencedError if a newer attempt owns the branch; RunError if the end cannot be noted."""
        self.status.state, self.status.error = state, error
        self.status.n_failures += state == "failed"
        write_status(self.job.paths, self.status)
        self.outcome = "finished" if state == "finished" else "failed"
        close(self.loggers)

    def pause(self) -> None:
        """Give the branch back for now: who waits for its turn has no heart that beats for it."""
        if self.has_begun:
            with suppress(RunError):
                self.end("interrupted")
        self.outcome, self.has_begun, self.loggers = None, False, []


def train_branches(jobs: Sequence[BranchJob], report: Callable[[BranchJob, Outcome], None] = lambda *_: None) -> int:
    """Train branches to their end, from `last.ckpt` where there is one; those that had ended before are left alone.

    What goes wrong with a branch is recorded in its `status.json`, and the others go on. `report` is called with each
    branch when it ends. Returns how many failed.

    Raises: LeaveError once a signal has asked to leave. When the others have ended: FencedError if a newer attempt owns
    one of the branches; RunError if one is in training by another process, or its files cannot be read or written.
    """
    n_failed = 0
    waiting: list[Attempt] = []
    lost: list[STLError] = []  # branches that another process has, or that nothing can be noted of
    for job in jobs:
        attempt = Attempt(job, Status(job.branch))
        try:
            if read_status(job.paths, job.branch).state == "finished":
                report(job, "skipped")
            else:
                waiting.append(attempt)
        except RunError as error:
            _lose(attempt, error)
            lost.append(error)
    _say_why_not_stacked(waiting)
    while waiting:
        if leaving.asked():
            raise LeaveError(f"asked to leave by {leaving.asked()}, before the next branch began")
        group, others = next_group(waiting)
        lost += train_group(group)
        for attempt in group:
            if attempt.outcome is not None and attempt.outcome != "lost":
                n_failed += attempt.outcome == "failed"
                report(attempt.job, attempt.outcome)
        waiting = [attempt for attempt in group if attempt.outcome is None] + others
        # A Trainer and its module hold each other, and so the slices, until they are collected.
        gc.collect()
    if lost:
        raise lost[0]
    return n_failed


def _say_why_not_stacked(waiting: Sequence[Attempt]) -> None:
    if len(waiting) < 2 or waiting[0].job.options.stack != "auto":
        return
    with suppress(STLError):  # is found again, and recorded, when the branch trains
        reason = why_not_stacked(waiting[0].job, waiting[0].job.built_module())
        if reason is not None:
            say(f"the branches train one after the other: {reason}", sys.stdout)


def next_group(waiting: Sequence[Attempt]) -> tuple[list[Attempt], list[Attempt]]:
    """Those that can train together with the first, and the others."""
    keys = [_group_key(attempt) for attempt in waiting] if len(waiting) > 1 else [None]
    group = [attempt for attempt, key in zip(waiting, keys, strict=True) if key == keys[0]]
    return group, [attempt for attempt, key in zip(waiting, keys, strict=True) if key != keys[0]]


def stacked_design(job: BranchJob) -> str | None:
    """What two branches have in common that may train as one network; None for one that trains alone.

    As `run.stack` says. On a CPU, `auto` keeps convolutions apart: one branch's keep every core busy there, and the
    grouped convolution of several is slower.
    """
    module = job.built_module()
    assert module.network is not None, "it was built"
    if job.options.stack is False or why_not_stacked(job, module) is not None:
        return None
    on_gpu = pick_device(job.trainer_settings.get("accelerator") or "auto", job.local_rank).type != "cpu"
    has_convolutions = any(isinstance(layer, nn.modules.conv._ConvNd) for layer in module.modules())
    if job.options.stack == "auto" and has_convolutions and not on_gpu:
        return None
    return f"{job.data.in_shape} {describe(module.network)}"


def _group_key(attempt: Attempt) -> Any:
    """Equal for branches that can train together: same network, same step, nothing that keeps one apart."""
    job = attempt.job
    try:
        if attempt.design is None:
            attempt.design = stacked_design(job) or ""
        if attempt.is_alone or not attempt.design:
            return id(attempt)
        resume_from = resume_point(job)
        checkpoint = load_checkpoint(resume_from) if resume_from else None
        return attempt.design, checkpoint and progress(checkpoint)
    except Exception:  # whatever it is, it is found again and recorded when the branch trains alone
        return id(attempt)


def train_group(group: Sequence[Attempt]) -> list[STLError]:
    """Train branches together until one of them ends; those without an outcome then are to go on.

    Returns why branches of it were lost to another process.
    """
    lost = [error for attempt in group if (error := _begin(attempt)) is not None]
    begun = [attempt for attempt in group if attempt.outcome is None]
    if not begun:
        return lost
    heartbeat = Heartbeat([(attempt.job.paths, attempt.status) for attempt in begun])
    try:
        with forbid_process_groups(), heartbeat:
            for attempt in begun:
                attempt.open_loggers()
            ends = _fit(begun, heartbeat)
        for attempt, state, reason in ends:  # after the last beat, which would say that they are running
            attempt.end(state, reason)
    except FencedError as error:
        lost += _drop_fenced(begun, error)
    except (LeaveError, KeyboardInterrupt, SystemExit) as end:
        for attempt in begun:
            with suppress(FencedError):
                attempt.pause()
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes it an exit with code 1, as of an error
            raise KeyboardInterrupt from end
        raise
    except STLError as error:
        _blame(begun, str(error))
    except Exception:
        # A fault of this branch (its network, the machine's memory) must not take the branches after it down.
        _blame(begun, traceback.format_exc())
    return lost


def _begin(attempt: Attempt) -> STLError | None:
    """Take a branch, or say why not."""
    try:
        attempt.begin()
    except STLError as error:
        _lose(attempt, error)
        return error
    return None


def _drop_fenced(group: Sequence[Attempt], error: FencedError) -> list[STLError]:
    """Those that a newer attempt owns are lost; the others go on without them, from their checkpoints."""
    lost: list[STLError] = []
    for attempt in group:
        try:
            attempt.pause()
        except FencedError as fenced:
            _lose(attempt, fenced)
            lost.append(fenced)
    return lost or [error]


def _lose(attempt: Attempt, error: STLError) -> None:
    attempt.outcome = "lost"
    say(f"branch {attempt.job.branch}: {error}")


def _blame(group: Sequence[Attempt], error: str) -> None:
    """A fault in a group may be that of one branch: each goes on alone, and the one at fault fails alone."""
    if len(group) == 1:
        try:
            group[0].end("failed", error)
        except RunError as full:
            say(f"branch {group[0].job.branch}: {error}\n{full}")
            group[0].outcome = "failed"
        return
    numbers = ", ".join(str(attempt.job.branch) for attempt in group)
    reason = error.strip().rpartition("\n")[-1]  # of a traceback; all of it is recorded where the branch fails alone
    say(f"branches {numbers} go on one after the other, since they failed together: {reason}")
    for attempt in group:
        attempt.is_alone = True
        attempt.pause()


def _fit(group: Sequence[Attempt], heartbeat: Heartbeat) -> list[tuple[Attempt, State, str | None]]:
    """Returns those that came to their end, and which."""
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
    trainer = _training_trainer(group, module, data, best, heartbeat, resume_from)
    files: Any = trainer.strategy.checkpoint_io
    # Lightning does so after it has loaded a checkpoint: weights in float64 would come back by way of float32.
    trainer.precision_plugin.convert_module(module)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume_from and resume_from.name, weights_only=True)
    except DivergedError:  # all of them
        files.flush()
        return [(attempt, "failed", str(module.divergence(i))) for i, attempt in enumerate(group)]
    except BaseException:
        with suppress(RunError, FencedError):  # such as a full disk, which may be what ended it
            files.flush()
        raise
    over = best.ended(module) or range(len(jobs))  # the others go on without those that ended early
    missing = [i for i in over if not jobs[i].paths.best.exists() and module.is_alive(i)]
    if missing:  # there was no validation
        with module.validated_weights():
            trainer.save_checkpoint("best.ckpt", weights_only=True, storage_options=missing)
        files.flush()
    return [
        (group[i], "finished", None) if module.is_alive(i) else (group[i], "failed", str(module.divergence(i)))
        for i in over
    ]


def _epoch_logits(group: Sequence[Attempt]) -> list[EpochLogits]:
    return [EpochLogits(attempt.job.paths) for attempt in group if attempt.job.options.epoch_logits]


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
    heartbeat: Heartbeat,
    resume_from: Path | None,
) -> Trainer:
    """The Trainer of a group. What Lightning would do at each step is done by the module, a chunk at a time."""
    job = group[0].job
    settings = job.trainer_settings
    limit = settings.get("gradient_clip_val")
    module.gradient_clip = (float(limit), settings.get("gradient_clip_algorithm") or "norm") if limit else None
    module.accumulate = settings.get("accumulate_grad_batches") or 1
    module.n_kept_logits = job.options.epoch_logits
    data.chunk = job.options.chunk if chunks(settings) else None
    if resume_from is not None:
        data.chunk = chunk_of(load_checkpoint(resume_from), data.chunk)
    shows_bar = job.local_rank == 0 and settings.get("enable_progress_bar") is not False
    callbacks = [
        *users_callbacks(settings, shows_bar),
        heartbeat,
        epochs := EpochLogger([attempt.loggers for attempt in group], _epoch_logits(group)),
        best,
        last := LastCheckpoint(
            job.options.checkpoint_every_s,
            job.options.checkpoint_every_n_steps,
            epochs.save,
            heartbeat.is_leaving,
            heartbeat.leave,
        ),
    ]
    loggers = group[0].loggers if len(group) == 1 else False
    jobs = [attempt.job for attempt in group]
    trainer = make_trainer(jobs, logger=loggers, callbacks=callbacks, enable_progress_bar=shows_bar, **STEPS_ARE_OURS)
    module.is_leaving, module.leave = heartbeat.is_leaving, lambda: last.save_and_leave(trainer, module)
    return trainer
