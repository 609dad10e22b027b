"""A small process that starts the training as its child, and starts it again where a branch failed.

A child that is killed, by the kernel for its memory say, cannot record its own end, and under torchrun it would take
its siblings down. The supervisor records the end with the last lines of the log, and outlives it.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from stl_lightning import leaving
from stl_lightning.attempts import begin_attempt, desk_of, owner_started, process_started
from stl_lightning.errors import STLError, say
from stl_lightning.exits import DONE, FAILED, INTERRUPTED
from stl_lightning.paths import BranchPaths, RunPaths
from stl_lightning.ranks import RankInfo, job_id
from stl_lightning.status import Status, read_status, write_status

N_LOG_LINES = 30
PIPE = "STL_SUPERVISOR_FD"  # through which the child says which branches it trains
RETRIES = "STL_RETRIES"
SUPERVISOR = "STL_SUPERVISOR"  # its process number
LAST_LINES_S = 5.0  # for what a child that has ended printed
PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before the first retry; doubled with each


@dataclass
class Ended:
    """How a child ended: its exit code (negative: the signal), what it trained, the last lines it printed."""

    pid: int
    started: int | None  # as `attempts.process_started` says it
    code: int
    branches: list[tuple[BranchPaths, int]] = field(default_factory=list)
    log_tail: list[str] = field(default_factory=list)

    @property
    def has_failed(self) -> bool:
        return self.code < 0 or self.code == FAILED


def supervise(args: Sequence[str], retries: int) -> int:
    """Run `stl fit ARGS` until its branches have finished, or failed once more often than `retries`, each by itself.

    Returns the exit code of the last child; under torchrun, which would end the other ranks, 0 for one that failed.
    """
    if job_id() is None:
        os.environ["STL_JOB"] = f"fit-{os.getpid()}-{int(time.time())}"  # failures are counted by job
    pause_s, n_starts, n_branches = PAUSE_S, 0, 1
    ways: list[str] = []
    while not leaving.asked():
        ended = run_child([sys.executable, "-m", "stl_lightning", "fit", *args, *ways], retries)
        n_starts, n_branches = n_starts + 1, max(n_branches, len(ended.branches))
        if ended.has_failed:
            record_end(ended)
        if ended.code < 0 and leaving.asked():
            break  # it was not able to save any more
        # Starts are counted as well: on a full disk a failure cannot be noted.
        if n_starts > retries * n_branches or not has_retries(ended, retries):
            return _exit_code(ended)
        if ended.code < 0 and len(ended.branches) > 1 and is_last_chance(ended, retries):
            ways = ["--run.stack=false"]  # a branch that has its whole process killed is then the only one to fail
        say(f"stl fit: {how_it_ended(ended.code)}; trying again in {pause_s:.0f} s")
        _pause(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    return INTERRUPTED


def _pause(seconds: float) -> None:
    """Sleep, but not through a signal: `time.sleep` would go on after it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not leaving.asked():
        time.sleep(min(0.1, seconds))


