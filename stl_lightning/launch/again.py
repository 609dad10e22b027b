"""What may be launched, given how a run is doing: which branches again, and when nothing at all."""

import time

from stl_lightning.errors import RunError
from stl_lightning.launch.judge import BranchReport, RunState
from stl_lightning.launch.slurm import base
from stl_lightning.launch.state import is_here


def to_resubmit(state: RunState) -> list[int]:
    """The branches that have not finished and that nothing in the queue or on this machine will train.

    Raises: RunError if the status of one cannot be read: `stl fit` would not begin it.
    """
    problems = [report.problem or "" for report in state.those("unreadable")]
    if problems:
        raise RunError("; ".join(problems))
    return [report.branch for report in _stopped(state) if not _has_own_task(report)]


def held_back(state: RunState) -> list[BranchReport]:
    """The branches that look lost while SLURM still counts their array task as running; it may end or requeue it."""
    return [report for report in _stopped(state) if _has_own_task(report)]


def _stopped(state: RunState) -> list[BranchReport]:
    return state.those("pending", "interrupted", "failed", "lost")


def _has_own_task(report: BranchReport) -> bool:
    return any(job.id != base(job.id) for job in report.active)


def refuse_if_at_work(state: RunState) -> None:
    """Raises: RunError if branches of the run are running or queued: who, where, since when."""
    at_work = state.those("running", "queued")
    if not at_work:
        return
    jobs = {base(job.id) for report in at_work for job in report.active}
    launches = [launch.described() for launch in state.launches if jobs & set(launch.jobs.values())]
    running = [_who(report) for report in at_work if report.state == "running"]
    raise RunError(
        f"{state.paths.folder} is at work already: {len(at_work)} of {len(state.branches)} branches run or are queued "
        f"({'; '.join([*launches, *running[:3]])}). Wait for them, or end them with `stl cancel {state.paths.folder}`"
    )


def _who(report: BranchReport) -> str:
    status = report.status
    assert status is not None, "a running branch has a status"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
    return f"branch {report.branch} in process {status.pid} on {status.host} since {since}"


def refuse_if_unknown(state: RunState) -> None:
    """Raises: RunError if SLURM does not say which branches are queued: they would be launched twice."""
    if state.queue.problem:
        raise RunError(
            f"cannot find out what of {state.paths.folder} is in the queue: {state.queue.problem}. Try again"
        )


def refuse_if_launcher_lives(state: RunState) -> None:
    """Raises: RunError if `stl launch --local` is at work on the run: it tries branches again by itself."""
    for launch in state.launches:
        if launch.launcher is not None and is_here(launch.host) and launch.launcher.is_alive():
            cure = f"Wait for it, or end it with `stl cancel {state.paths.folder}`"
            raise RunError(f"{state.paths.folder} is at work already ({launch.described()}). {cure}")


def still_queued(state: RunState) -> list[str]:
    """The SLURM jobs of branches that are at work, which the next ensemble has to wait for."""
    jobs = {base(job.id) for report in state.those("running", "queued") for job in report.active}
    return sorted((job for job in jobs if job.isdigit()), key=int)


def too_short(limit_s: float | None, state: RunState) -> str | None:
    """A warning if SLURM would end a job before one epoch is over, by the epochs that were measured."""
    measured = [report.status.epoch_s for report in state.branches if report.status and report.status.epoch_s]
    if limit_s is None or not measured or max(measured) <= limit_s:
        return None
    return (
        f"the time limit of a job is {limit_s:.0f} s, and an epoch took {max(measured):.0f} s: it goes on only from "
        "checkpoints within an epoch (run.checkpoint_every_n_steps, or leaving on the signal before the limit). "
        'Set a longer one: --sbatch "--time=..."'
    )
