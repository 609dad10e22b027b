"""Train one branch from its config: resume it, finish it, or record why it failed."""

import copy
import math
import os
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import Logger

from stl_lightning.checkpoint import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint, load_checkpoint
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.errors import CheckpointError, ConfigError, RunError, STLError
from stl_lightning.module import BranchModule, branch_seed
from stl_lightning.paths import BranchPaths, write_atomically
from stl_lightning.run import Run, RunOptions, different_keys
from stl_lightning.status import Status, StatusWriter, read_status, write_status
from stl_lightning.strategy import alone
from stl_lightning.tracking import TrackingOptions, branch_loggers, close

Outcome = Literal["finished", "skipped", "failed"]

# Trainer settings that this toolkit decides: one device a branch, a folder a branch, loggers by `tracking`.
OWN_TRAINER_SETTINGS = (
    "strategy", "devices", "num_nodes", "logger", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
)  # fmt: skip

# Settings that may change between two attempts at a branch: where and how it runs, not what it computes.
FREE_SETTINGS = (
    "config", "run.name", "run.root", "run.branches", "run.checkpoint_every_n_steps", "tracking", "ensemble",
    "baseline", "data.root", "data.download", "data.num_workers", "data.eval_batch_size", "data.predict_split",
    "data.branch", "trainer.accelerator", "trainer.enable_progress_bar", "trainer.enable_model_summary",
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

    def trainer(self, **own: Any) -> Trainer:
        """A Trainer for this branch alone, with the user's settings and `own` ones that go before them."""
        settings = check_trainer_settings(self.trainer_settings)
        independent = alone(settings.pop("accelerator", "auto"), self.local_rank)
        independent["plugins"] += [AtomicCheckpointIO(), *(settings.pop("plugins", None) or [])]
        settings = {key: value for key, value in settings.items() if value is not None}
        defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
        own = {"default_root_dir": self.paths.folder} | independent | own
        return Trainer(**defaults | settings | own)

    def built_module(self) -> BranchModule:
        """A module of its own with the network as it is before training."""
        data = self.data
        return copy.deepcopy(self.module).build(data.in_shape, data.n_classes, data.seed, data.branch)


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
    return {key: value for key, value in settings.items() if key not in OWN_TRAINER_SETTINGS}


def check_branch(job: BranchJob) -> None:
    """Find out whether a branch may be trained, before any is.

    Raises: RunError if it was begun with other settings, is in training by another process of this machine, or its
    files cannot be read.
    """
    check_same_config(job)
    status = read_status(job.paths, job.branch)
    is_here = status.state == "running" and status.host == socket.gethostname() and status.pid != os.getpid()
    if is_here and _is_alive(status.pid):
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
        raise RunError(
            f"branch {job.branch} of {job.run.paths.folder} is in training by process {status.pid} on {status.host} "
            f"since {since}; wait for it, or delete {job.paths.status} if that process is another program by now"
        )


def train_branch(job: BranchJob) -> Outcome:
    """Train a branch to its end, from `last.ckpt` if there is one; an end that was reached before is left alone.

    What goes wrong with this branch is recorded in `status.json` and returned as "failed", so that others go on.

    Raises: RunError if `status.json` or `config.yaml` cannot be written.
    """
    status = read_status(job.paths, job.branch)
    if status.state == "finished" and job.paths.best.exists():
        return "skipped"
    write_atomically(job.paths.config, lambda file: file.write(job.config_yaml.encode()))
    status = Status(job.branch, "running", status.attempt + 1, status.epoch, status.step, started=time.time())
    write_status(job.paths, status)
    try:
        _fit(job, status)
        status.state = "finished"
    except (KeyboardInterrupt, SystemExit) as end:
        status.state = "interrupted"
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes it an exit with code 1, as of an error
            raise KeyboardInterrupt from end
        raise
    except STLError as error:
        status.state, status.error = "failed", str(error)
    except Exception:
        # A fault of this branch (its network, the machine's memory) must not take the branches after it down.
        status.state, status.error = "failed", traceback.format_exc()
    finally:
        write_status(job.paths, status)
        close()
    return "finished" if status.state == "finished" else "failed"


def _fit(job: BranchJob, status: Status) -> None:
    job.module = job.built_module()
    job.module.identity = job.run.identity(job.branch)
    resume_from = _resume_point(job)
    # Dropout masks must not be shared between branches, whatever the network's construction consumed.
    seed_everything(branch_seed(job.data.seed, job.branch), verbose=False)
    loggers = branch_loggers(job.tracking, job.paths, job.options.name, job.run.id, job.branch, job.job_type)
    trainer = _training_trainer(job, status, loggers)
    trainer.fit(job.module, datamodule=job.data, ckpt_path=resume_from, weights_only=True)
    if not job.paths.best.exists():  # trainer.max_steps ended it before the first validation
        trainer.save_checkpoint(job.paths.best, weights_only=True)


def _resume_point(job: BranchJob) -> Path | None:
    """`last.ckpt`, if there is one and the best weights so far are there too.

    Where the user deleted a damaged `best.ckpt`, only training from the beginning finds those weights again.
    """
    if not job.paths.last.exists():
        return None
    checkpoint = load_checkpoint(job.paths.last, job.module.identity)
    has_best = checkpoint["callbacks"][BestCheckpoint.__qualname__]["best"] > -math.inf
    return None if has_best and not job.paths.best.exists() else job.paths.last


def _training_trainer(job: BranchJob, status: Status, loggers: list[Logger]) -> Trainer:
    shows_bar = job.local_rank == 0 and job.trainer_settings.get("enable_progress_bar") is not False
    users = job.trainer_settings.get("callbacks") or []
    callbacks = [
        *(callback for callback in users if shows_bar or not isinstance(callback, ProgressBar)),
        StatusWriter(job.paths, status),
        BestCheckpoint(job.paths, job.options.monitor),
        LastCheckpoint(job.paths, job.options.checkpoint_every_n_steps),
    ]
    return job.trainer(logger=loggers, callbacks=callbacks, enable_progress_bar=shows_bar)


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