def run_child(command: Sequence[str], retries: int) -> Ended:
    """Run a command that prints through this process, and hand on to it the signals that ask to leave."""
    read_end, write_end = os.pipe()
    child = subprocess.Popen(
        command,
        env=os.environ | {PIPE: str(write_end), RETRIES: str(retries), SUPERVISOR: str(os.getpid())},
        pass_fds=[write_end],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.close(write_end)
    started = process_started(child.pid)
    assert child.stdout is not None, "it was asked for"
    tail: deque[str] = deque(maxlen=N_LOG_LINES)
    printer = threading.Thread(target=_print_through, args=(child.stdout, tail), daemon=True)
    printer.start()

    def hand_on(number: int, frame: object) -> None:
        name = signal.Signals(number).name
        leaving.note(name)
        # A terminal's Ctrl-C reaches the child by itself, and a second one would end it at once.
        others = [other for other in leaving.signals() if other != signal.SIGINT]
        if name != "SIGINT":
            child.send_signal(number)
        elif others:
            child.send_signal(others[-1])

    with leaving.handling(hand_on):
        if leaving.asked():  # between the start of the child and this line
            child.terminate()
        child.wait()
    # What the child started, a tracker's service say, may outlive it and hold its pipes open.
    printer.join(LAST_LINES_S)
    os.set_blocking(read_end, False)
    with os.fdopen(read_end, "rb") as told:
        branches = [branch for line in (told.read() or b"").splitlines() for branch in _branches(line)]
    return Ended(child.pid, started, child.returncode, branches, [*tail])


def _print_through(output: IO[bytes], tail: deque[str]) -> None:
    for line in output:
        with contextlib.suppress(OSError):  # such as a full disk: who stops reading stops the child
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()
        text = line.decode(errors="replace").rstrip().rpartition("\r")[2]  # of a progress bar, its last state
        if text:
            tail.append(text)


def _branches(told: bytes) -> list[tuple[BranchPaths, int]]:
    message = json.loads(told)
    paths = RunPaths(Path(message["run"]))
    return [(paths.branch(branch), branch) for branch in message["branches"]]


def tell_supervisor(paths: RunPaths, branches: Sequence[int]) -> None:
    """Called by the child once it knows what it trains; nothing where there is no supervisor."""
    if PIPE in os.environ:
        message = json.dumps({"run": str(paths.folder.absolute()), "branches": list(branches)})
        os.write(int(os.environ[PIPE]), f"{message}\n".encode())


def is_orphan() -> bool:
    """Whether the supervisor of this process has ended without it."""
    return is_supervised() and os.getppid() != int(os.environ[SUPERVISOR])


def is_supervised() -> bool:
    """Whether this process is the child of a supervisor."""
    return PIPE in os.environ


def is_given_up(paths: BranchPaths, branch: int) -> bool:
    """Whether a branch has failed in this job as often as its supervisor allows."""
    return is_supervised() and _has_failed_too_often(_readable(paths, branch), int(os.environ[RETRIES]))


def record_end(ended: Ended) -> None:
    """Note in `status.json` how a child ended that could not do so itself, and what it printed last."""
    statuses = [(paths, _readable(paths, branch)) for paths, branch in ended.branches]
    own = [(paths, status) for paths, status in statuses if _is_of(ended, paths, status)]
    for paths, status in own:
        with contextlib.suppress(STLError):  # such as a newer attempt elsewhere, whose status it is now
            _note_end(desk_of(paths, status.attempt), status, ended)
    if own:
        return
    for paths, branch in ended.branches:  # killed before it began any, while it read the data say
        with contextlib.suppress(STLError):
            if _readable(paths, branch).state != "finished":
                number, desk = begin_attempt(paths, branch)
                former = _readable(paths, branch)
                n_failures = former.n_failures if former.job == job_id() else 0
                status = replace(former, state="running", attempt=number, job=job_id(), n_failures=n_failures)
                _note_end(desk, status, ended)


def _note_end(paths: BranchPaths, status: Status, ended: Ended) -> None:
    if status.state == "running":
        status.state, status.error = "interrupted" if leaving.asked() else "failed", how_it_ended(ended.code)
        status.n_failures += status.state == "failed"
    status.log_tail = ended.log_tail
    write_status(paths, status)


def _is_of(ended: Ended, paths: BranchPaths, status: Status) -> bool:
    """Whether the child itself wrote this, and not one of the same number on another host or at another time."""
    is_same = status.host == socket.gethostname() and status.pid == ended.pid
    return is_same and status.state in ("running", "failed") and owner_started(paths, status.attempt) == ended.started


def _readable(paths: BranchPaths, branch: int) -> Status:
    """The status of a branch; as of one that was not begun where it cannot be read, which the child will say."""
    try:
        return read_status(paths, branch)
    except STLError:
        return Status(branch)


def has_retries(ended: Ended, retries: int) -> bool:
    """Whether one of the child's branches failed, and not too often; also after a kill before it named any."""
    if leaving.asked() or not ended.has_failed:
        return False
    statuses = [_readable(paths, branch) for paths, branch in ended.branches]
    is_any_left = any(status.state != "finished" and not _has_failed_too_often(status, retries) for status in statuses)
    return is_any_left or (ended.code < 0 and not statuses)


def is_last_chance(ended: Ended, retries: int) -> bool:
    """Whether one of the child's branches is given up if it fails once more."""
    return any(_readable(paths, branch).n_failures == retries for paths, branch in ended.branches)


def _has_failed_too_often(status: Status, retries: int) -> bool:
    return status.state == "failed" and status.job == job_id() and status.n_failures > retries


def how_it_ended(code: int) -> str:
    """In words, from the exit code of a process (negative: the signal)."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}" + (" (the machine's memory was exhausted?)" if name == "SIGKILL" else "")
    return f"ended with exit code {code}"


def _exit_code(ended: Ended) -> int:
    if not ended.has_failed:
        return ended.code
    return DONE if RankInfo.detect().launcher == "torchrun" else FAILED
