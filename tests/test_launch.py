"""`stl launch`, `stl resubmit` and `stl cancel`: the commands they compose, what they record, what they refuse."""

import functools
import json
import os
import shlex
import stat
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from stl_lightning.__main__ import main
from stl_lightning.exits import DONE, REFUSED
from stl_lightning.launch.again import held_back, to_resubmit
from stl_lightning.launch.cancel import cancel_run
from stl_lightning.launch.compose import Submission, compose, limit_of_options, limit_s
from stl_lightning.launch.judge import BranchReport, RunState
from stl_lightning.launch.local import first_groups, to_try_again, worker_environ
from stl_lightning.launch.record import METHODS, Launch, Process, launching, read_launches, write_launch
from stl_lightning.launch.slurm import Job, Queue
from stl_lightning.launch.submit import this_stl
from stl_lightning.paths import RunPaths, write_json
from stl_lightning.ranges import as_ranges
from stl_lightning.status import Status, read_status, write_status

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


# --- the commands, on a SLURM that only takes notes


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "FakeSlurm":
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(CHECKOUT)
    return FakeSlurm(tmp_path)


class FakeSlurm:
    """`sbatch` and `scancel` that note how they were called, `squeue` that answers what it is told to."""

    def __init__(self, folder: Path) -> None:
        self.notes, self.queue = folder / "notes", folder / "queue.json"
        (folder / "bin").mkdir()
        note = f"{{{{ printf '%s\\037' {{name}} \"$@\"; echo; }}}} >> {self.notes}"
        number = f'n=$(cat {folder}/n 2>/dev/null || echo 16); n=$((n + 1)); echo $n > {folder}/n; echo "$n;cluster"'
        self.write(folder / "bin" / "sbatch", f"{note.format(name='sbatch')}\n{number}")
        self.write(folder / "bin" / "scancel", note.format(name="scancel"))
        self.write(folder / "bin" / "squeue", f"cat {self.queue}")
        self.answer()

    @staticmethod
    def write(path: Path, script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answer(self, *waiting: int) -> None:
        """From now on, these jobs are waiting and SLURM knows no other."""
        rows = [{"job_id": job, "job_state": "PENDING", "array_job_id": 0, "time_limit": 1} for job in waiting]
        self.queue.write_text(json.dumps({"jobs": rows}))

    def called(self) -> Submitted:
        """How it was called since the last time."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.rstrip("\037").split("\037") for line in lines]


def digits(root: Path, *options: str) -> list[str]:
    return ["launch", "--config", DIGITS, "--run.root", str(root), *options]


def test_a_launch_is_submitted_and_recorded(slurm: FakeSlurm, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert main(digits(root, "--sbatch", "--time=5 --partition=cpu", "--retries", "1")) == DONE
    branches, ensemble = slurm.called()
    assert branches[-5:] == ["--array=0-3", "slurm/array.sbatch", DIGITS, "--run.root", str(root)]
    assert {"--time=5", "--partition=cpu"} <= set(branches) & set(ensemble)
    assert "--dependency=afterany:17" in ensemble
    (recorded,) = read_launches(RunPaths(root / "digits"))
    assert recorded.jobs == {"branches": "17", "ensemble": "18"}
    assert (recorded.n_branches, recorded.retries, recorded.sbatch) == (4, 1, ["--time=5", "--partition=cpu"])
    assert (root / "digits" / "logs").is_dir()


def test_the_dry_run_prints_what_would_be_submitted(
    slurm: FakeSlurm, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Printed and copied into a shell, it makes the same calls."""
    root = tmp_path / "my runs"
    args = digits(root, "--sbatch=--comment='a b'", "--data.store", str(tmp_path / "store"))
    assert main([*args, "--dry-run"]) == DONE
    script = capfd.readouterr().out
    assert (slurm.called(), root.exists()) == ([], False)
    subprocess.run(["bash", "-eu", "-c", script], check=True, capture_output=True, cwd=CHECKOUT)
    by_hand = slurm.called()
    (tmp_path / "n").unlink()
    assert main(args) == DONE
    assert slurm.called() == by_hand
    assert len(by_hand) == 3


@pytest.mark.parametrize("method", [method for method in METHODS if method != "array"])
def test_nodes_are_for_methods_that_divide_branches_over_them(
    method: str, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path, "--method", method, "--nodes=5")) == REFUSED
    assert "--nodes: expected 1 to 4" in capsys.readouterr().err
    assert main(digits(tmp_path, "--method", method)) == REFUSED
    assert main(digits(tmp_path, "--nodes=2")) == REFUSED
    assert slurm.called() == []


