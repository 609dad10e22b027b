"""Attempts are numbered, the newest owns the branch, and what an older one still writes changes nothing."""

import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from test_groups import N_STEPS, assert_close, jobs_of, state, train
from test_training import assert_same

from stl_lightning import attempts, leaving, paths
from stl_lightning.attempts import attempt_numbers, begin_attempt, desk_of, refuse_owned
from stl_lightning.checkpoint import load_checkpoint, put_together
from stl_lightning.errors import CheckpointError, FencedError, LeaveError, RunError
from stl_lightning.module import BranchModule
from stl_lightning.paths import BranchPaths, write_atomically, write_json
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.training import groups, train_branches
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


def test_a_fenced_training_ends_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requeued task takes the branch over in mid-training: the old process finds out when it writes, and stops."""
    nested = {"trainer": {"precision": "32-true"}}  # 64 bits would be the outer training's choice for the inner one
    undisturbed = train(tmp_path / "undisturbed", [0], **nested)
    stale = jobs_of(tmp_path / "run", [0], **nested)
    make_step = BranchModule._step_if_due

    def step_if_due(module: BranchModule) -> None:
        make_step(module)
        if module.trainer.global_step == N_STEPS + 4:
            monkeypatch.setattr(BranchModule, "_step_if_due", make_step)
            assert train_branches(jobs_of(tmp_path / "run", [0], **nested)) == 0

    monkeypatch.setattr(BranchModule, "_step_if_due", step_if_due)
    with pytest.raises(FencedError):
        train_branches(stale)
    assert leaving.asked() is None
    status = read_status(stale[0].run.paths.branch(0), 0)
    assert (status.state, status.attempt) == ("finished", 2)
    assert_same(state(undisturbed[0]), state(stale[0]))


def test_siblings_of_a_fenced_branch_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose status cannot be read, or that trains elsewhere, takes nobody down either."""
    jobs = jobs_of(tmp_path, range(4), options={"stack": True})
    make_step = BranchModule._step_if_due

    def step_if_due(module: BranchModule) -> None:
        make_step(module)
        if module.trainer.global_step == N_STEPS + 4:
            monkeypatch.setattr(BranchModule, "_step_if_due", make_step)
            begin_attempt(jobs[1].run.paths.branch(1), 1)

    monkeypatch.setattr(BranchModule, "_step_if_due", step_if_due)
    jobs[2].paths.folder.mkdir(parents=True)
    jobs[2].paths.status.write_text("{")
    write_status(jobs[3].paths, Status(3, "running", pid=os.getppid()))
    with pytest.raises(RunError, match=r"status\.json"):
        train_branches(jobs)
    states = [json.loads(jobs[b].run.paths.branch(b).status.read_text())["state"] for b in (0, 1, 3)]
    assert states == ["finished", "running", "running"]
    assert_close(state(train(tmp_path / "alone", [0])[0]), state(jobs[0]))


def test_a_branch_that_another_process_finished_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(tmp_path, [0, 1], options={"stack": False})
    finish, begin = jobs_of(tmp_path, [1]), groups.Attempt.begin

    def begin_late(attempt: groups.Attempt) -> None:
        if attempt.job is jobs[1]:
            monkeypatch.setattr(groups.Attempt, "begin", begin)
            assert train_branches(finish) == 0
        begin(attempt)

    monkeypatch.setattr(groups.Attempt, "begin", begin_late)
    outcomes = []
    assert train_branches(jobs, lambda job, outcome: outcomes.append((job.branch, outcome))) == 0
    assert outcomes == [(0, "finished"), (1, "skipped")]
    assert read_status(finish[0].paths, 1).attempt == 1


def test_the_last_beat_does_not_overwrite_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat that began before the end of the training and is written after it."""
    jobs = jobs_of(tmp_path, [0])
    stop = Heartbeat.__exit__

    def slow_stop(heartbeat: Heartbeat, *args: object) -> None:
        heartbeat.beat()
        stop(heartbeat, *args)

    monkeypatch.setattr(Heartbeat, "__exit__", slow_stop)
    assert train_branches(jobs) == 0
    assert read_status(jobs[0].paths, 0).state == "finished"


def test_who_waits_for_his_turn_is_not_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault of the group its branches go on one by one: those that wait have no heart that beats for them."""
    jobs = jobs_of(tmp_path, [0, 1, 2], options={"stack": True})
    fit, seen = groups._fit, []

    def failing_once(group: list[groups.Attempt], heartbeat: Heartbeat) -> object:
        seen.append([read_status(job.paths, job.branch).state for job in jobs])
        if len(group) > 1:
            raise MemoryError
        return fit(group, heartbeat)

    monkeypatch.setattr(groups, "_fit", failing_once)
    assert train_branches(jobs) == 0
    r, w, f = "running", "interrupted", "finished"
    assert seen == [[r, r, r], [r, w, w], [f, r, w], [f, f, r]]


def test_owners_are_waited_for_all_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "LOST_AFTER_S", 0.4)
    monkeypatch.setattr(attempts, "HEARTBEAT_S", 0.2)
    branches = [(BranchPaths(tmp_path / f"{b}"), b) for b in range(8)]
    for folder, b in branches:
        write_json(folder.status, asdict(Status(b, "running", 4, host="elsewhere")))
    before = time.monotonic()
    lost = refuse_owned(branches)
    for folder, b in branches:
        begin_attempt(folder, b, lost[b])
    assert time.monotonic() - before < 1.5
    write_json(branches[0][0].status, asdict(Status(0, "running", 4, host="elsewhere")))
    with leaving.listening():
        leaving.note("SIGTERM")
        with pytest.raises(LeaveError):
            refuse_owned(branches[:1])


def test_checkpoints_of_different_steps_do_not_go_on_together(tmp_path: Path) -> None:
    jobs = train(tmp_path, [0, 1])
    parts = [load_checkpoint(job.paths.last) for job in jobs]
    put_together(parts)
    parts[1]["global_step"] += 1
    with pytest.raises(CheckpointError, match="different steps"):
        put_together(parts)


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
