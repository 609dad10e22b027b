"""Attempts at a branch are numbered, and the newest owns it: the fence against a process on a node that was given up.

`branches/NN/attempts/0003/` is the desk of attempt 3, through which it writes (`BranchPaths.write`). Who makes the
folder has the number, since only one of several can, and keeps it if no higher one is there by then. A newer attempt
removes the older desks before it reads a checkpoint: renames them, so that nothing is found at the path, then empties
and deletes them, so that nothing can be made or renamed there by who holds the folder open. No clock and no lock takes
part, so it holds on network drives too.
"""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stl_lightning import leaving
from stl_lightning.errors import LeaveError, RunError
from stl_lightning.paths import BranchPaths, read_json, write_json
from stl_lightning.ranks import job_id, was_requeued
from stl_lightning.status import HEARTBEAT_S, LOST_AFTER_S, Status, read_status

ENDED = ".ended"
N_TRIES = 100
OWNER = "owner.json"


def begin_attempt(paths: BranchPaths, branch: int, lost: int | None = None) -> tuple[int, BranchPaths]:
    """Take the next number and its desk; returns the number, and the paths to write through.

    `lost` is the number of an attempt that `refuse_owned` has found lost, and is not waited for again.
    Raises: RunError if the branch is in training elsewhere (who, where, since when), or nothing can be written.
    """
    if lost is None or read_status(paths, branch).attempt != lost:
        refuse_owned([(paths, branch)])
    number = 1 + max(attempt_numbers(paths), default=0)
    desk = paths.attempts / f"{number:04d}"
    try:
        paths.attempts.mkdir(parents=True, exist_ok=True)
        desk.mkdir()
    except FileExistsError:
        raise _begun_meanwhile(branch, desk) from None
    except OSError as error:
        raise RunError(f"cannot write {desk}: {error}. Choose another `run.root`, or free the disk") from error
    newest = max(attempt_numbers(paths))
    if newest > number:  # the number was one's own only because its first owner has come and gone since it was chosen
        _retire(desk)  # its first owner may write into it by now
        raise _begun_meanwhile(branch, paths.attempts / f"{newest:04d}")
    write_json(desk / OWNER, own_identity(), desk)
    for old in sorted(paths.attempts.iterdir()):
        if old.name < desk.name:
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
    stems = (entry.name.partition(".")[0] for entry in paths.attempts.iterdir())
    return sorted(int(stem) for stem in stems if stem.isdigit())


def refuse_owned(branches: Sequence[tuple[BranchPaths, int]]) -> dict[int, int]:
    """Find out whether a process that lives trains one of these branches; the numbers of the attempts that are lost.

    On this host, the process itself tells. On another, a beat of its heart, which is waited for, once for all
    branches; if none comes within `LOST_AFTER_S`, the branch may be taken over. A job that the scheduler has requeued
    need not wait for itself.
    Raises: RunError that names the owner; LeaveError if asked to leave meanwhile.
    """
    silent = {}
    for paths, branch in branches:
        try:
            status = read_status(paths, branch)
        except RunError:
            continue  # of this branch alone, which says so when its turn comes
        if status.state != "running" or _is_own(status):
            continue
        if status.host == socket.gethostname():
            if is_alive(paths, status):
                raise _owned(paths, status)
        elif status.job is None or status.job != job_id() or not was_requeued():
            silent[branch] = paths, status
    _wait_for_beats(list(silent.values()))
    return {branch: status.attempt for branch, (_, status) in silent.items()}


def _is_own(status: Status) -> bool:
    return status.pid == os.getpid() and status.host == socket.gethostname()


def _owned(paths: BranchPaths, status: Status) -> RunError:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(status.started))
    job = f", job {status.job}" if status.job else ""
    return RunError(
        f"branch {status.branch} in {paths.folder} is in training by process {status.pid} on {status.host}{job} "
        f"since {since}; wait for it, or end it first"
    )


def is_alive(paths: BranchPaths, status: Status) -> bool:
    """Whether the process of this host that wrote a status lives, and is not another one of the same number."""
    started = process_started(status.pid)
    if started is None:
        return False
    return owner_started(paths, status.attempt) in (None, started) or started == 0


def owner_started(paths: BranchPaths, number: int) -> int | None:
    """When the process of an attempt began, as `process_started` says it; None if that is not known."""
    owner = paths.attempts / f"{number:04d}" / OWNER
    return read_json(owner).get("pid_started") if owner.exists() else None


def process_started(pid: int) -> int | None:
    """When a process of this host began (clock ticks since boot); 0 if the system hides it, None if there is none."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _exists(pid)
    return None if after_name[0] == "Z" else int(after_name[19])  # a zombie has ended


def _exists(pid: int) -> int | None:
    """Where there is no /proc, or not for this user: 0 if there is such a process."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # another user's
    return 0


def _wait_for_beats(silent: Sequence[tuple[BranchPaths, Status]]) -> None:
    """Raises: RunError once one of these is written again; LeaveError if asked to leave."""
    if not silent:
        return
    numbers = ", ".join(str(status.branch) for _, status in silent)
    print(f"waiting up to {LOST_AFTER_S:.0f} s for a sign of life of the last owners of {numbers}", flush=True)
    seen = [_last_beat(paths) for paths, _ in silent]
    deadline = time.monotonic() + LOST_AFTER_S
    while time.monotonic() < deadline:
        time.sleep(HEARTBEAT_S / 10)
        if leaving.asked():
            raise LeaveError(f"asked to leave by {leaving.asked()}, before the first step")
        for (paths, status), before in zip(silent, seen, strict=True):
            if _last_beat(paths) != before:
                raise _owned(paths, status)


def _last_beat(paths: BranchPaths) -> tuple[int, int]:
    """Which file it is and when it was written. It is opened, since a network drive may answer from its memory."""
    with paths.status.open("rb") as file:
        found = os.fstat(file.fileno())
    return found.st_ino, found.st_mtime_ns


def _begun_meanwhile(branch: int, desk: Path) -> RunError:
    try:
        owner = read_json(desk / OWNER)
        who = f"process {owner['pid']} on {owner['host']}"
    except RunError:  # it has not written it yet, or is gone again
        who = f"see {desk}"
    return RunError(f"branch {branch} was begun by another process a moment ago: {who}")


def _retire(desk: Path) -> None:
    """Remove the desk of an older attempt, whatever that still puts there meanwhile."""
    # A name that no other desk of this number is given, of those that `begin_attempt` has made and taken back.
    ended = desk if desk.suffix == ENDED else desk.with_name(f"{desk.name}.{secrets.token_hex(4)}{ENDED}")
    try:
        if desk != ended:
            desk.rename(ended)
        for _ in range(N_TRIES):
            for entry in ended.iterdir():
                entry.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty any more: the old attempt was at work
                ended.rmdir()
                return
    except FileNotFoundError:
        return  # another process retired it
    except OSError as error:
        raise RunError(f"cannot take over from the attempt in {desk}: {error}") from error
    raise RunError(f"cannot take over from the attempt in {desk}: it goes on writing; try again")