WRONG = {
    "an unknown method": (["--method", "sge"], "expected one of: array, srun, torchrun"),
    "a setting out of range": (["--data.val_size=5000"], "data.val_size"),
    "a network that does not fit": (
        ["--model.network=stl_lightning.networks.MLP", "--model.network.init_args.width=0"],
        "width",
    ),
    "another transform that is none": (["--data.transform=fft"], "data.transform"),
    "an own option of sbatch": (["--sbatch=--array=0-7"], "--sbatch"),
    "a quote that is not closed": (["--sbatch=--comment='x"], "--sbatch"),
    "one of its letters": (["--sbatch=-N2"], "--sbatch"),
    "two configs": (["--config", "other.yaml"], "--config"),
    "branches of one process": (["--run.branches=[1]"], "run.branches"),
    "no retries": (["--retries=-1"], "--retries"),
    "SLURM options without SLURM": (["--local=2", "--sbatch=--time=5"], "--sbatch"),
    "no processes": (["--local=0"], "--local"),
    "an augmentation that a store does not take": (
        ["--data.store=none", "--data.augment.flip=true", "--data.transform=dct"],
        "flip",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found_before_anything_is_queued(
    name: str, slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, named = WRONG[name]
    try:
        code = main(digits(tmp_path / "runs", *options))
    except SystemExit as left:  # jsonargparse, of a setting that it does not know
        code = left.code if isinstance(left.code, int) else 1
    assert code == REFUSED
    assert named in capsys.readouterr().err
    assert (slurm.called(), (tmp_path / "runs").exists()) == ([], False)


def test_without_sbatch_it_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(CHECKOUT)
    assert main(digits(tmp_path)) == REFUSED
    said = capsys.readouterr().err
    assert f"no sbatch on PATH, looked for in {tmp_path}" in said
    assert "--local" in said


def test_an_accelerator_that_only_the_nodes_have(slurm: FakeSlurm, tmp_path: Path) -> None:
    assert main(digits(tmp_path, "--trainer.accelerator=gpu")) == DONE


def test_a_run_that_is_queued_is_not_launched_again(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    rows = {"job_id": 17, "job_state": "PENDING", "array_job_id": 17, "array_task_string": "0-3", "array_task_id": None}
    slurm.queue.write_text(json.dumps({"jobs": [rows]}))
    assert main(digits(tmp_path)) == REFUSED
    said = capsys.readouterr().err
    assert "4 of 4 branches run or are queued" in said
    assert "launched by" in said
    assert "jobs 17, 18" in said
    assert slurm.called() == []


def end(root: Path, branch: int, state: str, **fields: object) -> None:
    """As if a branch had ended in job 17."""
    paths = RunPaths(root / "digits")
    status = Status(branch, state, 1, host="another", job=f"17_{branch}", **fields)  # type: ignore[arg-type]
    write_status(paths.branch(branch), status)
    paths.branch(branch).best.touch()
    write_json(paths.run_json, {"id": "a", "hash": "b", "settings": agreement(root)})


@functools.cache
def agreement(root: Path) -> dict[str, object]:
    from stl_lightning.cli.config import SpectralCLI

    return SpectralCLI([f"--config={DIGITS}", f"--run.root={root}"], "test").data.agreement()


def test_only_what_is_missing_is_submitted_again(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(digits(tmp_path, "--sbatch=--time=5 --partition=cpu", "--retries=1")) == DONE
    slurm.called()
    capsys.readouterr()
    end(tmp_path, 1, "finished")
    end(tmp_path, 3, "failed", n_failures=2, epoch_s=400.0)
    monkeypatch.chdir(tmp_path)  # the run knows where its config is
    assert main(["resubmit", "digits", "--dry-run"]) == DONE
    assert capsys.readouterr().out.startswith(f"cd {CHECKOUT}\n")
    assert main(["resubmit", "digits", "--retries", "3"]) == DONE
    assert "limit of a job is 300 s, and an epoch took 400 s" in capsys.readouterr().err
    branches, ensemble = slurm.called()
    assert branches[-5:] == ["--array=0,2-3", "slurm/array.sbatch", DIGITS, "--run.root", str(tmp_path)]
    assert {"--time=5", "--partition=cpu"} <= set(branches)
    assert ensemble[-1] == str(tmp_path / "digits")
    assert [launch.retries for launch in read_launches(RunPaths(tmp_path / "digits"))] == [1, 3]


def test_when_all_is_done_nothing_is_submitted(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    for branch in range(4):
        end(tmp_path, branch, "finished")
    assert main(["resubmit", str(tmp_path / "digits")]) == DONE
    assert [call[-1] for call in slurm.called()] == [str(tmp_path / "digits")]  # the ensemble alone was missing
    write_json(RunPaths(tmp_path / "digits").results, {})
    capsys.readouterr()
    assert main(["resubmit", str(tmp_path / "digits")]) == DONE
    assert capsys.readouterr().out == "nothing to do: 4 finished; ensemble: made\n"
    assert slurm.called() == []


def test_options_per_node_are_named_when_tasks_follow(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank of four on a node had a fourth of its GPUs; a task of an array would have them all."""
    options = ("--method=srun", "--nodes=2", "--sbatch=--gpus-per-node=4")
    assert main(digits(tmp_path, *options)) == DONE
    end(tmp_path, 0, "failed", n_failures=3)
    for branch in range(1, 4):
        end(tmp_path, branch, "finished")
    capsys.readouterr()
    assert main(["resubmit", str(tmp_path / "digits"), "--dry-run"]) == DONE
    assert "--gpus-per-node=4 was given for --method srun" in capsys.readouterr().err
    assert main(["resubmit", str(tmp_path / "digits"), "--dry-run", "--sbatch=--gpus-per-task=1"]) == DONE
    assert "was given for" not in capsys.readouterr().err


def test_a_second_launch_leaves_out_what_has_finished(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    for branch in (0, 2):
        end(tmp_path, branch, "finished")
    assert main(digits(tmp_path)) == DONE
    branches, _ = slurm.called()
    assert "--array=1,3" in branches
    for branch in (1, 3):
        end(tmp_path, branch, "finished")
    capsys.readouterr()
    slurm.answer(20)  # the ensemble's job
    assert main(digits(tmp_path)) == DONE
    assert capsys.readouterr().out == "nothing to do: 4 finished; ensemble: queued\n"
    slurm.answer()
    assert main(digits(tmp_path, "--method=srun", "--nodes=2", "--dry-run")) == DONE
    assert "ensemble.sbatch" in (said := capsys.readouterr().out)
    assert "srun.sbatch" not in said
    write_json(RunPaths(tmp_path / "digits").results, {})
    assert main(digits(tmp_path)) == DONE
    assert capsys.readouterr().out == "nothing to do: 4 finished; ensemble: made\n"
    assert slurm.called() == []


def test_again_over_nodes_takes_all_branches(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Ranks divide all branches, and those that have finished end at once."""
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    end(tmp_path, 1, "finished")
    assert main(["resubmit", str(tmp_path / "digits"), "--method=srun", "--nodes=3"]) == DONE
    branches, _ = slurm.called()
    assert {"--nodes=3", "--ntasks=4", "slurm/srun.sbatch"} <= set(branches)


def test_nothing_is_submitted_while_the_queue_is_unknown(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    slurm.queue.unlink()
    for command in (["resubmit", str(tmp_path / "digits")], digits(tmp_path)):
        assert main(command) == REFUSED
        assert "cannot find out what" in capsys.readouterr().err
    assert slurm.called() == []


def test_an_unreadable_branch_is_named_before_anything_is_queued(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    end(tmp_path, 1, "finished")
    RunPaths(tmp_path / "digits").branch(1).status.write_text("{")
    assert main(["resubmit", str(tmp_path / "digits")]) == REFUSED
    assert "Delete it" in capsys.readouterr().err
    assert slurm.called() == []


def test_jobs_that_slurm_refuses(slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was queued before the refusal is recorded, so that it can be cancelled."""
    refuses = f'case "$*" in *ensemble*) echo "Invalid account" >&2; exit 1;; esac; echo 17 >> {tmp_path}/n; echo 17'
    slurm.write(tmp_path / "bin" / "sbatch", refuses)
    assert main(digits(tmp_path)) == REFUSED
    said = capsys.readouterr().err
    assert "Invalid account" in said
    assert "Jobs 17 are in the queue" in said
    (recorded,) = read_launches(RunPaths(tmp_path / "digits"))
    assert recorded.jobs == {"branches": "17"}
    slurm.write(tmp_path / "bin" / "sbatch", 'echo "error: Invalid job array specification" >&2; exit 1')
    slurm.answer()
    assert main(digits(tmp_path)) == REFUSED
    assert "MaxArraySize" in capsys.readouterr().err


def test_only_jobs_in_the_queue_are_cancelled(
    slurm: FakeSlurm, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(digits(tmp_path)) == DONE
    slurm.called()
    slurm.answer(18)
    assert main(["cancel", str(tmp_path / "digits")]) == DONE
    assert slurm.called() == [["scancel", "18"]]
    assert "cancelled job 18 (ensemble)" in capsys.readouterr().out
    slurm.answer()
    assert main(["cancel", str(tmp_path / "digits")]) == DONE
    assert "nothing of it is queued or running" in capsys.readouterr().out


def test_only_processes_that_were_recorded_are_ended(tmp_path: Path) -> None:
    """A process that has the number of a worker by now, and began at another time, is left alone."""
    paths = RunPaths(tmp_path)
    with subprocess.Popen(["sleep", "60"]) as worker, subprocess.Popen(["sleep", "60"]) as other:
        try:
            ours, theirs = Process.of(worker.pid), replace(Process.of(other.pid), started=1)
            write_launch(paths, Launch("local", DIGITS, launcher=Process(1, 2), workers=[theirs, ours]))
            (line,) = cancel_run(paths)
            assert str(worker.pid) in line
            assert worker.wait(10) == -15
            time.sleep(0.1)
            assert other.poll() is None
            assert cancel_run(paths) == []
        finally:
            worker.kill()
            other.kill()


def test_a_launch_of_another_host_is_named(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    write_launch(paths, Launch("local", DIGITS, host="another", launcher=Process.of(os.getpid())))
    (line,) = cancel_run(paths)
    assert "on another" in line
    assert "call `stl cancel` there" in line


def test_the_jobs_call_the_installation_that_launches_them(tmp_path: Path) -> None:
    """Also one whose environment is not activated; unless the user says how it is called."""
    bin_folder = str(Path(sys.executable).parent)
    assert this_stl({"PATH": f"{bin_folder}:/usr/bin"}) == {}
    assert this_stl({"PATH": "/usr/bin", "STL": "apptainer exec stl.sif stl"}) == {}
    (tmp_path / "stl").symlink_to("/bin/true")  # another installation
    for path in ("/usr/bin", f"{tmp_path}:{bin_folder}"):
        assert this_stl({"PATH": path})["STL"] == f"{sys.executable} -m stl_lightning"


def test_a_submission_quotes_what_a_shell_would_split() -> None:
    command = Submission("branches", ("--comment=a b",), ("slurm/array.sbatch", "$HOME"), "afterok", ("prepare",))
    line = command.as_shell({"prepare": '"$prepare"'})
    assert shlex.split(line)[-3:] == ["--comment=a b", "slurm/array.sbatch", "$HOME"]
    assert '--dependency=afterok:"$prepare"' in line


def test_the_status_of_a_branch_is_left_as_it_was(slurm: FakeSlurm, tmp_path: Path) -> None:
    """Launching again writes nothing into the folders of branches."""
    end(tmp_path, 1, "failed")
    paths = RunPaths(tmp_path / "digits")
    before = read_status(paths.branch(1), 1)
    assert main(digits(tmp_path)) == DONE
    assert read_status(paths.branch(1), 1) == before
