"""What a branch is doing, as a small file that its owner rewrites: `branches/NN/status.json`. Imports nothing heavy."""

import os
import socket
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from stl_lightning.errors import RunError
from stl_lightning.paths import BranchPaths, read_json, write_json

State = Literal["pending", "running", "finished", "failed", "interrupted"]

HEARTBEAT_S = 10.0  # between two beats of a process that lives
LOST_AFTER_S = 30.0  # without a beat, a process is taken for lost


@dataclass
class Status:
    """State of one branch. After a SIGKILL it still says `running`: `launch.judge` goes by the heartbeat's age."""

    branch: int
    state: State = "pending"
    attempt: int = 0  # numbered from 1; the highest number owns the branch
    epoch: int = 0  # epochs that are complete
    n_epochs: int | None = None  # of the whole training, where the config says it in epochs
    step: int = 0
    epoch_s: float | None = None  # of the last epoch
    loss: float | None = None  # of the last validation
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    job: str | None = None  # the scheduler's number for what trains the branch: 17, or 17_3 for an array task
    n_failures: int = 0  # of this branch in this job, for its own reasons
    started: float = field(default_factory=time.time)  # seconds since 1970, UTC, by the clock of `host`
    heartbeat: float = field(default_factory=time.time)  # the same clock
    error: str | None = None
    log_tail: list[str] = field(default_factory=list)  # the last lines that the failed process printed
    traffic: dict[str, Any] = field(default_factory=dict)  # bytes sent and received while training


def read_status(paths: BranchPaths, branch: int) -> Status:
    """A branch that had finished and whose best weights were deleted is pending: it is to be trained again.

    Raises: RunError if the file is there but unreadable.
    """
    if not paths.status.exists():
        return Status(branch)
    what = "Delete it: the branch goes on from its checkpoint"
    try:
        content = read_json(paths.status)
    except RunError as error:
        raise RunError(f"{error}. {what}") from error
    try:
        status = Status(**content)
    except TypeError as error:
        raise RunError(f"{paths.status} is not a status file of this version. {what}") from error
    if status.state == "finished" and not paths.best.exists():
        status.state = "pending"
    return status


def write_status(paths: BranchPaths, status: Status) -> None:
    """Raises: FencedError if a newer attempt owns the branch; RunError if the file cannot be written."""
    status.heartbeat = time.time()
    write_json(paths.status, asdict(status), paths.desk)


def heartbeat_age_s(paths: BranchPaths, now_s: float) -> float:
    """Seconds since the owner last wrote, by the clock of the file system: hosts whose clocks differ do not matter.

    `now_s` is `paths.file_system_now`, taken once for all branches.
    """
    return max(0.0, now_s - paths.status.stat().st_mtime)
