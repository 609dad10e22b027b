"""Where the metrics of a branch go: a CSV file always; TensorBoard and Weights & Biases when asked for."""

import csv
import io
import netrc
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from stl_lightning.errors import ConfigError
from stl_lightning.paths import BranchPaths
from stl_lightning.run import Run


@dataclass
class TrackingOptions:
    """Loggers beside `metrics.csv`.

    Args:
        wandb: Log each branch as a Weights & Biases run; runs of one name form a group.
        wandb_project: Project of those runs.
        wandb_mode: online, offline, or auto: offline unless an API key is found; WANDB_MODE overrides auto.
        tensorboard: Write TensorBoard event files into each branch's folder.
    """

    wandb: bool = False
    wandb_project: str = "stl_lightning"
    wandb_mode: Literal["auto", "online", "offline"] = "auto"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for option in ("wandb", "tensorboard"):
            if getattr(self, option) and find_spec(option) is None:
                raise ConfigError(
                    f"tracking.{option}=true needs the package {option}, which is not installed: "
                    f"pip install {option}, or set tracking.{option}=false"
                )


class MetricsCSV(Logger):
    """One row an epoch, written by `save`. A run that resumes drops the rows from its first epoch on."""

    COLUMNS = ("epoch", "step", "train/loss", "train/acc", "val/loss", "val/acc", "lr", "epoch_s")

    def __init__(self, paths: BranchPaths) -> None:
        super().__init__()
        self.paths = paths
        self._rows = _read_rows(paths.metrics)
        self._since = time.perf_counter()

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the settings are in config.yaml."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Write the row of an epoch; what callbacks of the user log besides has no column."""
        if "train/loss" not in metrics:
            return
        now = time.perf_counter()
        row: dict[str, Any] = {key: value for key, value in metrics.items() if key in self.COLUMNS}
        row |= {"step": step, "epoch_s": round(now - self._since, 4)}
        self._rows = [old for old in self._rows if int(old["epoch"]) < row["epoch"]] + [row]
        self._since = now

    def save(self) -> None:
        if self._rows:
            self.paths.write(self.paths.metrics, lambda file: file.write(self._text().encode()))

    def _text(self) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        return text.getvalue()


class EpochLogits:
    """The logits of some validation images after every epoch: how the branch, and with others the ensemble, learned.

    A row (n k) an epoch, kept in memory and written by `save`; NaN for an epoch without validation. A run that resumes
    drops the rows from its first epoch on, and those of another number of images; it begins anew if the file, which
    only pictures need, is damaged.
    """

    def __init__(self, paths: BranchPaths) -> None:
        self.paths = paths
        former = read_epoch_logits(paths)
        self._rows = {} if former is None else dict(enumerate(np.array(former)))
        self._is_saved = True

    def note(self, epoch: int, logits: Tensor) -> None:
        row = logits.cpu().numpy()
        kept = {old: of for old, of in self._rows.items() if old < epoch and of.shape == row.shape}
        self._rows, self._is_saved = kept | {epoch: row}, False

    def save(self) -> None:
        if not self._is_saved:
            self.paths.write(self.paths.epoch_logits, lambda file: np.save(file, self._array()))
            self._is_saved = True

    def _array(self) -> np.ndarray:
        """Shapes: (epochs, n, k)."""
        last = max(self._rows)
        missing = np.full_like(self._rows[last], np.nan)
        return np.stack([self._rows.get(epoch, missing) for epoch in range(last + 1)])


class EpochLogger(Callback):
    """Sends the means of an epoch to the loggers of each branch, and its logits. Nothing is logged a step."""

    def __init__(self, branches: Sequence[Sequence[Logger]], logits: Sequence[EpochLogits] = ()) -> None:
        self.branches = branches
        self.logits = logits
        self._validated_at = -1

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._validated_at = trainer.current_epoch

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        is_validated = self._validated_at == trainer.current_epoch
        scores = module.train_scores() | (module.val_scores() if is_validated else {})
        shared = {"lr": module.lr, "epoch": trainer.current_epoch}
        for i, loggers in enumerate(self.branches):
            row = {name: float(values[i]) for name, values in scores.items()} | shared
            for logger in loggers:
                logger.log_metrics(row, trainer.global_step)
        if is_validated and self.logits:
            for history, logits in zip(self.logits, module.kept_logits(), strict=True):
                history.note(trainer.current_epoch, logits)

    def save(self) -> None:
        """Write what is kept in memory, before the checkpoint after which a killed run goes on."""
        for loggers in self.branches:
            for logger in loggers:
                logger.save()
        for history in self.logits:
            history.save()


def read_epoch_logits(paths: BranchPaths) -> np.ndarray | None:
    """The logits (e n k), mapped and not read, since those of many epochs take much memory.

    None where there are none, or the file is damaged, which is said.
    """
    if not paths.epoch_logits.exists():
        return None
    try:
        logits = np.load(paths.epoch_logits, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        print(f"{paths.epoch_logits} is left out of the pictures: {error}", file=sys.stderr, flush=True)
        return None
    return logits if logits.size else None


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def branch_loggers(
    options: TrackingOptions, paths: BranchPaths, run_name: str, run_id: str, branch: int, job_type: str
) -> list[Logger]:
    """The loggers of one branch. Their ids come from the run, so a branch that resumes continues its own curves."""
    loggers: list[Logger] = [MetricsCSV(paths)]
    if options.tensorboard:
        loggers.append(TensorBoardLogger(paths.folder, name="", version="tensorboard"))
    if options.wandb:
        name = f"b{branch:02d}" if job_type == "branch" else job_type
        loggers.append(wandb_logger(options, paths.folder, run_name, run_id, name, job_type))
    return loggers


def close(loggers: Sequence[Logger]) -> None:
    """End the W&B runs among these loggers."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def wandb_logger(
    options: TrackingOptions, folder: Path, run_name: str, run_id: str, name: str, job_type: str
) -> WandbLogger:
    """A W&B run inside the group of the run: `job_type` is branch, ensemble or baseline."""
    return WandbLogger(
        project=options.wandb_project,
        name=f"{run_name}-{name}",
        group=run_name,
        job_type=job_type,
        id=f"{run_id}-{name}",
        resume="allow",
        save_dir=folder,
        offline=_wandb_is_offline(options),
        reinit="create_new",  # branches that train together each have a run of their own
    )


def log_ensemble(options: TrackingOptions, run: Run, run_name: str, results: dict[str, Any]) -> None:
    """One more W&B run, of job type `ensemble`, with the numbers of `results.json`; nothing if W&B is off."""
    if not options.wandb:
        return
    logger = wandb_logger(options, run.paths.results.parent, run_name, run.id, "ensemble", "ensemble")
    numbers = {f"test/{name}": value for name, value in results["ensemble"].items()}
    logger.log_metrics(numbers | {"test/mean": results["mean"], "test/highest": results["highest"]})
    logger.experiment.config.update({key: results[key] for key in ("weighting", "space", "temperature", "members")})
    close([logger])


def _wandb_is_offline(options: TrackingOptions) -> bool:
    if options.wandb_mode != "auto":
        return options.wandb_mode == "offline"
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] == "offline"
    return "WANDB_API_KEY" not in os.environ and not _netrc_knows_wandb()


def _netrc_knows_wandb() -> bool:
    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
