"""How long a training is going to be, from its settings alone, and whether the schedule is as long."""

import math
import sys
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from stl_lightning.errors import ConfigError


def steps_an_epoch(settings: dict[str, Any], n_images: int, batch_size: int) -> int:
    """Of the optimiser, by the settings of the Trainer."""
    n_batches = -(-n_images // batch_size)
    return -(-n_batches // (settings.get("accumulate_grad_batches") or 1))


def planned_epochs(settings: dict[str, Any], n_steps: int) -> float:
    """Of `n_steps` each, up to `max_epochs` or `max_steps`; infinite if neither is set."""
    units = {"max_epochs": 1.0, "max_steps": n_steps}
    given = {name: settings.get(name) for name in units}
    return min((value / units[name] for name, value in given.items() if value not in (None, -1)), default=math.inf)


def check_schedule(
    scheduler: LRScheduler, interval: str, settings: dict[str, Any], n_images: int, batch_size: int
) -> None:
    """Compare a schedule that has an end (OneCycleLR) with the training; says so if it goes on after it.

    Raises: ConfigError if the schedule ends first, which torch would find out in that step.
    """
    if not isinstance(scheduler, OneCycleLR) or settings.get("fast_dev_run"):
        return
    n_steps = steps_an_epoch(settings, n_images, batch_size)
    planned = planned_epochs(settings, n_steps) * (n_steps if interval == "step" else 1)
    key = "model.lr_scheduler.init_args.total_steps"
    if scheduler.total_steps < planned < math.inf:
        raise ConfigError(
            f"{key}: expected {planned:.0f}, the {interval}s of the training; got {scheduler.total_steps}"
        )
    if planned < scheduler.total_steps:
        text = (
            f"{key}: {scheduler.total_steps} {interval}s, but the training ends after {planned:.0f}, within the cycle"
        )
        print(text, file=sys.stderr)
