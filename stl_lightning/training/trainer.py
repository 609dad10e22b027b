"""Lightning's Trainer for the branches of a process: which settings are the user's, and which are ours."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from stl_lightning.checkpoint import BranchFiles
from stl_lightning.errors import ConfigError, unknown
from stl_lightning.strategy import alone
from stl_lightning.training.job import BranchJob

# Trainer settings that this toolkit decides: one device a branch, a folder a branch, loggers by `tracking`.
OWN_TRAINER_SETTINGS = (
    "strategy", "devices", "num_nodes", "logger", "default_root_dir", "use_distributed_sampler", "enable_checkpointing",
)  # fmt: skip


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
            f"trainer.precision: expected 32-true, bf16-mixed or bf16-true, got {settings['precision']}; the loss "
            "scaling of half precision would be shared between branches"
        )
    if not isinstance(settings.get("callbacks") or [], list | tuple):
        what = "expected a list; on the command line, --trainer.callbacks+=CLASS adds to it"
        raise ConfigError(f"trainer.callbacks: {what}; got {settings['callbacks']}")
    _check_step_settings(settings)
    return {key: value for key, value in settings.items() if key not in OWN_TRAINER_SETTINGS}


def _check_step_settings(settings: dict[str, Any]) -> None:
    """What Lightning does not check, since the module makes the steps."""
    limit, algorithm = settings.get("gradient_clip_val"), settings.get("gradient_clip_algorithm")
    accumulate = settings.get("accumulate_grad_batches")
    if limit is not None and not limit > 0:
        raise ConfigError(f"trainer.gradient_clip_val: expected a number above 0, or null; got {limit}")
    if algorithm not in (None, "norm", "value"):
        raise unknown("trainer.gradient_clip_algorithm", algorithm, ("norm", "value"))
    if accumulate is not None and accumulate < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches: expected 1 or more minibatches a step, got {accumulate}")


def make_trainer(jobs: Sequence[BranchJob], **own: Any) -> Trainer:
    """A Trainer for these branches and no others, with the user's settings and `own` ones that go before them."""
    first = jobs[0]
    files = BranchFiles([job.paths for job in jobs])
    return _trainer(first.trainer_settings, first.local_rank, [files], default_root_dir=first.paths.folder, **own)


def try_trainer(settings: dict[str, Any]) -> None:
    """Make a Trainer for training with these settings, to find out whether one can be made.

    Raises: ConfigError as `check_trainer_settings`, and for what Lightning does not take.
    """
    shows_bar = settings.get("enable_progress_bar") is not False
    own = {"enable_progress_bar": shows_bar, "callbacks": users_callbacks(settings, shows_bar), "logger": False}
    try:
        _trainer(settings, 0, [], **own, **STEPS_ARE_OURS)
    except ConfigError:
        raise
    except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
        raise ConfigError(f"trainer: {error}") from error


# Settings of steps that Lightning must not see: the module makes the steps.
STEPS_ARE_OURS = {"gradient_clip_val": None, "gradient_clip_algorithm": None, "accumulate_grad_batches": 1}


def users_callbacks(settings: dict[str, Any], shows_bar: bool) -> list[Callback]:
    """Those of the settings, but for a progress bar where none is shown."""
    return [one for one in settings.get("callbacks") or [] if shows_bar or not isinstance(one, ProgressBar)]


def _trainer(settings: dict[str, Any], local_rank: int, plugins: Sequence[Any], **own: Any) -> Trainer:
    settings = check_trainer_settings(settings)
    independent = alone(settings.pop("accelerator", None) or "auto", local_rank)
    independent["plugins"] += [*plugins, *(settings.pop("plugins", None) or [])]
    settings = {key: value for key, value in settings.items() if value is not None}
    defaults = {"enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(**defaults | settings | independent | own)


def predicting_trainer(job: BranchJob) -> Trainer:
    """A Trainer with the device and precision of the training, for anything but training."""
    return make_trainer([job], logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[])


# Values of the Trainer's settings that count batches, with which they do not matter.
USUAL = {
    "fast_dev_run": (False, None), "limit_train_batches": (None, 1.0), "overfit_batches": (None, 0.0),
    "val_check_interval": (None, 1.0), "profiler": (None,),
}  # fmt: skip
BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")


def chunks(settings: dict[str, Any]) -> bool:
    """Whether minibatches may be handed to Lightning many at a time: not where a setting counts or sees each one."""
    counts = not all(is_usual(settings, name) for name in USUAL)
    counts |= settings.get("check_val_every_n_epoch", 1) is None
    return not counts and not any(_sees_batches(callback) for callback in settings.get("callbacks") or [])


def is_usual(settings: dict[str, Any], name: str) -> bool:
    """Whether one of the settings in `USUAL` was left alone. A whole number counts batches: 1.0 is all, 1 is one."""
    value = settings.get(name, USUAL[name][0])
    return any(value == usual and type(value) is type(usual) for usual in USUAL[name])


def _sees_batches(callback: Callback) -> bool:
    own = [hook for hook in BATCH_HOOKS if getattr(type(callback), hook) is not getattr(Callback, hook)]
    return bool(own) and not isinstance(callback, ProgressBar)
