"""Carry out a launch, or show it: sbatch by sbatch, each id recorded as soon as it is known; or on this machine."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from stl_lightning.errors import RunError
from stl_lightning.launch import local
from stl_lightning.launch.compose import Submission, as_shell, compose, find_templates
from stl_lightning.launch.local import STL, first_groups, worker_args
from stl_lightning.launch.record import Launch, Process, write_launch
from stl_lightning.launch.slurm import submit
from stl_lightning.paths import RunPaths


def as_commands(launch: Launch, paths: RunPaths, still_queued: Sequence[str] = ()) -> str:
    """What `--dry-run` prints: the commands of a launch, as one would type them."""
    if not launch.is_local:
        commands = _composed(launch, paths, still_queued)
        return as_shell(commands, launch.folder, paths, os.getcwd())
    assert launch.n_workers is not None, "a launch on this machine has workers"
    config = [f"--config={launch.config}", *launch.settings]
    groups = first_groups(launch.branches, launch.n_workers)
    lines = [["prepare", *config]] if launch.prepares else []
    lines += [worker_args(config, group) for group in groups]
    lines += [["ensemble", str(paths.folder)]] if launch.has_ensemble else []
    return "\n".join(shlex.join([*STL, *line]) for line in lines)


def queue_up(launch: Launch, paths: RunPaths, still_queued: Sequence[str] = ()) -> None:
    """Submit the jobs of a launch to SLURM and record them in the run.

    Raises: RunError with what SLURM says, and what is in the queue by then.
    """
    commands = _composed(launch, paths, still_queued)
    (Path(launch.folder) / paths.logs).mkdir(parents=True, exist_ok=True)
    for command in commands:
        try:
            launch.jobs[command.role] = submit(command, launch.jobs, launch.folder)
        except RunError as error:
            queued = ", ".join(launch.jobs.values())
            left = f". Jobs {queued} are in the queue: `stl cancel {paths.folder}` ends them" if queued else ""
            raise RunError(f"{error}{left}") from None
        write_launch(paths, launch)


def _composed(launch: Launch, paths: RunPaths, still_queued: Sequence[str]) -> list[Submission]:
    return compose(launch, paths, find_templates(Path(launch.folder)), still_queued, this_stl(os.environ))


def this_stl(environ: Mapping[str, str]) -> dict[str, str]:
    """What tells the templates to call this installation, unless `stl` on PATH is it or the user says another."""
    here = shutil.which("stl", path=str(Path(sys.executable).parent))
    is_found = here is not None and shutil.which("stl", path=environ.get("PATH")) == here
    torchrun = shlex.join([sys.executable, "-m", "torch.distributed.run"])
    return {} if is_found or "STL" in environ else {"STL": shlex.join(STL), "TORCHRUN": torchrun}


def begin_here(launch: Launch, paths: RunPaths) -> None:
    """Record that this process is the launcher of a run, which `become_launcher` makes of it."""
    launch.jobs = {"branches": f"local-{os.getpid()}-{int(launch.when)}"}
    launch.launcher = Process.of(os.getpid())
    write_launch(paths, launch)


def become_launcher(paths: RunPaths) -> NoReturn:
    """Replace this process, which has checked the config and imported a gigabyte for that, by one that waits.

    It keeps its number and its start, by which it is recorded.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", local.__name__, str(paths.folder)])
