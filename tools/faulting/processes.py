"""Processes of this machine that were started here, and those that they leave behind."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stl_lightning.attempts import process_started

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class Logged:
    """A process that prints into a file."""

    def __init__(self, popen: Any, args: Sequence[str], log: Path, environ: Mapping[str, str]) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = popen(args, env=dict(environ), stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_over(self) -> bool:
        return self.process.poll() is not None

    def text(self) -> str:
        return self.log.read_text(errors="replace")


def adopt_orphans() -> None:
    """Be the parent of every process below this one that loses its own, so that none gets away."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def children(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except OSError:
        return []


def end_descendants(started: Sequence[Logged]) -> None:
    """Kill everything below this process, by number, and bury it."""
    while found := _below(os.getpid()):
        for pid in found:
            send(pid, signal.SIGKILL)
        for process in started:
            process.is_over()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _below(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *_below(child))]


def send(pid: int, number: int) -> bool:
    """Signal a process; whether it lived."""
    if process_started(pid) is None:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
