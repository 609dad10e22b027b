"""How long a training is going to be, from its settings alone, and whether the schedule is as long."""

import math
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from stl_lightning.errors import ConfigError, say
from stl_lightning.loaders import n_training_images
from stl_lightning.training.trainer import is_usual


def steps_an_epoch(settings: dict[str, Any], n_images: int, batch_size: int) -> int:
    """Of the optimiser, by the settings of the Trainer, if it is not to leave out batches."""
    n_batches = -(-n_training_images(n_images, batch_size) // batch_size)
    return -(-n_batches // (settings.get("accumulate_grad_batches") or 1))


def planned_steps(settings: dict[str, Any], n_steps: int) -> float:
    """Up to `max_epochs` of `n_steps` each, or `max_steps`; infinite where neither is a limit."""
    units = {"max_epochs": n_steps, "max_steps": 1}
    limits = [(settings.get(name), unit) for name, unit in units.items()]
    return min((value * unit for value, unit in limits if value is not None and value >= 0), default=math.inf)


def check_schedule(
    scheduler: LRScheduler, interval: str, settings: dict[str, Any], n_images: int, batch_size: int
) -> None:
    """Compare a schedule that has an end (OneCycleLR) with the training; says so if it goes on after it.

    Not where settings leave out batches, or set no end to the training.
    Raises: ConfigError if the schedule ends first, which torch would find out in that step.
    """
    limits = ("fast_dev_run", "limit_train_batches", "overfit_batches")
    if not isinstance(scheduler, OneCycleLR) or not all(is_usual(settings, name) for name in limits):
        return
    n_steps = steps_an_epoch(settings, n_images, batch_size)
    planned = planned_steps(settings, n_steps)
    if planned == math.inf:
        return
    planned = planned if interval == "step" else math.ceil(planned / n_steps)
    total, key = scheduler.total_steps, "model.lr_scheduler.init_args.total_steps"
    if total < planned:
        raise ConfigError(
            f"{key} (or epochs times steps_per_epoch): expected {planned}, so many {interval}s has the training; "
            f"got {total}"
        )
    if total > planned:
        say(f"{key}: {total} {interval}s, but the training ends after {planned}, within the cycle")
