"""What was launched, as a list in `RUN/launch.json`: how, with which settings, under which job ids."""

import contextlib
import getpass
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from stl_lightning.attempts import process_started
from stl_lightning.errors import RunError
from stl_lightning.paths import RunPaths, read_json, write_json

ROLES = ("prepare", "branches", "ensemble")  # the jobs of a launch, in the order they run
METHODS = ("array", "srun", "torchrun")
LOCAL = "local"  # the method that takes processes of this machine in place of SLURM
RETRIES = 2
LOCK_S = 10.0  # longer than a few calls of sbatch take


@dataclass(frozen=True)
class Process:
    """A process of this machine. Numbers are used again; the start tells two processes of one number apart."""

    pid: int
    started: int | None  # `attempts.process_started`

    @classmethod
    def of(cls, pid: int) -> "Process":
        return cls(pid, process_started(pid))

    def is_alive(self) -> bool:
        return self.started is not None and process_started(self.pid) == self.started


def _user() -> str:
    """The name of the user, or the number where there is no name: in a container, say."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


@dataclass
class Launch:
    """One `stl launch` or `stl resubmit`. `jobs` are ids by role; `settings` are those given beside the config."""

    method: str
    config: str
    settings: list[str] = field(default_factory=list)
    n_branches: int = 0
    branches: list[int] = field(default_factory=list)
    nodes: int | None = None
    retries: int = RETRIES
    sbatch: list[str] = field(default_factory=list)  # options of the site: partition, account, time
    has_ensemble: bool = True
    prepares: bool = False
    n_workers: int | None = None  # on this machine
    folder: str = field(default_factory=os.getcwd)  # which relative paths start from
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=_user)
    when: float = field(default_factory=time.time)  # seconds since 1970, by the clock of `host`
    jobs: dict[str, str] = field(default_factory=dict)
    launcher: Process | None = None  # on this machine
    workers: list[Process] = field(default_factory=list)  # those that it has started last

    @property
    def is_local(self) -> bool:
        return self.method == LOCAL

    def job_names(self) -> dict[int, str]:
        """What the scheduler calls the job of each branch that this launch trains."""
        if "branches" not in self.jobs:
            return {}
        job = self.jobs["branches"]
        return {branch: f"{job}_{branch}" if self.method == "array" else job for branch in self.branches}

    def described(self) -> str:
        """Who, where, since when."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.when))
        jobs = ", ".join(self.jobs.values())
        return f"launched by {self.user} on {self.host} at {since}" + (f", jobs {jobs}" if jobs else "")


def read_launches(paths: RunPaths) -> list[Launch]:
    """The launches of a run, oldest first; none for a run that was started by hand.

    Raises: RunError if the file is there but unreadable.
    """
    if not paths.launch.exists():
        return []
    content = read_json(paths.launch)
    try:
        return [_launch(row) for row in content]
    except (TypeError, KeyError, AttributeError) as error:
        what = "is not a list of launches of this version"
        raise RunError(f"{paths.launch} {what}: {error}. Delete it; job ids are then unknown") from None


def _launch(row: dict[str, Any]) -> Launch:
    launch = Launch(**row)
    launch.launcher = None if launch.launcher is None else Process(**row["launcher"])
    launch.workers = [Process(**worker) for worker in row["workers"]]
    return launch


def write_launch(paths: RunPaths, launch: Launch) -> None:
    """Add a launch, or write again one that was added before. The caller holds `launching`.

    Raises: RunError if it cannot be written.
    """
    others = [other for other in read_launches(paths) if (other.when, other.host) != (launch.when, launch.host)]
    write_json(paths.launch, [asdict(each) for each in [*others, launch]])


@contextlib.contextmanager
def launching(paths: RunPaths) -> Iterator[None]:
    """Only one launch at a time looks at what runs and submits.

    Raises: RunError if another one does not come to its end, or nothing can be written.
    """
    from filelock import FileLock, Timeout  # `stl status` needs none

    lock = FileLock(paths.folder / ".launch.lock", timeout=LOCK_S)
    try:
        paths.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"{paths.folder}: another `stl launch` or `stl resubmit` is submitting; try again") from None
    except NotImplementedError:
        pass  # a network drive without locks: of two processes that begin a branch, one is refused all the same
    except OSError as error:
        raise RunError(f"cannot write {paths.folder}: {error}. Choose another `run.root`, or free the disk") from error
    try:
        yield
    finally:
        lock.release()
