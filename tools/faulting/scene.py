"""A run that faults are done to: where its processes are, how far its branches have come, how it is started again."""

import os
import random
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faulting.waiting import UNTIL_S, Until
from stl_lightning.attempts import attempt_numbers
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.errors import STLError
from stl_lightning.paths import BranchPaths, RunPaths
from stl_lightning.status import Status, read_status

HERE = Path(__file__).resolve().parent
RANKS = HERE / "ranks"  # on PYTHONPATH of every rank
CONFIG = HERE / "config.yaml"
N_BRANCHES = 4
RETRIES = 2


@dataclass(frozen=True)
class Progress:
    """How far a branch has come, by its last checkpoint."""

    attempt: int
    epoch: int
    step: int

    def as_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "step": self.step, "attempt": self.attempt}


@dataclass(frozen=True)
class Rank:
    """A process that trains; `started` tells two of one number apart."""

    host: str
    pid: int
    started: int | None = None


class Scene(ABC):
    """A run of its own and everything that was started for it; `close` ends it all."""

    where = ""
    has_one_supervisor = False  # for all branches

    def __init__(self, folder: Path, rng: random.Random, settings: Sequence[str] = ()) -> None:
        self.folder = folder  # of this scene alone
        self.rng = rng
        self.paths = RunPaths(folder / "runs" / "digits")
        self.settings = [f"--run.root={folder / 'runs'}", *settings]
        self.faults = folder / "faults"  # files that the ranks look at
        self.faults.mkdir(parents=True)
        self.n_resubmitted = 0
        self.damaged: set[Path] = set()  # files that were cut and are still in their place
        self.held: set[int] = set()  # branches that are not to be resubmitted yet
        self._progress: dict[int, tuple[int, Progress]] = {}  # of a branch: when its file was written, what it says

    # --- what is to be seen

    def branch(self, branch: int) -> BranchPaths:
        return self.paths.branch(branch)

    def status(self, branch: int) -> Status:
        return read_status(self.branch(branch), branch)

    def is_finished(self, branch: int) -> bool:
        return self.status(branch).state == "finished"

    def finished(self) -> list[int]:
        return [branch for branch in range(N_BRANCHES) if self.is_finished(branch)]

    def attempt(self, branch: int) -> int:
        return max(attempt_numbers(self.branch(branch)), default=0)

    def progress(self, branch: int) -> Progress:
        """By `last.ckpt`, since `status.json` is written every ten seconds only; a damaged file is no progress."""
        file = self.branch(branch).last
        try:
            written = file.stat().st_mtime_ns
            kept = self._progress.get(branch)
            if kept is None or kept[0] != written:
                content = load_checkpoint(file)
                kept = written, Progress(0, content["epoch"], content["global_step"])
                self._progress[branch] = kept
        except (OSError, STLError):
            return Progress(self.attempt(branch), 0, 0)
        return Progress(self.attempt(branch), kept[1].epoch, kept[1].step)

    def is_training(self, branch: int) -> bool:
        """Whether a process trains the branch that lives and has come as far as to a checkpoint."""
        return (
            self.status(branch).state == "running" and self.progress(branch).step > 0 and self.rank(branch) is not None
        )

    def neighbours(self, branch: int) -> list[int]:
        """The branches that train on the same node, this one included."""
        host = self.status(branch).host
        there = (self.status(other) for other in range(N_BRANCHES) if not self.is_finished(other))
        return sorted({branch, *(status.branch for status in there if status.host == host and status.attempt)})

    def end_of(self, rank: Rank, timeout_s: float = UNTIL_S, every_s: float = 0.05) -> Until:
        return Until(lambda: not self.lives(rank), timeout_s, every_s)

    # --- what differs between SLURM and this machine

    @abstractmethod
    def host_of(self, branch: int) -> str:
        """What the rank of a branch calls its host; * for any."""

    @abstractmethod
    def rank(self, branch: int) -> Rank | None:
        """The process that trains a branch, if it lives."""

    @abstractmethod
    def lives(self, rank: Rank) -> bool:
        """Whether it still runs."""

    @abstractmethod
    def signal_rank(self, branch: int, number: int) -> bool:
        """Whether there was one."""

    @abstractmethod
    def signal_supervisor(self, branch: int, number: int) -> bool:
        """To whatever watches over the rank: `stl fit --retries`, or `stl launch --local`."""

    @abstractmethod
    def start(self) -> None:
        """Begin to train all branches."""

    @abstractmethod
    def go_on(self) -> None:
        """Resubmit what does not come right by itself. Called again and again."""

    @abstractmethod
    def judged(self, branch: int) -> tuple[str, float | None]:
        """What `stl status` calls a branch, and the age of its heartbeat."""

    @abstractmethod
    def run_stl(self, *args: str) -> tuple[int, str]:
        """The exit code of a command that ends by itself, and what it prints."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started for it."""

    def environ(self) -> dict[str, str]:
        """The variables of everything that is started for the run."""
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STL_"))}
        path = f"{RANKS}:{HERE.parent.parent}"
        return clean | {"PYTHONPATH": path, "STL_FAULTS": str(self.faults), "OMP_NUM_THREADS": "1"}


def remove(folder: Path) -> None:
    """A folder in which something may still be written."""
    for _ in range(20):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.1)
