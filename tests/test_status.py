"""`stl status`: runs on disk, what is queued for them, damaged files, and how fast it answers."""

import json
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from stl_lightning.__main__ import main
from stl_lightning.errors import RunError
from stl_lightning.exits import DONE, FAILED, UNFINISHED
from stl_lightning.launch.record import Launch, Process, write_launch
from stl_lightning.launch.state import read_run_state
from stl_lightning.paths import RunPaths, write_json
from stl_lightning.status import LOST_AFTER_S, Status, write_status

STALE, FRESH = LOST_AFTER_S + 1, 1.0
NOW_S = 1_000_000.0
FakeCommand = Callable[[str, str], Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCommand:
    """`fake("squeue", SCRIPT)` puts a shell script of that name first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def write(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return write


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


# --- SLURM's answers


def row_22(job_id: int, state: str, array: int = 0, task: int | None = None, tasks: str = "") -> dict[str, Any]:
    """A job as SLURM 22.05 writes it: words and bare numbers, 0 for what is not set."""
    return {
        "job_id": job_id,
        "array_job_id": array,
        "array_task_id": task,
        "array_task_string": tasks,
        "job_state": state,
        "time_limit": 60,
        "start_time": 1000 if state == "RUNNING" else 0,
        "end_time": 4600 if state == "RUNNING" else 0,
    }


# --- runs on disk


def a_run(folder: Path, statuses: Sequence[Status | None], launch: Launch | None = None) -> RunPaths:
    """A run directory with a status file for each branch, as its owners would have left it."""
    paths = RunPaths(folder)
    write_json(paths.run_json, {"id": "a", "hash": "b", "settings": {"n_branches": len(statuses)}})
    for branch, status in enumerate(statuses):
        if status is not None:
            write_status(paths.branch(branch), replace(status, branch=branch, attempt=1))
            paths.branch(branch).best.touch()
            paths.branch(branch).best.touch()
    if launch is not None:
        write_launch(paths, launch)
    return paths


def make_old(paths: RunPaths, branch: int, age_s: float = STALE) -> None:
    """By the clock of the file system, whatever the one of the owner said."""
    then = time.time() - age_s
    os.utime(paths.branch(branch).status, (then, then))


def elsewhere(state: Any, **fields: Any) -> Status:
    return Status(0, state, host="another", **fields)


STATES = {
    "complete": ([elsewhere("finished")] * 2, DONE),
    "running": ([elsewhere("finished"), elsewhere("running")], UNFINISHED),
    "not begun": ([elsewhere("finished"), None], UNFINISHED),
    "interrupted": ([elsewhere("finished"), elsewhere("interrupted")], UNFINISHED),
    "failed": ([elsewhere("running"), elsewhere("failed", error="Traceback\nValueError: of me")], FAILED),
    "process gone": ([elsewhere("finished"), Status(0, "running", pid=2**22 + 1)], FAILED),
    "process lives": ([elsewhere("finished"), Status(0, "running")], UNFINISHED),
}


@pytest.mark.parametrize("name", STATES)
def test_the_exit_code_says_it_for_all_branches(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], no_slurm: None
) -> None:
    statuses, code = STATES[name]
    paths = a_run(tmp_path / "run", statuses)
    assert main(["status", str(paths.folder)]) == code
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 1 + len(statuses) + 1
    assert main(["status", str(paths.folder), "--json"]) == code
    rows = json.loads(capsys.readouterr().out)["branches"]
    for line, row in zip(printed[1:], rows, strict=False):
        assert line.split()[:2] == [str(row["branch"]), row["state"]]


def test_a_failed_branch_shows_the_last_line_of_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = a_run(tmp_path / "run", STATES["failed"][0])
    main(["status", str(paths.folder)])
    assert "branch 1: ValueError: of me" in capsys.readouterr().out.splitlines()


def test_ages_are_by_the_clock_of_the_file_system(tmp_path: Path) -> None:
    """A host whose clock is an hour off is neither lost nor alive because of that."""
    statuses = [elsewhere("running", heartbeat=time.time() - 3600), elsewhere("running", heartbeat=time.time() + 3600)]
    paths = a_run(tmp_path / "run", statuses)
    make_old(paths, 1)
    assert [report.state for report in read_run_state(paths).branches] == ["running", "lost"]


@pytest.mark.parametrize("content", ["", '{"branch": 1, "sta', "[]", '{"branch": 1, "colour": 3}', "\udcff"])
def test_an_unreadable_file_is_that_of_one_branch(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = a_run(tmp_path / "run", [elsewhere("finished")] * 3)
    paths.branch(1).status.write_text(content, errors="surrogateescape")
    assert main(["status", str(paths.folder)]) == FAILED
    printed = capsys.readouterr().out
    assert [line.split()[1] for line in printed.splitlines()[1:4]] == ["finished", "unreadable", "finished"]
    assert str(paths.branch(1).status) in printed
    assert "Delete it" in printed


def test_time_left_is_by_the_last_epoch_and_by_the_job(fake: FakeCommand, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"jobs": [row_22(17, "RUNNING") | {"end_time": time.time() + 600}]}))
    fake("squeue", f"cat {tmp_path}/q.json")
    paths = a_run(tmp_path / "run", [elsewhere("running", epoch=10, n_epochs=30, epoch_s=2.5, job="17")])
    (report,) = read_run_state(paths).branches
    assert report.left_s == 50.0
    assert report.job_left_s == pytest.approx(600, abs=5)


def test_what_is_launched_and_not_begun_is_queued(fake: FakeCommand, tmp_path: Path) -> None:
    """Before the first rank has come there is no run.json, and a record of the launch alone."""
    (tmp_path / "q.json").write_text(json.dumps({"jobs": [row_22(17, "PENDING", array=17, tasks="0-1")]}))
    fake("squeue", f"cat {tmp_path}/q.json")
    paths = RunPaths(tmp_path / "run")
    write_launch(paths, Launch("array", "c.yaml", n_branches=2, branches=[0, 1], jobs={"branches": "17"}))
    state = read_run_state(paths)
    assert [(report.state, report.job) for report in state.branches] == [("queued", "17_0"), ("queued", "17_1")]
    assert state.exit_code == UNFINISHED


def test_what_a_branch_failed_of_is_said_while_its_job_tries_again(fake: FakeCommand, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"jobs": [row_22(17, "RUNNING")]}))
    fake("squeue", f"cat {tmp_path}/q.json")
    launch = Launch("srun", "c.yaml", n_branches=2, branches=[0, 1], jobs={"branches": "17"}, retries=2)
    failed = elsewhere("failed", job="17", n_failures=1, error="ended with exit code 1", log_tail=["one", "no memory"])
    paths = a_run(tmp_path / "run", [failed, elsewhere("failed", job="16", n_failures=3, error="it broke")], launch)
    first, second = read_run_state(paths).branches
    assert (first.state, first.problem) == ("queued", "ended with exit code 1: no memory (try 2 of 3 comes)")
    assert (second.state, second.problem) == ("queued", "it broke")  # of another job


@pytest.mark.parametrize("reason", ["launch failed requeued held", "JobHeldUser", "JobHoldMaxRequeue"])
def test_a_task_that_slurm_holds_is_named_with_its_cure(reason: str, fake: FakeCommand, tmp_path: Path) -> None:
    row = row_22(17, "PENDING", array=17, tasks="0-1") | {"state_reason": reason}
    (tmp_path / "q.json").write_text(json.dumps({"jobs": [row]}))
    fake("squeue", f"cat {tmp_path}/q.json")
    launch = Launch("array", "c.yaml", n_branches=2, branches=[0, 1], jobs={"branches": "17"})
    state = read_run_state(a_run(tmp_path / "run", [None, None], launch))
    assert [report.state for report in state.branches] == ["queued", "queued"]
    (note,) = state.notes
    assert note == f"SLURM holds jobs 17_0,17_1 ({reason}): scontrol release 17_0,17_1"


def test_an_array_of_another_size_than_the_run(fake: FakeCommand, tmp_path: Path) -> None:
    """Tasks that have no branch are left out; branches without a task are still to be launched."""
    rows = [row_22(17, "PENDING", array=17, tasks="0-9")]
    (tmp_path / "q.json").write_text(json.dumps({"jobs": rows}))
    fake("squeue", f"cat {tmp_path}/q.json")
    launch = Launch("array", "c.yaml", n_branches=10, branches=[0, *range(2, 10)], jobs={"branches": "17"})
    paths = a_run(tmp_path / "run", [None, None], launch)
    assert [report.state for report in read_run_state(paths).branches] == ["queued", "pending"]


def test_forgotten_jobs_are_named_and_judged_by_their_files(fake: FakeCommand, tmp_path: Path) -> None:
    fake("squeue", "echo '{\"jobs\": []}'")
    launch = Launch("array", "c.yaml", n_branches=2, branches=[0, 1], jobs={"branches": "17"})
    paths = a_run(tmp_path / "run", [elsewhere("running", job="17_0"), elsewhere("running", job="17_1")], launch)
    make_old(paths, 1)
    state = read_run_state(paths)
    assert [report.state for report in state.branches] == ["running", "lost"]
    assert state.notes == ["SLURM has forgotten job 17: its branches are judged by their files"]


def test_jobs_that_ended_before_a_branch_began_are_named(fake: FakeCommand, tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"jobs": [row_22(20, "FAILED", array=17, task=b) for b in (0, 1, 2)]}))
    fake("squeue", f"cat {tmp_path}/q.json")
    launch = Launch("array", "c.yaml", n_branches=3, branches=[0, 1, 2], jobs={"branches": "17"})
    state = read_run_state(a_run(tmp_path / "run", [None, elsewhere("finished"), None], launch))
    assert [report.state for report in state.branches] == ["pending", "finished", "pending"]
    assert state.notes == [f"job 17 ended before branches 0,2 began: {state.paths.logs} says why"]


def test_a_run_of_this_machine_is_queued_as_long_as_its_launcher_lives(tmp_path: Path) -> None:
    def launched(launcher: Process) -> RunPaths:
        jobs = {"branches": "local-1-2"}
        launch = Launch("local", "c.yaml", n_branches=2, branches=[0, 1], jobs=jobs, launcher=launcher, n_workers=1)
        return a_run(tmp_path / str(launcher.pid), [elsewhere("finished"), None], launch)

    used_again = Process(os.getppid(), -1)
    assert read_run_state(launched(Process.of(os.getpid()))).branches[1].state == "queued"
    assert read_run_state(launched(used_again)).branches[1].state == "pending"


def test_the_ensemble_is_part_of_what_was_launched(fake: FakeCommand, tmp_path: Path) -> None:
    queue = tmp_path / "q.json"
    fake("squeue", f"cat {queue}")
    jobs = {"branches": "17", "ensemble": "18"}
    launch = Launch("array", "c.yaml", n_branches=1, branches=[0], jobs=jobs)
    paths = a_run(tmp_path / "run", [elsewhere("finished")], launch)
    for rows, ensemble, code in (
        ([row_22(18, "PENDING")], "queued", UNFINISHED),
        ([row_22(18, "FAILED")], "missing", FAILED),
    ):
        queue.write_text(json.dumps({"jobs": rows}))
        state = read_run_state(paths)
        assert (state.ensemble, state.exit_code) == (ensemble, code)
    write_json(paths.results, {})
    assert (read_run_state(paths).ensemble, read_run_state(paths).exit_code) == ("made", DONE)
    make_old(paths, 0, 10)
    os.utime(paths.results, (time.time() - 20, time.time() - 20))
    assert (read_run_state(paths).ensemble, read_run_state(paths).exit_code) == ("outdated", FAILED)
    queue.write_text(json.dumps({"jobs": [row_22(18, "PENDING")]}))  # it is about to be made again
    assert (read_run_state(paths).ensemble, read_run_state(paths).exit_code) == ("queued", UNFINISHED)


NEXT = {
    "interrupted": (
        [elsewhere("interrupted"), elsewhere("finished")],
        "; to continue, repeat the command that started it\n",
    ),
    "left out": ([None, elsewhere("finished")], ", or `stl fit` with its config for branches that were left out\n"),
    "partial": ([elsewhere("finished")] * 2, "ensemble: partial; `stl ensemble {folder}` makes it\n"),
}


@pytest.mark.parametrize("case", NEXT)
def test_what_to_do_next_of_a_run_that_nothing_works_on(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses, said = NEXT[case]
    paths = a_run(tmp_path / "run", statuses)
    write_json(paths.results, {"missing": [0]})
    main(["status", str(paths.folder)])
    printed = capsys.readouterr().out
    assert "ensemble: partial" in printed
    assert said.format(folder=paths.folder) in printed


def test_results_that_are_damaged_are_to_be_made_again(tmp_path: Path) -> None:
    paths = a_run(tmp_path / "run", [elsewhere("finished")])
    paths.results.parent.mkdir()
    paths.results.write_text("{")
    assert read_run_state(paths).ensemble == "outdated"


def test_watching_ends_when_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = a_run(tmp_path / "run", [elsewhere("running")])
    make_old(paths, 0, LOST_AFTER_S - 1.0)
    assert main(["status", str(paths.folder), "--watch", "0.2"]) == FAILED
    printed = capsys.readouterr().out
    assert printed.count("heartbeat") > 1
    assert "1 running" in printed
    assert "1 lost" in printed


@pytest.mark.parametrize("command", ["status", "resubmit", "cancel"])
def test_a_folder_that_is_no_run(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 2
    assert f"{tmp_path} is not a run directory" in capsys.readouterr().err


def test_a_damaged_launch_file_hides_no_branch(tmp_path: Path) -> None:
    paths = a_run(tmp_path / "run", [elsewhere("running")])
    paths.launch.write_text('[{"method": "array"')
    state = read_run_state(paths)
    assert [report.state for report in state.branches] == ["running"]
    assert str(paths.launch) in state.notes[0]


def test_a_damaged_run_file(tmp_path: Path) -> None:
    paths = a_run(tmp_path / "run", [])
    write_json(paths.run_json, {"id": "a", "hash": "b", "settings": {}})
    with pytest.raises(RunError, match="number of branches"):
        read_run_state(paths)


# --- speed

N_BRANCHES = 1024
CPU_S = 0.5  # the wall clock of a machine that others use says little


def test_a_thousand_branches_in_under_half_a_second(fake: FakeCommand, tmp_path: Path) -> None:
    """All running, each in an array task of its own, start-up of Python included."""
    paths = RunPaths(tmp_path / "run")
    write_json(paths.run_json, {"id": "a", "hash": "b", "settings": {"n_branches": N_BRANCHES}})
    for branch in range(N_BRANCHES):
        status = elsewhere("running", epoch=1, n_epochs=3, epoch_s=2.0, loss=0.5, job=f"17_{branch}")
        of_branch = paths.branch(branch)
        of_branch.folder.mkdir(parents=True)
        of_branch.status.write_text(json.dumps(asdict(replace(status, branch=branch, attempt=1))))
    branches = list(range(N_BRANCHES))
    write_launch(paths, Launch("array", "c.yaml", n_branches=N_BRANCHES, branches=branches, jobs={"branches": "17"}))
    rows = [row_22(100 + branch, "RUNNING", array=17, task=branch) | {"x": "y" * 2500} for branch in branches]
    (tmp_path / "q.json").write_text(json.dumps({"jobs": rows}))
    fake("squeue", f"exec cat {tmp_path}/q.json")

    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        args = [sys.executable, "-m", "stl_lightning", "status", str(paths.folder)]
        done = subprocess.run(args, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == UNFINISHED, done.stderr
        assert len(done.stdout.splitlines()) == N_BRANCHES + 2
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < CPU_S


def test_status_imports_nothing_heavy() -> None:
    code = (
        "import sys; import stl_lightning.__main__, stl_lightning.cli.status, stl_lightning.cli.launch;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'lightning', 'numpy', 'rich', 'yaml')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
