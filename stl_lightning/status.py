"""What a branch is doing, as a small file that its owner rewrites: `branches/NN/status.json`."""

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer

from stl_lightning.errors import RunError
from stl_lightning.paths import BranchPaths, read_json, write_json

State = Literal["pending", "running", "finished", "failed", "interrupted"]

HEARTBEAT_S = 10.0


@dataclass
class Status:
    """State of one branch. After a SIGKILL it still says `running`: judge that state by the age of the heartbeat."""

    branch: int
    state: State = "pending"
    attempt: int = 0
    epoch: int = 0
    step: int = 0
    loss: float | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: float = field(default_factory=time.time)  # seconds since 1970, UTC
    heartbeat: float = field(default_factory=time.time)  # the same clock
    error: str | None = None


def read_status(paths: BranchPaths, branch: int) -> Status:
    """Raises: RunError if the file is there but unreadable."""
    if not paths.status.exists():
        return Status(branch)
    try:
        return Status(**read_json(paths.status))
    except TypeError as error:
        raise RunError(f"{paths.status} is not a status file of this version: {error}. Delete it to go on") from error


def write_status(paths: BranchPaths, status: Status) -> None:
    status.heartbeat = time.time()
    write_json(paths.status, asdict(status))


class StatusWriter(Callback):
    """Keeps `status.json` of the branch in training up to date, every epoch and every `HEARTBEAT_S` seconds."""

    def __init__(self, paths: BranchPaths, status: Status) -> None:
        self.paths = paths
        self.status = status

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if time.time() - self.status.heartbeat > HEARTBEAT_S:
            self._write(trainer)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self.status.epoch, self.status.step = trainer.current_epoch, trainer.global_step
        loss = trainer.callback_metrics.get("val/loss")
        self.status.loss = float(loss) if loss is not None and loss.isfinite() else None
        write_status(self.paths, self.status)
