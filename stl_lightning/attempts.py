"""Attempts at a branch are numbered, and the newest owns it: the fence against a process on a node that was given up.

`branches/NN/attempts/0003/` is the desk of attempt 3, through which it writes (`BranchPaths.write`). Who makes the
folder has the number, since only one of several can. A newer attempt renames the older desks to `0003.ended` and
empties them before it reads a checkpoint. No clock and no lock takes part, so it holds on network drives too.
"""

import os
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from stl_lightning.errors import RunError
from stl_lightning.paths import BranchPaths, read_json, write_json
from stl_lightning.ranks import job_id, was_requeued
from stl_lightning.status import HEARTBEAT_S, LOST_AFTER_S, Status, read_status

ENDED = ".ended"
OWNER = "owner.json"


def begin_attempt(paths: BranchPaths, branch: int) -> tuple[int, BranchPaths]:
    """Take the next number and its desk; returns the number, and the paths to write through.

    Raises: RunError if the branch is in training elsewhere (who, where, since when), or nothing can be written.
    """
    refuse_if_owned(paths, branch)
    number = 1 + max(attempt_numbers(paths), default=0)
    desk = paths.attempts / f"{number:04d}"
    try:
        paths.attempts.mkdir(parents=True, exist_ok=True)
        desk.mkdir()
    except FileExistsError:
        raise RunError(f"branch {branch} was begun by another process a moment ago: {_owner(desk)}") from None
    except OSError as error:
        raise RunError(f"cannot write {desk}: {error}. Choose another `run.root`, or free the disk") from error
    write_json(desk / OWNER, own_identity(), desk)
    for old in sorted(paths.attempts.iterdir()):
        if old.suffix != ENDED and old.name < desk.name:
            _retire(old)
    return number, replace(paths, desk=desk)


def desk_of(paths: BranchPaths, number: int) -> BranchPaths:
    """The paths through which an attempt writes, for who ends it on its behalf."""
    return replace(paths, desk=paths.attempts / f"{number:04d}")


def own_identity() -> dict[str, Any]:
    host, pid = socket.gethostname(), os.getpid()
    return {"host": host, "pid": pid, "pid_started": process_started(pid), "job": job_id(), "started": time.time()}


def attempt_numbers(paths: BranchPaths) -> list[int]:
    if not paths.attempts.exists():
        return []
    stems = (entry.name.removesuffix(ENDED) for entry in paths.attempts.iterdir())
    return sorted(int(stem) for stem in stems if stem.isdigit())


def refuse_if_owned(paths: BranchPaths, branch: int) -> None:
    """Raises: RunError if a process that lives trains this branch.

    On this host, the process itself tells. On another, a beat of its heart, which is waited for; if none comes within
    `LOST_AFTER_S`, the branch is taken over. A job that the scheduler has requeued need not wait.
    """
    status = read_status(paths, branch)
    if status.state != "running" or (status.pid == os.getpid() and status.host == socket.gethostname()):
        return
    if status.host == socket.gethostname():
        lives = is_alive(paths, status)
    else:
        is_mine = status.job is not None and status.job == job_id() and was_requeued()
        lives = not is_mine and _beats(paths)
    if lives:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
        job = f", job {status.job}" if status.job else ""
        raise RunError(
            f"branch {branch} in {paths.folder} is in training by process {status.pid} on {status.host}{job} "
            f"since {since}; wait for it, or end it first"
        )


def is_alive(paths: BranchPaths, status: Status) -> bool:
    """Whether the process of this host that wrote a status lives, and is not another one of the same number."""
    started = process_started(status.pid)
    if started is None:
        return False
    owner = paths.attempts / f"{status.attempt:04d}" / OWNER
    return not owner.exists() or read_json(owner).get("pid_started") in (None, started)


def process_started(pid: int) -> int | None:
    """When a process of this host began (clock ticks since boot); None if there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if after_name[0] == "Z" else int(after_name[19])  # a zombie has ended


def _beats(paths: BranchPaths) -> bool:
    """Whether `status.json` is written again within the time after which its owner counts as lost."""
    seen = paths.status.stat().st_mtime_ns
    deadline = time.monotonic() + LOST_AFTER_S
    print(f"{paths.folder}: waiting up to {LOST_AFTER_S:.0f} s for a sign of life of its last owner", flush=True)
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 10)
        if paths.status.stat().st_mtime_ns != seen:
            return True
    return False


def _owner(desk: Path) -> str:
    if not (desk / OWNER).exists():
        return f"see {desk}"
    owner = read_json(desk / OWNER)
    return f"process {owner['pid']} on {owner['host']}"


def _retire(desk: Path) -> None:
    """End an attempt. The rename is the fence; where a client of a network drive caches it, emptying the folder is."""
    ended = desk.with_name(desk.name + ENDED)
    try:
        desk.rename(ended)
        for entry in ended.iterdir():
            if entry.name != OWNER:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    except FileNotFoundError:
        pass  # another process retired it
    except OSError as error:
        raise RunError(f"cannot take over from the attempt in {desk}: {error}") from error
