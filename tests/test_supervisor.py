"""The supervisor: a child that fails or is killed is recorded and tried again, and signals reach it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stl_lightning.attempts import begin_attempt
from stl_lightning.exits import DONE, FAILED, INTERRUPTED, REFUSED
from stl_lightning.paths import RunPaths
from stl_lightning.status import Status, read_status, write_status

CHECKOUT = Path(__file__).resolve().parent.parent

# Stands for `stl fit` where its ten seconds of imports would add nothing: it takes its branch as the real one does, and
# then does what the list in `plan` says for this start of it.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from stl_lightning import leaving
from stl_lightning.attempts import begin_attempt
from stl_lightning.paths import RunPaths
from stl_lightning.ranks import job_id
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.supervisor import is_given_up, is_orphan, tell_supervisor

root = Path(os.environ["ROOT"])
(root / "args").write_text(" ".join(sys.argv[1:]))
run = RunPaths(root)
branches = [b for b in (0, 1) if not is_given_up(run.branch(b), b)]
tell_supervisor(run, branches)
if "DIE_EARLY" in os.environ:
    print("reading the data", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
n_failed = 2 - len(branches)
with leaving.listening():
    for b in branches:
        old = read_status(run.branch(b), b)
        if old.state == "finished":
            continue
        number, paths = begin_attempt(run.branch(b), b)
        n_failures = old.n_failures if old.job == job_id() else 0
        status = Status(b, "running", number, job=job_id(), n_failures=n_failures)
        write_status(paths, status)
        plan = json.loads((root / "plan.json").read_text())[b]
        act = plan[min(number, len(plan)) - 1]
        print(f"branch {b} attempt {number}: {act}", flush=True)
        if act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "wait":
            while not leaving.asked():
                if is_orphan():
                    sys.exit((root / "orphan").write_text("left"))
                time.sleep(0.01)
            status.state = "interrupted"
            write_status(paths, status)
            sys.exit(75)
        status.state = "failed" if act == "fail" else "finished"
        status.n_failures += act == "fail"
        n_failed += act == "fail"
        paths.best.touch()
        write_status(paths, status)
sys.exit(n_failed > 0)
"""

SUPERVISOR = """
import os, sys
from stl_lightning import leaving, supervisor
supervisor.PAUSE_S = float(os.environ.get("PAUSE", "0.01"))
run_child = supervisor.run_child
supervisor.run_child = lambda args, retries: run_child([sys.executable, "-c", sys.argv[2], *args[4:]], retries)
with leaving.listening():
    sys.exit(supervisor.supervise([], int(sys.argv[1])))
"""

Supervised = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    started: list[subprocess.Popen[str]] = []

    def start(plan: list[list[str]], retries: int = 2, **environ: str) -> subprocess.Popen[str]:
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        env |= {"ROOT": str(tmp_path), "PYTHONPATH": str(CHECKOUT)} | environ
        args = [sys.executable, "-c", SUPERVISOR, str(retries), CHILD]
        started.append(subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start
    for process in started:  # of a test that failed; its child leaves as an orphan
        process.kill()
        process.communicate()


def status(root: Path, branch: int) -> Status:
    return read_status(RunPaths(root).branch(branch), branch)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fault", ["die", "fail"])
def test_what_fails_is_tried_again(fault: str, supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([[fault, fault, "finish"], ["finish"]])
    output, _ = process.communicate(timeout=30)
    assert process.returncode == DONE, output
    assert [status(tmp_path, b).state for b in (0, 1)] == ["finished", "finished"]
    assert [status(tmp_path, b).attempt for b in (0, 1)] == [3, 1]
    assert output.count("trying again") == 2


@pytest.mark.parametrize("fault", ["die", "fail"])
@pytest.mark.parametrize(("launcher", "code"), [({}, FAILED), ({"RANK": "0"}, DONE)], ids=["alone", "torchrun"])
def test_what_fails_too_often_is_given_up_and_takes_nobody_down(
    fault: str, launcher: dict[str, str], code: int, supervised: Supervised, tmp_path: Path
) -> None:
    if launcher:
        launcher |= {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    process = supervised([[fault], ["finish"]], retries=1, **launcher)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == code, output
    failed = status(tmp_path, 0)
    assert (failed.state, failed.attempt, failed.n_failures) == ("failed", 2, 2)
    assert f"branch 0 attempt 2: {fault}" in failed.log_tail
    if fault == "die":
        assert "SIGKILL" in failed.error
    assert status(tmp_path, 1).state == "finished"


def test_the_last_try_after_a_kill_trains_one_after_the_other(supervised: Supervised, tmp_path: Path) -> None:
    """The one that has its process killed is then the only one to fail."""
    for n_deaths, args in ((1, ""), (2, "--run.stack=false")):
        process = supervised([["die"] * n_deaths + ["finish"], ["finish"]], STL_JOB=f"{n_deaths}")
        process.communicate(timeout=30)
        assert (tmp_path / "args").read_text() == args
        shutil.rmtree(tmp_path / "branches")


def test_the_same_command_tries_again_after_the_cause_was_cured(supervised: Supervised, tmp_path: Path) -> None:
    """Without a scheduler, too, failures are those of this call."""
    supervised([["fail"], ["finish"]], retries=1).communicate(timeout=30)
    assert status(tmp_path, 0).n_failures == 2
    process = supervised([["fail", "fail", "finish"], ["finish"]], retries=1)
    process.communicate(timeout=30)
    assert process.returncode == DONE


def test_a_child_killed_before_it_begins_is_tried_again_and_recorded(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["finish"], ["finish"]], retries=1, DIE_EARLY="1")
    process.communicate(timeout=30)
    assert process.returncode == FAILED
    failed = status(tmp_path, 1)
    assert (failed.state, failed.n_failures) == ("failed", 2)
    assert "SIGKILL" in failed.error
    assert failed.log_tail == ["reading the data"]


def test_a_signal_ends_the_pause(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["fail"], ["finish"]], retries=9, PAUSE="60")
    wait_for(lambda: status(tmp_path, 1).state == "finished")
    time.sleep(0.2)
    process.terminate()
    output, _ = process.communicate(timeout=10)
    assert process.returncode == INTERRUPTED, output


def test_another_job_begins_to_count_anew(supervised: Supervised, tmp_path: Path) -> None:
    supervised([["fail"], ["finish"]], retries=0, STL_JOB="first").communicate(timeout=30)
    assert status(tmp_path, 0).n_failures == 1
    process = supervised([["fail", "finish"], ["finish"]], retries=1, STL_JOB="second")
    process.communicate(timeout=30)
    assert process.returncode == DONE


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_child(number: signal.Signals, supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["wait"], ["finish"]])
    wait_for(lambda: status(tmp_path, 0).state == "running")
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == INTERRUPTED, output
    assert status(tmp_path, 0).state == "interrupted"
    assert "trying again" not in output


