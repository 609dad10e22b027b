"""Read how a run is doing: its status files, the processes of this host, and SLURM's queue."""

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from stl_lightning.attempts import is_alive
from stl_lightning.errors import RunError
from stl_lightning.launch.judge import BranchReport, EnsembleState, Judged, RunState, judge
from stl_lightning.launch.record import Launch, read_launches
from stl_lightning.launch.slurm import Job, Queue, ask_queue, base
from stl_lightning.paths import RunPaths, file_system_now, read_json
from stl_lightning.ranges import as_ranges
from stl_lightning.run import open_run
from stl_lightning.status import Status, heartbeat_age_s, read_status


def read_run_state(paths: RunPaths) -> RunState:
    """Read every status file, and ask SLURM once if anything is still to come.

    Raises: RunError if `paths` holds no run.
    """
    notes: list[str] = []
    launches = _launches(paths, notes)
    read = [_read_branch(paths, branch) for branch in range(_n_branches(paths, launches))]
    statuses = {report.branch: report.status for report in read if report.status is not None}
    results = _results(paths, statuses)
    is_over = results == "made" and all(status.state == "finished" for status in statuses.values())
    recorded = [job for launch in launches for job in launch.jobs.values()]
    jobs = [*recorded, *(status.job for status in statuses.values() if status.job and status.state != "finished")]
    queue = Queue() if is_over else _ask(jobs, launches)
    if queue.problem:
        notes.append(f"SLURM does not answer: {queue.problem}; branches are judged by their files")
    now_s = _now(paths.folder, notes)
    names = _job_names(launches, statuses)
    retries = {job: launch.retries for launch in launches for job in launch.jobs.values()}
    reports = [_report(paths, report, queue, names.get(report.branch, ()), retries, now_s) for report in read]
    notes += _ended_jobs(paths, reports, queue, names)
    notes += _prepare_jobs(launches, queue) + _held_jobs(queue)
    ensemble = "queued" if _awaits_ensemble(launches, queue) else results
    return RunState(paths, launches, reports, ensemble, queue, notes)


def _launches(paths: RunPaths, notes: list[str]) -> list[Launch]:
    try:
        return read_launches(paths)
    except RunError as error:
        notes.append(str(error))
        return []


def _n_branches(paths: RunPaths, launches: Sequence[Launch]) -> int:
    """What the run says; before its first rank has come, what was launched."""
    if paths.run_json.exists() or not launches:
        settings = open_run(paths).settings
        if not isinstance(settings.get("n_branches"), int):
            raise RunError(f"{paths.run_json} is not a run file: expected a number of branches among its settings")
        return settings["n_branches"]
    return launches[-1].n_branches


def _now(folder: Path, notes: list[str]) -> float:
    """By the clock that stamps the status files, if we may ask it by writing."""
    try:
        return file_system_now(folder)
    except RunError:
        notes.append(f"{folder} cannot be written to: heartbeats are judged by the clock of this host")
        return time.time()


def _ask(jobs: Iterable[str], launches: Sequence[Launch]) -> Queue:
    """SLURM's queue, and in it what was launched on this host without SLURM."""
    queue = ask_queue(job for job in jobs if base(job).isdigit())
    here = {launch.jobs["branches"]: launch for launch in launches if launch.is_local and is_here(launch.host)}
    local: dict[str, Job] = {}
    for job, launch in here.items():
        processes = [launch.launcher, *launch.workers]  # workers outlive a launcher that is killed
        is_running = any(process is not None and process.is_alive() for process in processes)
        local[job] = Job(job, "running" if is_running else "over", start_s=launch.when)
    return replace(queue, jobs={**queue.jobs, **local})


def is_here(host: str) -> bool:
    return host == socket.gethostname()


def _job_names(launches: Sequence[Launch], statuses: Mapping[int, Status]) -> dict[int, list[str]]:
    """The ids of all jobs of each branch: as launched, and as its status says."""
    names: dict[int, list[str]] = {}
    for launch in launches:
        for branch, job in launch.job_names().items():
            names.setdefault(branch, []).append(job)
    for branch, status in statuses.items():
        if status.job is not None and status.job not in names.setdefault(branch, []):
            names[branch].append(status.job)
    return names


def _read_branch(paths: RunPaths, branch: int) -> BranchReport:
    of_branch = paths.branch(branch)
    try:
        status = read_status(of_branch, branch)
    except RunError as error:
        return _unreadable(branch, error)
    return BranchReport(branch, "pending", status)


