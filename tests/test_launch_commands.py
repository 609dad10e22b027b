"""`stl launch`, `resubmit` and `cancel` on a SLURM that only takes notes."""

import functools
import json
import os
import shlex
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_launch import CHECKOUT, DIGITS, Submitted

from stl_lightning.__main__ import main
from stl_lightning.exits import DONE, FAILED, REFUSED
from stl_lightning.launch.cancel import cancel_run
from stl_lightning.launch.compose import Submission
from stl_lightning.launch.record import METHODS, Launch, Process, read_launches, write_launch
from stl_lightning.launch.submit import this_stl
from stl_lightning.paths import RunPaths, write_json
from stl_lightning.status import Status, read_status, write_status


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
    write_json(RunPaths(tmp_path / "digits").results, {"missing": [2]})
    assert main(["status", str(tmp_path / "digits")]) == FAILED
    assert "ensemble: partial; `stl resubmit" in capsys.readouterr().out
    assert main(["resubmit", str(tmp_path / "digits")]) == DONE
    assert [call[-1] for call in slurm.called()] == [str(tmp_path / "digits")]
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
