"""Branches in training: the job of one branch, groups that train together, Lightning's Trainer for them."""

from stl_lightning.training.groups import Outcome, train_branches
from stl_lightning.training.job import (
    BranchJob,
    check_branch,
    check_branches,
    check_same_config,
    different_settings,
    load_best,
)
from stl_lightning.training.length import check_schedule, planned_steps, steps_an_epoch
from stl_lightning.training.precision import is_emulated, warn_of_emulation
from stl_lightning.training.trainer import check_trainer_settings, make_trainer, predicting_trainer, try_trainer

__all__ = [
    "BranchJob",
    "Outcome",
    "check_branch",
    "check_branches",
    "check_same_config",
    "check_schedule",
    "check_trainer_settings",
    "different_settings",
    "is_emulated",
    "load_best",
    "make_trainer",
    "planned_steps",
    "predicting_trainer",
    "steps_an_epoch",
    "train_branches",
    "try_trainer",
    "warn_of_emulation",
]
