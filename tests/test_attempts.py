"""Attempts are numbered, the newest owns the branch, and what an older one still writes changes nothing."""

import contextlib
import errno
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from stl_lightning import attempts, paths
from stl_lightning.attempts import attempt_numbers, begin_attempt, desk_of, refuse_owned
from stl_lightning.errors import FencedError, RunError
from stl_lightning.paths import BranchPaths, write_atomically, write_json
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.training.heartbeat import Heartbeat


def put(text: str) -> paths.Callable:
    return lambda file: file.write(text.encode())


@pytest.fixture
def branch(tmp_path: Path) -> BranchPaths:
    return BranchPaths(tmp_path / "branches" / "03")


def test_the_newest_attempt_owns_the_branch(branch: BranchPaths) -> None:
    first, old = begin_attempt(branch, 3)
    old.write(old.last, put("old"))
    second, new = begin_attempt(branch, 3)
    assert (first, second) == (1, 2)
    with pytest.raises(FencedError, match="newer attempt"):
        old.write(old.last, put("stale"))
    with pytest.raises(FencedError):
        write_status(old, Status(3, "running"))
    assert old.last.read_text() == "old"
    assert not branch.status.exists()
    new.write(new.last, put("new"))
    assert new.last.read_text() == "new"
    assert attempt_numbers(branch) == [2]


def test_a_writer_that_stood_still_before_its_rename_changes_nothing(branch: BranchPaths) -> None:
    """The worst moment: it has found itself the owner and written everything, and then a newer attempt begins."""
    _, old = begin_attempt(branch, 3)
    old.write(old.last, put("old"))

    def written_late(file: object) -> None:
        put("stale")(file)
        begin_attempt(branch, 3)

    with pytest.raises(FencedError):
        old.write(old.last, written_late)
    assert branch.last.read_text() == "old"
    assert not [path for path in branch.folder.rglob(".*")], "a temporary file was left"


def test_a_cached_handle_of_the_old_desk_finds_it_empty(branch: BranchPaths) -> None:
    """A client of a network drive may reach the folder after it was renamed: the file to rename is gone even so."""
    _, old = begin_attempt(branch, 3)
    handle = os.open(old.desk, os.O_DIRECTORY)
    (old.desk / ".last.ckpt.0").write_text("stale")
    begin_attempt(branch, 3)
    with pytest.raises(FileNotFoundError):
        os.rename(".last.ckpt.0", branch.last, src_dir_fd=handle)
    with pytest.raises(FileNotFoundError):
        os.open(".last.ckpt.1", os.O_CREAT | os.O_WRONLY, dir_fd=handle)
    os.close(handle)


