"""Train one branch from its config: resume it, finish it, or record why it failed."""

import time
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import Logger

from stl_lightning.checkpoint import AtomicCheckpointIO, LastCheckpoint, best_checkpoint, load_checkpoint
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.errors import ConfigError, RunError, STLError
from stl_lightning.module import BranchModule, branch_seed
from stl_lightning.paths import BranchPaths, write_atomically
from stl_lightning.run import Run, RunOptions, different_keys
from stl_lightning.status import Status, StatusWriter, read_status, write_status
from stl_lightning.strategy import alone
from stl_lightning.tracking import TrackingOptions, branch_loggers, close

Outcome = Literal["finished", "skipped", "failed"]

# Trainer settings that this toolkit decides: one device a branch, a folder a branch, loggers by `tracking`.
OWN_TRAINER_SETTINGS = ("strategy", "devices", "num_nodes", "logger", "default_root_dir", "use_distributed_sampler")

# Settings that may change between two attempts at a branch: where and how it runs, not what it computes.
FREE_SETTINGS = (
    "config", "run", "tracking", "ensemble", "baseline", "data.root", "data.download", "data.num_workers",
    "data.eval_batch_size", "data.predict_split", "trainer.accelerator", "trainer.enable_progress_bar",
    "trainer.enable_model_summary", "trainer.profiler", "trainer.log_every_n_steps", "trainer.plugins",
)  # fmt: skip


@dataclass
class BranchJob:
    """Everything needed to train one branch; the command line builds it from a config.

    `trainer_settings` are arguments of Lightning's Trainer; `config_yaml` is the resolved config, which is kept beside
    the weights.
    """

    run: Run
    data: SpectralDataModule
    module: BranchModule
    trainer_settings: dict[str, Any]
    config_yaml: str
    options: RunOptions
    tracking: TrackingOptions
    local_rank: int = 0

    @property
    def branch(self) -> int:
        return self.data.branch

    @property
    def paths(self) -> BranchPaths:
        return self.run.paths.branch(self.branch)

    def trainer(self, **extra: Any) -> Trainer:
        """A Trainer for this branch alone."""
        settings = check_trainer_settings(self.trainer_settings)
        independent = alone(settings.pop("accelerator", "auto"), self.local_rank)
        independent["plugins"] += [AtomicCheckpointIO(), *(settings.pop("plugins", None) or [])]
        callbacks = (settings.pop("callbacks", None) or []) + extra.pop("callbacks", [])
        defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0, "default_root_dir": self.paths.folder}
        settings = {key: value for key, value in settings.items() if value is not None}
        return Trainer(**{**settings, **defaults, **independent, **extra}, callbacks=callbacks)


def check_trainer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy without the settings that are ours, if those were left alone.

    Raises: ConfigError if one was set, or if there is no end to the training.
    """
    untouched = (None, "auto", 1, True)
    for key in OWN_TRAINER_SETTINGS:
        if settings.get(key) not in untouched:
            raise ConfigError(
                f"trainer.{key}: expected to be left unset, got {settings[key]!r}; every branch trains alone on one "
                "device (choose it by trainer.accelerator and by starting ranks) and logs as `tracking` says"
            )
    if settings.get("max_epochs") is None and settings.get("max_steps", -1) == -1 and not settings.get("fast_dev_run"):
        raise ConfigError("trainer.max_epochs: expected a number of epochs (or trainer.max_steps), got neither")
    return {key: value for key, value in settings.items() if key not in OWN_TRAINER_SETTINGS}


def train_branch(job: BranchJob) -> Outcome:
    """Train a branch to its end, from `last.ckpt` if there is one.

    An error in training is recorded in `status.json` and returned as "failed", so that the other branches go on.

    Raises: STLError if the branch cannot be started: its files belong to other settings, or cannot be written.
    """
    status = read_status(job.paths, job.branch)
    _check_same_config(job)
    if status.state == "finished" and job.paths.best.exists():
        return "skipped"
    resume_from = job.paths.last if job.paths.last.exists() else None
    if resume_from:
        load_checkpoint(resume_from, job.run.identity(job.branch))
    job.module.identity = job.run.identity(job.branch)
    write_atomically(job.paths.config, lambda file: file.write(job.config_yaml.encode()))
    status = Status(job.branch, "running", status.attempt + 1, status.epoch, status.step, started=time.time())
    write_status(job.paths, status)
    return _fit(job, status, resume_from)


def _fit(job: BranchJob, status: Status, resume_from: Any) -> Outcome:
    loggers = branch_loggers(job.tracking, job.paths, job.options.name, job.run.id, job.branch)
    try:
        trainer = _training_trainer(job, status, loggers)
        trainer.fit(job.module, datamodule=job.data, ckpt_path=resume_from, weights_only=True)
        if not job.paths.best.exists():  # trainer.max_steps ended it before the first validation
            trainer.save_checkpoint(job.paths.best, weights_only=True)
        status.state = "finished"
    except (KeyboardInterrupt, SystemExit):
        status.state = "interrupted"
        raise
    except STLError as error:
        status.state, status.error = "failed", str(error)
    except Exception:
        # A fault of this branch (its network, the machine's memory) must not take the branches after it down.
        status.state, status.error = "failed", traceback.format_exc()
    finally:
        close(loggers)
        write_status(job.paths, status)
    return "finished" if status.state == "finished" else "failed"


def _training_trainer(job: BranchJob, status: Status, loggers: list[Logger]) -> Trainer:
    # Dropout masks must not be shared between branches, whatever the network's construction consumed.
    seed_everything(branch_seed(job.data.seed, job.branch), verbose=False)
    callbacks = [
        StatusWriter(job.paths, status),
        best_checkpoint(job.paths, job.options.monitor),
        LastCheckpoint(job.paths, job.options.checkpoint_every_n_steps),
    ]
    shows_bar = job.local_rank == 0 and job.trainer_settings.get("enable_progress_bar") is not False
    return job.trainer(logger=loggers, callbacks=callbacks, enable_progress_bar=shows_bar)


def _check_same_config(job: BranchJob) -> None:
    """Raises: RunError if the branch was begun with settings that would change what it computes."""
    if not job.paths.config.exists():
        return
    kept, wanted = yaml.safe_load(job.paths.config.read_bytes()), yaml.safe_load(job.config_yaml)
    differing = {
        key: values
        for key, values in different_keys(kept, wanted).items()
        if not any(key == free or key.startswith(f"{free}.") for free in FREE_SETTINGS)
    }
    if differing:
        listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, (a, b) in differing.items())
        raise RunError(
            f"branch {job.branch} in {job.paths.folder} was begun with other settings: {listed}. "
            "Choose another `run.name`, or delete the branch's folder"
        )


def load_best(job: BranchJob) -> BranchModule:
    """The branch with the weights of `best.ckpt`, in evaluation mode on the CPU.

    Raises: CheckpointError if there is none or it is not of this branch and run.
    """
    checkpoint = load_checkpoint(job.paths.best, job.run.identity(job.branch))
    job.data.load_state_dict(checkpoint["SpectralDataModule"])
    job.data.setup()
    module = job.module.build(job.data.in_shape, job.data.n_classes, job.data.seed, job.branch)
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()
