"""The run on this machine: by `stl launch --local`, or a `stl fit --retries` for each branch."""

import random
import socket
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

from faulting.processes import Logged, children, end_descendants, send
from faulting.scene import CONFIG, N_BRANCHES, RETRIES, Rank, Scene
from faulting.warm import STL, WarmPopen
from stl_lightning.attempts import is_alive, process_started
from stl_lightning.launch.state import read_run_state

AGAIN_AFTER_S = 1.0


class LocalScene(Scene):
    """What both have in common. `host` is what the ranks take their host for, if not this one."""

    where = "local"

    def __init__(self, folder: Path, rng: random.Random, settings: Sequence[str] = (), host: str | None = None) -> None:
        super().__init__(folder, rng, settings)
        self.host = host
        self.started: list[Logged] = []

    def environ(self) -> dict[str, str]:
        return super().environ() | ({"STL_FAULTS_HOST": self.host} if self.host else {})

    def host_of(self, branch: int) -> str:
        return "*"

    def begin(self, *args: str) -> Logged:
        log = self.folder / f"{len(self.started):03d}-{args[0]}.log"
        self.started.append(Logged(WarmPopen, [*STL, *args], log, self.environ()))
        return self.started[-1]

    def run_stl(self, *args: str) -> tuple[int, str]:
        process = self.begin(*args)
        return process.process.wait(), process.text()

    def rank(self, branch: int) -> Rank | None:
        status = self.status(branch)
        if status.state != "running" or not is_alive(self.branch(branch), status):
            return None
        return _rank(status.pid)

    def lives(self, rank: Rank) -> bool:
        return process_started(rank.pid) == rank.started

    def signal_rank(self, branch: int, number: int) -> bool:
        rank = self.rank(branch)
        return rank is not None and send(rank.pid, number)

    @abstractmethod
    def supervisor(self, branch: int) -> Logged:
        """What watches over the rank of a branch."""

    def supervisor_lives(self, branch: int) -> bool:
        return not self.supervisor(branch).is_over()

    def signal_supervisor(self, branch: int, number: int) -> bool:
        return send(self.supervisor(branch).pid, number)

    def judged(self, branch: int) -> tuple[str, float | None]:
        report = read_run_state(self.paths).branches[branch]
        return report.state, report.age_s

    def fit_args(self, branch: int) -> list[str]:
        return ["fit", f"--retries={RETRIES}", f"--config={CONFIG}", *self.settings, f"--run.branches=[{branch}]"]

    def close(self) -> None:
        end_descendants(self.started)


def _rank(pid: int) -> Rank | None:
    started = process_started(pid)
    return None if started is None else Rank(socket.gethostname(), pid, started)


class FitScene(LocalScene):
    """`stl fit --retries` for each branch; to resubmit is to give the same command again."""

    def start(self) -> None:
        self.fits = {branch: self.begin(*self.fit_args(branch)) for branch in range(N_BRANCHES)}
        self.ended: dict[int, float] = {}

    def rank(self, branch: int) -> Rank | None:
        """Also one that has not written its status yet: the child of the supervisor."""
        found = [rank for child in children(self.fits[branch].pid) if (rank := _rank(child)) is not None]
        return found[0] if found else super().rank(branch)

    def supervisor(self, branch: int) -> Logged:
        return self.fits[branch]

    def go_on(self) -> None:
        for branch, fit in self.fits.items():
            if not fit.is_over() or branch in self.held or self.is_finished(branch):
                self.ended.pop(branch, None)
            elif time.monotonic() - self.ended.setdefault(branch, time.monotonic()) > AGAIN_AFTER_S:
                self.n_resubmitted += 1
                self.ended.pop(branch)
                self.fits[branch] = self.begin(*self.fit_args(branch))


class LaunchScene(LocalScene):
    """`stl launch --local 4`, and `stl resubmit` when it has ended without all branches."""

    has_one_supervisor = True

    def launch_args(self) -> list[str]:
        return ["launch", "--local=4", f"--retries={RETRIES}", "--no-ensemble", f"--config={CONFIG}", *self.settings]

    def start(self) -> None:
        self.launcher = self.begin(*self.launch_args())
        self.over_since = time.monotonic()

    def supervisor(self, branch: int) -> Logged:
        return self.launcher

    def go_on(self) -> None:
        if not self.launcher.is_over() or self.held:
            self.over_since = time.monotonic()
        elif time.monotonic() - self.over_since > AGAIN_AFTER_S:
            self.over_since = time.monotonic()
            if not self.paths.launch.exists():
                self.launcher = self.begin(*self.launch_args())  # it did not come as far as to record itself
            elif read_run_state(self.paths).those("pending", "interrupted", "failed", "lost"):
                self.n_resubmitted += 1
                self.launcher = self.begin("resubmit", str(self.paths.folder))
