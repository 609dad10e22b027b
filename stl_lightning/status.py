"""What a branch is doing, as a small file that its owner rewrites: `branches/NN/status.json`."""

import math
import os
import socket
import time
from collections.abc import Sequence
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
    """Keeps the `status.json` of each branch in training up to date, every `HEARTBEAT_S` seconds."""

    def __init__(self, branches: Sequence[tuple[BranchPaths, Status]]) -> None:
        self.branches = branches
        self._last = time.monotonic()

    def beat(self, trainer: Trainer) -> None:
        """Write if it is time to; called after each minibatch."""
        if time.monotonic() - self._last > HEARTBEAT_S:
            self._write(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        for (_, status), loss in zip(self.branches, module.val_scores()["val/loss"].tolist(), strict=True):
            status.loss = loss if math.isfinite(loss) else None
        self.beat(trainer)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self._last = time.monotonic()
        for paths, status in self.branches:
            status.epoch, status.step = trainer.current_epoch, trainer.global_step
            write_status(paths, status)