def _unreadable(branch: int, error: RunError) -> BranchReport:
    cure = "" if "Delete it" in str(error) else ". Delete it: the branch goes on from its checkpoint"
    return BranchReport(branch, "unreadable", problem=f"{error}{cure}")


def _report(
    paths: RunPaths, read: BranchReport, queue: Queue, names: Sequence[str], retries: Mapping[str, int], now_s: float
) -> BranchReport:
    status = read.status
    if status is None:
        return read
    of_branch = paths.branch(read.branch)
    has_begun = status.attempt > 0
    age_s = heartbeat_age_s(of_branch, now_s) if has_begun else None
    try:
        is_gone = status.state == "running" and is_here(status.host) and not is_alive(of_branch, status)
    except RunError as error:  # of the file that says which process owns the branch
        return _unreadable(read.branch, error)
    jobs = [queue.jobs[name] for name in names if name in queue.jobs]
    tries = retries.get(status.job or "", retries.get(base(status.job or ""), 0))
    state = judge(status, age_s or 0.0, is_gone, jobs, tries, time.time())
    active = tuple(job for job in jobs if job.state != "over")
    return replace(read, state=state, age_s=age_s, active=active, problem=_error(status, state, tries))


def _error(status: Status, state: Judged, tries: int) -> str | None:
    """What a branch failed of, also while its job tries it again."""
    if status.state != "failed" or state not in ("failed", "queued"):
        return None
    error = status.error or ""
    # Of a process that could not say what it died of, its last words.
    last_words = f": {status.log_tail[-1]}" if error.startswith("ended with") and status.log_tail else ""
    is_again = state == "queued" and status.n_failures <= tries
    again = f" (try {status.n_failures + 1} of {tries + 1} comes)" if is_again else ""
    return error + last_words + again


def _ended_jobs(
    paths: RunPaths, reports: Sequence[BranchReport], queue: Queue, names: Mapping[int, Sequence[str]]
) -> list[str]:
    """Notes on the last jobs of branches that are still to train: those SLURM has forgotten, those that have ended."""
    if queue.problem:
        return []
    open_states = ("pending", "running")
    waiting = [report.branch for report in reports if report.status and report.status.state in open_states]
    last = {branch: base(names[branch][-1]) for branch in waiting if names.get(branch)}
    known = {base(job) for job in queue.jobs}
    forgotten = sorted({job for job in last.values() if job.isdigit()} - known, key=int)
    notes = [f"SLURM has forgotten job {', '.join(forgotten)}: its branches are judged by their files"] * bool(
        forgotten
    )
    ended = [report.branch for report in reports if report.state == "pending" and last.get(report.branch) in known]
    if ended:
        jobs = ", ".join(sorted({last[branch] for branch in ended}))
        notes.append(f"job {jobs} ended before branches {as_ranges(ended)} began: {paths.logs} says why")
    return notes


def _held_jobs(queue: Queue) -> list[str]:
    """A task waits for who held it or, where a node could not start it, for somebody to look at that node."""
    reasons = sorted({job.held for job in queue.jobs.values() if job.held})
    names = {reason: ",".join(job.id for job in queue.jobs.values() if job.held == reason) for reason in reasons}
    return [f"SLURM holds jobs {jobs} ({reason}): scontrol release {jobs}" for reason, jobs in names.items()]


def _prepare_jobs(launches: Sequence[Launch], queue: Queue) -> list[str]:
    """What the branches wait for."""
    jobs = [launch.jobs["prepare"] for launch in launches if "prepare" in launch.jobs]
    return [f"job {job.id} prepares the store: {job.state}" for name in jobs for job in queue.active(name)]


def _results(paths: RunPaths, statuses: Mapping[int, Status]) -> EnsembleState:
    """Whether the ensemble was made, since the last branch has finished, and of all branches."""
    if not paths.results.exists():
        return "missing"
    finished = [paths.branch(branch).status for branch, status in statuses.items() if status.state == "finished"]
    made = paths.results.stat().st_mtime_ns
    if any(path.stat().st_mtime_ns > made for path in finished):
        return "outdated"
    try:
        return "partial" if read_json(paths.results).get("missing") else "made"
    except RunError:  # damaged, so to be made again
        return "outdated"


def _awaits_ensemble(launches: Sequence[Launch], queue: Queue) -> bool:
    """Whether a job is in the queue that makes the ensemble; on this machine, that is the launcher."""
    jobs = [launch.jobs.get("ensemble", launch.jobs.get("branches")) for launch in launches if launch.has_ensemble]
    return any(job is not None and queue.active(job) for job in jobs)
