"""Settings of a training that are refused or checked, and schedules as long as the training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar
from test_training import make_job, noisy_mlp, train_branch

from stl_lightning.errors import ConfigError
from stl_lightning.module import BranchModule
from stl_lightning.status import read_status
from stl_lightning.training import (
    check_schedule,
    check_trainer_settings,
    make_trainer,
)


def test_trainer_settings_of_ours_are_refused(tmp_path: Path) -> None:
    for key, value in {"strategy": "ddp", "devices": 2, "num_nodes": 4, "logger": False}.items():
        with pytest.raises(ConfigError, match=f"trainer.{key}"):
            make_trainer([make_job(tmp_path, trainer={key: value})])
    with pytest.raises(ConfigError, match=r"trainer\.max_epochs"):
        make_trainer([make_job(tmp_path, trainer={"max_epochs": None})])


def test_an_optimiser_that_wants_a_closure_is_refused() -> None:
    module = BranchModule(noisy_mlp, torch.optim.LBFGS).build((1, 4, 4), 10, 0, [0])
    with pytest.raises(ConfigError, match=r"model\.optimizer: LBFGS"):
        module.configure_optimizers()


def test_a_plateau_schedule_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    job.module.scheduler_factory = torch.optim.lr_scheduler.ReduceLROnPlateau
    assert train_branch(job) == "failed"
    assert "ReduceLROnPlateau" in read_status(job.paths, 0).error


def test_a_callback_that_is_no_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.callbacks: expected a list"):
        check_trainer_settings({"max_epochs": 1, "callbacks": RichProgressBar()})


# Settings, the unit of the schedule, and how many of them the training has (None: it is not judged).
LENGTHS = [
    ({"max_epochs": 3}, "step", 3 * 12),
    ({"max_epochs": 3}, "epoch", 3),
    ({"max_epochs": 3, "accumulate_grad_batches": 5}, "step", 3 * 3),
    ({"max_epochs": 3, "max_steps": 29}, "step", 29),
    ({"max_epochs": -1, "max_steps": 25}, "epoch", 3),
    ({"max_epochs": None, "max_steps": 29}, "step", 29),
    ({"max_epochs": -1}, "step", None),
    ({"max_epochs": 3, "limit_train_batches": 10}, "step", None),
    ({"max_epochs": 3, "limit_train_batches": 1}, "step", None),
    ({"max_epochs": 3, "limit_train_batches": 1.0}, "step", 3 * 12),
]


@pytest.mark.parametrize(("settings", "interval", "expected"), LENGTHS)
def test_a_schedule_is_as_long_as_the_training(
    settings: dict[str, Any], interval: str, expected: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    def check(total: int) -> str:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=total)
        check_schedule(scheduler, interval, settings, n_images=12 * 16 - 3, batch_size=16)
        return capsys.readouterr().err

    if expected is None:
        assert check(2) == ""
        return
    assert check(expected) == ""
    assert f"ends after {expected}," in check(expected + 1)
    with pytest.raises(
        ConfigError, match=f"expected {expected}, so many {interval}s has the training; got {expected - 1}"
    ):
        check(expected - 1)


@pytest.mark.parametrize(
    "setting",
    [{"gradient_clip_val": -1.0}, {"gradient_clip_algorithm": "banana"}, {"accumulate_grad_batches": -2}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_a_step_are_checked(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"trainer\.{next(iter(setting))}"):
        make_trainer([make_job(tmp_path, trainer=setting)])
