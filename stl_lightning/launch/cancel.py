"""End what works on a run: jobs in SLURM's queue, processes of this machine."""

import os
import signal

from stl_lightning.errors import RunError
from stl_lightning.launch.record import Launch, Process, read_launches
from stl_lightning.launch.slurm import ask_queue, base, cancel_jobs
from stl_lightning.launch.state import is_here
from stl_lightning.paths import RunPaths
from stl_lightning.run import open_run


def cancel_run(paths: RunPaths) -> list[str]:
    """End the jobs and processes of all launches of a run that have not ended; returns a line on each.

    Raises: RunError if `paths` holds no run, or SLURM or another host would have to be asked and cannot.
    """
    launches = read_launches(paths)
    if not launches:
        open_run(paths)
        raise RunError(
            f"{paths.folder} was not started by `stl launch` (there is no {paths.launch.name}); cancel its jobs by the "
            "ids that `stl status` shows"
        )
    ended = _cancel_slurm(launches)
    for launch in launches:
        if launch.is_local:
            ended += _end_processes(launch)
    return ended


def _cancel_slurm(launches: list[Launch]) -> list[str]:
    recorded = {job: role for launch in launches if not launch.is_local for role, job in launch.jobs.items()}
    queue = ask_queue(recorded)
    if queue.problem:
        raise RunError(f"cannot find out which jobs are in the queue: {queue.problem}")
    active = [job for job in recorded if queue.active(base(job))]
    if active:
        cancel_jobs(active)
    return [f"cancelled job {job} ({recorded[job]})" for job in active]


def _end_processes(launch: Launch) -> list[str]:
    """The launcher hands the signal on to its workers; workers that have outlived it are signalled themselves."""
    if not is_here(launch.host):
        return [f"not ended: {launch.described()}; call `stl cancel` there"]
    processes = [launch.launcher, *launch.workers]
    alive = [process for process in processes if process is not None and process.is_alive()]
    asked = alive[:1] if launch.launcher in alive else alive
    for process in asked:
        os.kill(process.pid, signal.SIGTERM)
    return [f"asked process {process.pid} to save and leave ({_what(process, launch)})" for process in asked]


def _what(process: Process, launch: Launch) -> str:
    return "launcher" if process == launch.launcher else "worker"
