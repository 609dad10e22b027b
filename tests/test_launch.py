"""What `stl launch` composes and records, which branches it launches again, and its scheduler on this machine."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stl_lightning.launch.again import held_back, to_resubmit
from stl_lightning.launch.compose import compose, limit_of_options, limit_s
from stl_lightning.launch.judge import BranchReport, RunState
from stl_lightning.launch.local import first_groups, to_try_again, worker_environ
from stl_lightning.launch.record import Launch, Process, launching, read_launches, write_launch
from stl_lightning.launch.slurm import Job, Queue
from stl_lightning.paths import RunPaths
from stl_lightning.ranges import as_ranges
from stl_lightning.status import Status

CHECKOUT = Path(__file__).resolve().parent.parent
DIGITS = "configs/digits.yaml"
RUN = RunPaths(Path("runs/digits"))
TEMPLATES = Path("slurm")
Submitted = list[list[str]]


def argvs(launch: Launch, still_queued: Sequence[str] = ()) -> dict[str, str]:
    """The command of each role, with ids as sbatch would have given them."""
    ids = {"prepare": "16", "branches": "17", "ensemble": "18"}
    return {each.role: shlex.join(each.argv(ids)) for each in compose(launch, RUN, TEMPLATES, still_queued)}


OF_FOUR = Launch("array", DIGITS, n_branches=4, branches=[0, 1, 2, 3])


def test_an_array_and_its_ensemble() -> None:
    assert argvs(OF_FOUR) == {
        "branches": "sbatch --parsable --job-name=stl-digits --output=runs/digits/logs/%x-%A_%a.out --array=0-3 "
        "slurm/array.sbatch configs/digits.yaml",
        "ensemble": "sbatch --parsable --dependency=afterany:17 --kill-on-invalid-dep=yes "
        "--job-name=stl-digits-ensemble --output=runs/digits/logs/%x-%j.out slurm/ensemble.sbatch runs/digits",
    }


@pytest.mark.parametrize(
    ("limit", "signal"), [("--time=1", "--signal=USR1@15"), ("--time=8:00", ""), ("--time=0", ""), ("", "")]
)
def test_a_limit_of_minutes_is_warned_of_later(limit: str, signal: str) -> None:
    """The templates ask for a warning two minutes before, which would come before the first step."""
    command = argvs(replace(OF_FOUR, sbatch=[limit] if limit else []))["branches"]
    assert [word for word in shlex.split(command) if word.startswith("--signal")] == ([signal] if signal else [])


@pytest.mark.parametrize("method", ["srun", "torchrun"])
def test_branches_over_nodes(method: str) -> None:
    launch = replace(OF_FOUR, method=method, nodes=2, settings=["--run.root", "/scratch"], has_ensemble=False)
    assert argvs(launch) == {
        "branches": "sbatch --parsable --job-name=stl-digits --output=runs/digits/logs/%x-%j.out --nodes=2 --ntasks=4 "
        f"slurm/{method}.sbatch configs/digits.yaml --run.root /scratch"
    }


def test_a_store_is_prepared_first() -> None:
    launch = replace(OF_FOUR, settings=["--data.store", "my store"], prepares=True, sbatch=["--partition=gpu"])
    assert argvs(launch) == {
        "prepare": "sbatch --parsable --job-name=stl-digits-prepare --output=runs/digits/logs/%x-%j.out "
        "--partition=gpu --wrap 'exec ${STL:-stl} prepare --config configs/digits.yaml "
        "--data.store '\"'\"'my store'\"'\"''",
        "branches": "sbatch --parsable --dependency=afterok:16 --kill-on-invalid-dep=yes --job-name=stl-digits "
        "--output=runs/digits/logs/%x-%A_%a.out --partition=gpu --array=0-3 slurm/array.sbatch configs/digits.yaml "
        "--data.store 'my store'",
        "ensemble": "sbatch --parsable --dependency=afterany:17 --kill-on-invalid-dep=yes "
        "--job-name=stl-digits-ensemble --output=runs/digits/logs/%x-%j.out --partition=gpu "
        "slurm/ensemble.sbatch runs/digits",
    }


def test_the_ensemble_waits_for_branches_of_earlier_launches_too() -> None:
    again = replace(OF_FOUR, branches=[3, 1])
    assert "--array=1,3 " in argvs(again, ["9"])["branches"]
    assert "--dependency=afterany:9:17 " in argvs(again, ["9"])["ensemble"]
    assert list(argvs(replace(OF_FOUR, branches=[]))) == ["ensemble"]


def test_ranges_of_a_sparse_array() -> None:
    assert as_ranges([3, 9, 7, 8]) == "3,7-9"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("1:30", 90),
        ("2:00:00", 7200),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-00:00:01", 86401),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_time_limits_as_slurm_reads_them(text: str, seconds: float | None) -> None:
    assert limit_s(text) == seconds


@pytest.mark.parametrize("options", ["--time=90", "-t 90", "-t90", "--time 90", "-t 5 --gpus=1 --time=90"])
def test_the_time_limit_among_options(options: str) -> None:
    assert limit_of_options(shlex.split(options)) == 5400
    assert limit_of_options(["--partition=t"]) is None


# --- what was launched is recorded


def test_a_launch_is_read_as_it_was_written(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    first = replace(OF_FOUR, jobs={"branches": "17"}, sbatch=["--time=1"], nodes=2)
    second = replace(OF_FOUR, when=first.when + 1, launcher=Process.of(os.getpid()), workers=[Process(1, 2)])
    for launch in (first, second):
        write_launch(paths, launch)
    assert read_launches(paths) == [first, second]
    first.jobs["ensemble"] = "18"
    write_launch(paths, first)
    assert sorted(len(launch.jobs) for launch in read_launches(paths)) == [0, 2]


def test_only_one_launch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stl_lightning.launch.record.LOCK_S", 0.1)
    with launching(RunPaths(tmp_path)):
        code = (
            "from pathlib import Path; from stl_lightning.launch import record; from stl_lightning import paths\n"
            f"record.LOCK_S = 0.1\nwith record.launching(paths.RunPaths(Path({str(tmp_path)!r}))): pass"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "is submitting; try again" in other.stderr


# --- which branches are launched again


def run_state(*states: str, active: Mapping[int, str] = {}) -> RunState:
    reports = [
        BranchReport(b, state, Status(b), active=(Job(active[b], "running"),) if b in active else ())  # type: ignore[arg-type]
        for b, state in enumerate(states)
    ]
    return RunState(RUN, [OF_FOUR], reports, "missing", Queue())


def test_only_branches_that_nothing_will_train_are_launched_again() -> None:
    state = run_state("finished", "queued", "running", "failed", "lost", "interrupted", "pending")
    assert to_resubmit(state) == [3, 4, 5, 6]


def test_a_lost_branch_whose_array_task_runs_is_left_to_slurm() -> None:
    state = run_state("lost", "lost", active={0: "17_0", 1: "17"})
    assert to_resubmit(state) == [1]
    assert [report.branch for report in held_back(state)] == [0]


# --- the scheduler of this machine


def statuses(**by_state: Sequence[int]) -> dict[int, Status]:
    return {branch: Status(branch, state) for state, branches in by_state.items() for branch in branches}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "ended", "n_failures", "again"),
    [
        (0, statuses(finished=[0, 1]), {}, []),
        (-9, statuses(running=[0, 1, 2, 3]), {}, [[0, 1], [2, 3]]),
        (-9, statuses(finished=[0, 1], running=[2]), {}, [[2]]),
        (-9, statuses(running=[2]), {2: 2}, [[2]]),
        (-9, statuses(running=[2]), {2: 3}, []),
        (1, statuses(finished=[0], failed=[1, 2]), {1: 1, 2: 3}, [[1]]),  # each alone, as long as it may
        (1, statuses(pending=[0, 1, 2]), {}, [[0, 1], [2]]),  # it ended before any began
        (1, statuses(pending=[0]), {0: 3}, []),
        (75, statuses(finished=[0], interrupted=[1, 2]), {}, [[1, 2]]),
        (2, statuses(pending=[0, 1]), {}, [[0], [1]]),  # one of them is refused, the other may not be
        (2, statuses(pending=[0]), {0: 1}, []),
        (74, statuses(running=[0]), {0: 1}, []),
    ],
)
def test_how_branches_go_on_after_their_worker(
    code: int, ended: dict[int, Status], n_failures: dict[int, int], again: list[list[int]]
) -> None:
    assert to_try_again(code, ended, dict.fromkeys(ended, 0) | n_failures, retries=2) == again


@pytest.mark.parametrize(
    ("ended", "n_failures", "again"),
    [
        ({"running": [0, 1, 2]}, {}, [[0, 1, 2]]),
        ({"finished": [0, 1]}, {}, []),  # it was killed as it left
        ({"running": [0, 1], "failed": [2]}, {2: 1}, [[0, 1], [2]]),
        ({"running": [0, 1], "failed": [2]}, {2: 3}, [[0, 1]]),
    ],
)
def test_a_group_that_is_killed_once_goes_on_whole(
    ended: dict[str, list[int]], n_failures: dict[int, int], again: list[list[int]]
) -> None:
    of = statuses(**ended)
    assert to_try_again(-9, of, dict.fromkeys(of, 0) | n_failures, retries=2, was_killed=False) == again


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("n_workers", [1, 3, 16])
def test_every_branch_is_in_one_group(size: int, n_workers: int) -> None:
    groups = first_groups(range(size), n_workers)
    assert sorted(branch for group in groups for branch in group) == list(range(size))
    assert len(groups) == min(size, n_workers)
    assert max(map(len, groups)) - min(map(len, groups)) <= 1


def test_a_group_that_is_killed_again_and_again_comes_down_to_single_branches() -> None:
    """However large it was; only then does a killed process count as the failure of a branch."""
    waiting, n_lost = [list(range(13))], 0
    while any(len(group) > 1 for group in waiting):
        group = next(group for group in waiting if len(group) > 1)
        waiting.remove(group)
        waiting += to_try_again(-9, statuses(running=group), dict.fromkeys(group, 0), retries=0)
        n_lost += 1
    assert sorted(waiting) == [[branch] for branch in range(13)]
    assert n_lost == 12


def test_the_variables_of_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stl_lightning.launch.local.n_cores", lambda: 8)
    monkeypatch.setattr("stl_lightning.launch.local._gpus", lambda: ["0", "1"])
    outer = {"PATH": "/bin", "SLURM_JOB_ID": "9", "SLURM_CONF": "/etc/slurm.conf"}
    environ = worker_environ(outer, "local-1-2", slot=3, n_workers=3)
    assert environ == {
        "PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "STL_JOB": "local-1-2", "OMP_NUM_THREADS": "2",
        "CUDA_VISIBLE_DEVICES": "1",
    }  # fmt: skip
    asked = worker_environ(outer | {"OMP_NUM_THREADS": "5", "CUDA_VISIBLE_DEVICES": "6,7,4"}, "local-1-2", 1, 3)
    assert (asked["OMP_NUM_THREADS"], asked["CUDA_VISIBLE_DEVICES"]) == ("5", "7")
    assert worker_environ(outer | {"CUDA_VISIBLE_DEVICES": ""}, "local-1-2", 1, 3)["CUDA_VISIBLE_DEVICES"] == ""
