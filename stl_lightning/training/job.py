"""One branch to train: what it is made of, where it resumes, whether it may begin, what it became."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ProgressBar
from torch import nn

from stl_lightning.attempts import refuse_owned
from stl_lightning.checkpoint import BestCheckpoint, load_checkpoint
from stl_lightning.datamodule import SpectralDataModule
from stl_lightning.errors import CheckpointError, ConfigError, RunError
from stl_lightning.module import BranchModule
from stl_lightning.paths import BranchPaths
from stl_lightning.run import Run, RunOptions, different_keys
from stl_lightning.stacked import ELEMENTWISE, can_stack, chain
from stl_lightning.tracking import TrackingOptions

# Settings that may change between two attempts at a branch: where and how it runs, not what it computes.
FREE_SETTINGS = (
    "config", "run.name", "run.root", "run.branches", "run.checkpoint_every_n_steps", "run.checkpoint_every_s",
    "run.stack", "run.chunk", "run.epoch_logits", "tracking", "ensemble", "baseline", "data.root", "data.download",
    "data.store", "data.num_workers", "data.eval_batch_size", "data.predict_split", "data.branch", "model.compile",
    "trainer.accelerator", "trainer.enable_progress_bar", "trainer.enable_model_summary", "trainer.profiler",
    "trainer.log_every_n_steps",
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
    desk: Path | None = None  # of the attempt that trains it
    lost_attempt: int | None = None  # the number of one that stopped elsewhere, as `check_branches` has found

    @property
    def branch(self) -> int:
        return self.data.branch

    @property
    def paths(self) -> BranchPaths:
        return replace(self.run.paths.branch(self.branch), desk=self.desk)

    def built_module(self) -> BranchModule:
        """A module of its own with the network as it is before training."""
        data = self.data
        return copy.deepcopy(self.module).build(data.in_shape, data.n_classes, data.seed, [self.branch])


def check_branches(jobs: Sequence[BranchJob]) -> None:
    """Find out whether these branches may be trained here and now, before any is.

    Raises: as `check_branch`; RunError if one is in training by another process; LeaveError if asked to leave while an
    owner's sign of life is waited for.
    """
    for job in jobs:
        check_branch(job)
    lost = refuse_owned([(job.paths, job.branch) for job in jobs])
    for job in jobs:
        job.lost_attempt = lost.get(job.branch)


def check_branch(job: BranchJob) -> None:
    """Find out whether the settings of a branch let it be trained.

    Raises: RunError if it was begun with other settings; ConfigError if it is to be stacked and cannot.
    """
    check_same_config(job)
    check_callbacks(job.trainer_settings.get("callbacks") or [])
    if job.options.stack is True and (reason := why_not_stacked(job, job.built_module())):
        raise ConfigError(f"run.stack=true: {reason}; run.stack=auto trains the branches one after the other")


# What Lightning would call around a step, which the module makes by itself.
STEP_HOOKS = ("on_before_backward", "on_after_backward", "on_before_optimizer_step", "on_before_zero_grad")


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Raises: ConfigError for a callback that waits for something that never happens here."""
    for callback in callbacks:
        waits = [hook for hook in STEP_HOOKS if getattr(type(callback), hook) is not getattr(Callback, hook)]
        if waits:
            raise ConfigError(
                f"trainer.callbacks: {type(callback).__name__} acts in {', '.join(waits)}, which is never called here: "
                "the module makes its steps itself, many for one of Lightning's; expected hooks of batches or epochs"
            )


def why_not_stacked(job: BranchJob, module: BranchModule) -> str | None:
    """What in the settings of a branch and in its built module makes it one that must train alone, if anything."""
    optimizer = module.configure_optimizers()
    optimizer = optimizer[0][0] if isinstance(optimizer, tuple | list) else optimizer
    if type(optimizer) not in ELEMENTWISE:
        return f"model.optimizer {type(optimizer).__name__} does not treat each weight alone"
    if len(optimizer.param_groups) > 1:
        return "model.optimizer has several groups of parameters"
    if module.network is None or not can_stack(module.network):
        return "model.network has buffers that are not in its state_dict, or weights that are there twice"
    if chain(module.network) is None and _draws(module.network, job.data.in_shape):
        return "model.network draws random numbers (stl_lightning.networks.Dropout draws them a branch), or fails"
    if any(not isinstance(callback, ProgressBar) for callback in job.trainer_settings.get("callbacks") or []):
        return "trainer.callbacks act on one branch"
    if job.options.patience and (job.trainer_settings.get("min_epochs") or job.trainer_settings.get("min_steps")):
        return "trainer.min_epochs and min_steps let a branch outlive its run.patience"
    return None


def _draws(network: nn.Module, in_shape: tuple[int, int, int]) -> bool:
    """Whether a training pass of a network on the CPU takes numbers from torch's generator, or comes to no end."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        before = torch.get_rng_state()
        try:
            copy.deepcopy(network).train()(torch.zeros(2, *in_shape))
        except Exception:  # of the user's code: is recorded where the branch trains, alone
            return True
        return not torch.equal(torch.get_rng_state(), before)


def resume_point(job: BranchJob) -> Path | None:
    """`last.ckpt`, if there is one and the best weights so far are there too.

    Where the user deleted a damaged `best.ckpt`, only training from the beginning finds those weights again.
    """
    if not job.paths.last.exists():
        return None
    checkpoint = load_checkpoint(job.paths.last, job.run.identity(job.branch))
    has_best = checkpoint["callbacks"][BestCheckpoint.__qualname__]["best"][0] > -math.inf
    return None if has_best and not job.paths.best.exists() else job.paths.last


def check_same_config(job: BranchJob) -> None:
    """Raises: RunError if the branch, or one beside it, was begun with settings that would change what it computes."""
    others = (branch for branch in range(job.data.n_branches) if branch != job.branch)
    folders = (job.run.paths.branch(branch) for branch in (job.branch, *others))
    begun = next((paths for paths in folders if paths.config.exists()), None)
    differing = different_settings(begun.config.read_text(), job.config_yaml) if begun else {}
    if begun and differing:
        listed = "; ".join(f"{key} was {a!r} and is now {b!r}" for key, (a, b) in differing.items())
        raise RunError(
            f"branch {job.branch}: {begun.folder} was begun with other settings: {listed}. "
            "Expected the same of all branches of a run; choose another `run.name`"
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