def test_a_child_whose_supervisor_is_killed_leaves(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["wait"], ["finish"]])
    wait_for(lambda: status(tmp_path, 0).state == "running")
    process.kill()
    wait_for((tmp_path / "orphan").exists)
    process.communicate(timeout=30)


def test_a_stale_supervisor_does_not_overwrite_the_newer_attempt(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["wait"], ["finish"]], retries=0)
    wait_for(lambda: status(tmp_path, 0).state == "running")
    child = status(tmp_path, 0).pid
    branch = RunPaths(tmp_path).branch(0)
    former = read_status(branch, 0)
    write_status(branch, Status(0, "interrupted", former.attempt))
    number, paths = begin_attempt(branch, 0)
    write_status(paths, Status(0, "running", number))
    os.kill(child, signal.SIGKILL)
    process.communicate(timeout=30)
    assert (status(tmp_path, 0).state, status(tmp_path, 0).attempt) == ("running", 2)


def test_failures_that_cannot_be_noted_are_counted_too(supervised: Supervised, tmp_path: Path) -> None:
    process = supervised([["die"], ["finish"]], retries=1)
    wait_for(lambda: status(tmp_path, 0).attempt == 1)
    (tmp_path / "branches" / "00" / "attempts").rename(tmp_path / "away")
    output, _ = process.communicate(timeout=30)
    assert process.returncode == FAILED
    assert output.count("trying again") <= 2


CHATTY = """
import os, sys
from stl_lightning.supervisor import run_child
ended = run_child([sys.executable, "-c", "for i in range(20_000): print('line', i)"], 0)
os.write(2, b"ended %d" % ended.code)
"""


def test_a_full_disk_for_the_log_does_not_stop_the_child() -> None:
    with Path("/dev/full").open("w") as full:
        args = [sys.executable, "-c", CHATTY]
        done = subprocess.run(args, cwd=CHECKOUT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=30)
    assert "ended 0" in done.stderr


@pytest.mark.slow
def test_the_real_command(tmp_path: Path) -> None:
    """`stl fit --retries`: a mistake of the user's is not tried again, its code is passed on."""
    args = [sys.executable, "-m", "stl_lightning", "fit", "--retries", "2", "--config", "configs/digits.yaml"]
    root = [f"--run.root={tmp_path}", "--trainer.max_epochs=1"]
    refused = subprocess.run([*args, *root, "--data.source=nothing"], cwd=CHECKOUT, capture_output=True, text=True)
    assert refused.returncode == REFUSED
    assert "trying again" not in refused.stderr
    done = subprocess.run([*args, *root], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == DONE, done.stdout + done.stderr
    assert status(tmp_path / "digits", 3).state == "finished"