def test_a_number_that_was_given_before_is_not_taken_again(
    branch: BranchPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between looking for the highest number and taking the next, two others come, and the first of them goes."""
    _, first = begin_attempt(branch, 3)
    with monkeypatch.context() as patch:
        looked = attempts.attempt_numbers
        answers = iter([looked(branch)])
        begin_attempt(branch, 3)
        _, newest = begin_attempt(branch, 3)
        assert [desk.name for desk in branch.attempts.iterdir()] == ["0003"]
        patch.setattr(attempts, "attempt_numbers", lambda paths: next(answers, None) or looked(paths))
        with pytest.raises(RunError, match="begun by another process a moment ago"):
            begin_attempt(branch, 3)
    assert [desk.name for desk in branch.attempts.iterdir()] == ["0003"]
    newest.write(newest.last, put("newest"))
    with pytest.raises(FencedError):
        first.write(first.last, put("first"))


def test_a_desk_that_was_taken_away_before_its_owner_signed_does_not_come_back(
    branch: BranchPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer attempt comes between the folder and the name of its owner in it."""
    with monkeypatch.context() as patch:
        identity, newer = attempts.own_identity, []

        def overtaken() -> dict[str, object]:
            if not newer:
                newer.append(None)
                newer.append(begin_attempt(branch, 3)[1])
            return identity()

        patch.setattr(attempts, "own_identity", overtaken)
        with pytest.raises(FencedError):
            begin_attempt(branch, 3)
    assert [desk.name for desk in branch.attempts.iterdir()] == ["0002"]
    newer[1].write(newer[1].last, put("newer"))


def test_of_many_that_begin_at_once_one_owns_the_branch(tmp_path: Path) -> None:
    """Time and again, since it takes luck for two to get into each other's way."""
    former = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        assert [n_owners(BranchPaths(tmp_path / str(i))) for i in range(40)] == [1] * 40
    finally:
        sys.setswitchinterval(former)


def n_owners(branch: BranchPaths) -> int:
    """How many of ten that begin the branch within four milliseconds may write at last."""
    owners: list[BranchPaths] = []

    def begin(delay_s: float) -> None:
        time.sleep(delay_s)
        with contextlib.suppress(RunError, FencedError):
            owners.append(begin_attempt(branch, 3)[1])

    threads = [threading.Thread(target=begin, args=(random.uniform(0, 0.004),)) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    def writes(owner: BranchPaths) -> bool:
        try:
            owner.write(owner.last, put(owner.desk.name))
        except FencedError:
            return False
        return True

    return sum(map(writes, owners))


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_a_rename_that_a_network_drive_failed_is_tried_again(
    code: int, branch: BranchPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, owner = begin_attempt(branch, 3)
    replace, faults = Path.replace, [code, code]

    def failing(self: Path, target: Path) -> Path:
        if faults:
            raise OSError(faults.pop(), "of a network drive")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    owner.write(owner.last, put("new"))
    assert owner.last.read_text() == "new"
    faults += [code] * 3
    with pytest.raises(RunError, match="cannot write"):
        owner.write(owner.last, put("newer"))
    assert owner.last.read_text() == "new"


def test_a_rename_that_was_made_and_reported_as_failed_counts(
    branch: BranchPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network drive repeats a request whose answer was lost, and then finds no file to rename."""
    replace, calls = Path.replace, []

    def twice(self: Path, target: Path) -> Path:
        calls.append(target)
        replace(self, target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", twice)
    write_atomically(branch.last, put("new"))
    assert branch.last.read_text() == "new"
    assert len(calls) == 1


def test_a_living_owner_on_this_host_is_named(branch: BranchPaths) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        number, owner = begin_attempt(branch, 3)
        started = attempts.process_started(sleeper.pid)
        write_json(owner.desk / attempts.OWNER, {"pid": sleeper.pid, "pid_started": started})
        write_status(owner, Status(3, "running", number, pid=sleeper.pid, job="17_3"))
        with pytest.raises(RunError, match=f"process {sleeper.pid} on .*, job 17_3 since 20"):
            begin_attempt(branch, 3)
        # Another program that has been given the number of one that ended is not the owner.
        write_json(owner.desk / attempts.OWNER, {"pid": sleeper.pid, "pid_started": started - 1})
        refuse_owned([(branch, 3)])
    finally:
        sleeper.kill()
        sleeper.wait()
    refuse_owned([(branch, 3)])


@pytest.mark.parametrize("clock_s", [0.0, -1e6, 1e6], ids=["same", "late", "early"])
def test_an_owner_elsewhere_is_judged_by_its_heart(
    clock_s: float, branch: BranchPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its clock says: one that beats keeps its branch, one that does not loses it."""
    monkeypatch.setattr(attempts, "LOST_AFTER_S", 0.6)
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.2)
    status = asdict(Status(3, "running", 1, host="elsewhere", heartbeat=time.time() + clock_s))
    write_json(branch.status, status)
    refuse_owned([(branch, 3)])

    over = threading.Event()

    def beat() -> None:
        while not over.wait(0.1):
            write_json(branch.status, status)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunError, match="on elsewhere since"):
            refuse_owned([(branch, 3)])
    finally:
        over.set()
        heart.join()


def test_a_requeued_job_does_not_wait_for_itself(branch: BranchPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(branch.status, asdict(Status(3, "running", 1, host="elsewhere", job="17_3")))
    for name, value in {"ARRAY_JOB_ID": "17", "ARRAY_TASK_ID": "3", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    before = time.monotonic()
    refuse_owned([(branch, 3)])
    assert time.monotonic() - before < 1


def test_the_heart_finds_out_too(branch: BranchPaths) -> None:
    number, owner = begin_attempt(branch, 3)
    with Heartbeat([(owner, Status(3, "running", number))], every_s=0.01) as heartbeat:
        while not branch.status.exists():
            time.sleep(0.005)
        assert not heartbeat.is_leaving()
        begin_attempt(branch, 3)
        deadline = time.monotonic() + 10
        while not heartbeat.is_leaving():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        with pytest.raises(FencedError):
            heartbeat.leave()


def test_a_finished_branch_whose_best_weights_were_deleted_is_to_be_trained(branch: BranchPaths) -> None:
    """As the message about a damaged `best.ckpt` says: `stl resubmit` must not take it for finished."""
    number, owner = begin_attempt(branch, 3)
    owner.write(owner.best, put("weights"))
    write_status(owner, Status(3, "finished", number))
    assert read_status(branch, 3).state == "finished"
    branch.best.unlink()
    assert read_status(branch, 3).state == "pending"


def test_the_heart_beats_on_where_nothing_can_be_written(branch: BranchPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on the same full disk as the run: to say that a beat was left out fails as well."""
    from stl_lightning.training import heartbeat

    number, owner = begin_attempt(branch, 3)
    beaten: list[int] = []

    def cannot_write(*_: object) -> None:
        beaten.append(1)
        raise RunError("no space left on device")

    monkeypatch.setattr(heartbeat, "write_status", cannot_write)
    with Path("/dev/full").open("w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        with heartbeat.Heartbeat([(owner, Status(3, "running", number))], every_s=0.01):
            deadline = time.monotonic() + 10
            while len(beaten) < 5 and time.monotonic() < deadline:
                time.sleep(0.005)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert len(beaten) >= 5


def test_the_end_of_an_attempt_is_written_on_its_behalf(branch: BranchPaths) -> None:
    number, _ = begin_attempt(branch, 3)
    write_status(desk_of(branch, number), Status(3, "failed", number))
    begin_attempt(branch, 3)
    with pytest.raises(FencedError):
        write_status(desk_of(branch, number), Status(3, "failed", number))
