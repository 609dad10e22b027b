"""What is thought of a branch and of a run: pure functions of what was read about them."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from stl_lightning.exits import DONE, FAILED, UNFINISHED
from stl_lightning.launch.record import Launch
from stl_lightning.launch.slurm import Job, Queue
from stl_lightning.paths import RunPaths
from stl_lightning.status import LOST_AFTER_S, Status

Judged = Literal["pending", "queued", "running", "lost", "interrupted", "failed", "finished", "unreadable"]
EnsembleState = Literal["made", "partial", "outdated", "queued", "missing"]
JUDGED = get_args(Judged)
BAD: tuple[Judged, ...] = ("lost", "failed", "unreadable")
IN_WORK: tuple[Judged, ...] = ("queued", "running")


@dataclass(frozen=True)
class BranchReport:
    """One branch: what its file says, and what is thought of it. `active` are its jobs in the queue."""

    branch: int
    state: Judged
    status: Status | None = None  # None where it cannot be read
    age_s: float | None = None  # of the last heartbeat
    active: tuple[Job, ...] = ()
    problem: str | None = None

    @property
    def job(self) -> str | None:
        """The job that trains the branch or will, or else the last one that did."""
        waits = self.state == "queued" and self.active
        return self.active[-1].id if waits else self.status.job if self.status else None

    @property
    def left_s(self) -> float | None:
        """Seconds until the last epoch, as long as the one before took."""
        status = self.status
        if self.state != "running" or status is None or status.n_epochs is None or status.epoch_s is None:
            return None
        return max(0, status.n_epochs - status.epoch) * status.epoch_s

    @property
    def job_left_s(self) -> float | None:
        """Seconds until SLURM ends the job."""
        ends = [job.end_s for job in self.active if job.state == "running" and job.end_s]
        return max(0.0, max(ends) - time.time()) if ends else None


@dataclass(frozen=True)
class RunState:
    """All branches of a run, its launches, and what could not be found out."""

    paths: RunPaths
    launches: Sequence[Launch]
    branches: Sequence[BranchReport]
    ensemble: EnsembleState
    queue: Queue
    notes: Sequence[str] = field(default_factory=list)

    def those(self, *states: Judged) -> list[BranchReport]:
        return [report for report in self.branches if report.state in states]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(report.state for report in self.branches)
        return {state: found[state] for state in JUDGED if found[state]}

    @property
    def wants_ensemble(self) -> bool:
        return bool(self.launches) and self.launches[-1].has_ensemble

    @property
    def lacks_ensemble(self) -> bool:
        """Whether there is none of all branches that have finished, and none is about to be made."""
        return self.ensemble in ("missing", "partial", "outdated")

    @property
    def is_in_work(self) -> bool:
        return bool(self.those(*IN_WORK)) or self.ensemble == "queued"

    @property
    def exit_code(self) -> int:
        """Complete, still to go, or something that does not come right by itself."""
        if self.those(*BAD):
            return FAILED
        if len(self.those("finished")) < len(self.branches) or self.ensemble == "queued":
            return UNFINISHED
        if self.wants_ensemble and self.ensemble != "made":
            return UNFINISHED if self.queue.problem else FAILED
        return DONE


def judge(status: Status, age_s: float, is_gone: bool, jobs: Sequence[Job], retries: int, now_s: float) -> Judged:
    """What a branch is doing.

    `age_s` is the age of its heartbeat by the clock of the file system, `now_s` the time by SLURM's (its hosts
    agree, since munge refuses those that do not): only durations are compared. `is_gone` whether its process was of
    this host and has ended, `jobs` what the scheduler says of its jobs, `retries` how often its job tries it again.
    A job that is not in `jobs` is one that the scheduler has forgotten, or that was never its own; then the file
    alone tells.
    """
    if status.state == "finished":
        return "finished"
    active = [job for job in jobs if job.state != "over"]
    own = next((job for job in jobs if job.id == status.job), None)
    if status.state == "running":
        if age_s <= LOST_AFTER_S and not is_gone and (own is None or own.state == "running"):
            return "running"
        if any(job.state == "waiting" or _began_within(job, age_s, now_s) for job in active):
            return "queued"
        return "lost"
    if any(job.state == "waiting" or job.id != status.job for job in active):
        return "queued"
    if active and not (status.state == "failed" and status.n_failures > retries):
        return "queued"  # its job is about to try it again
    return status.state


def _began_within(job: Job, age_s: float, now_s: float) -> bool:
    """A job that was requeued, or a new one, that has not come to the branch yet."""
    return job.start_s is not None and now_s - job.start_s < age_s
