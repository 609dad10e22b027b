"""`stl launch --local` with real processes: a worker that is killed, a branch that fails, a launcher asked to leave."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stl_lightning.exits import DONE, FAILED, INTERRUPTED, REFUSED, UNFINISHED
from stl_lightning.launch.judge import RunState
from stl_lightning.launch.record import Launch, read_launches
from stl_lightning.launch.state import read_run_state
from stl_lightning.paths import RunPaths

CHECKOUT = Path(__file__).resolve().parent.parent
LONG = ("--trainer.max_epochs=2000", "--run.checkpoint_every_s=1")  # until it is ended
PATIENCE_S = 300.0

pytestmark = pytest.mark.slow


def stl(*args: str | Path, **environ: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stl_lightning", *map(str, args)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(CHECKOUT)} | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*args: str | Path) -> tuple[int, str]:
    process = stl(*args)
    printed = process.communicate(timeout=PATIENCE_S)[0]
    return process.returncode, printed


@contextmanager
def launched(root: Path, *options: str, **environ: str) -> Iterator[subprocess.Popen[str]]:
    """A launch of the digits on two processes, which does not outlive the test."""
    process = stl("launch", "--config", "configs/digits.yaml", "--local=2", "--run.root", root, *options, **environ)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.communicate()
        for worker in last_launch(root).workers:
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGKILL)


def last_launch(root: Path) -> Launch:
    return read_launches(RunPaths(root / "digits"))[-1]


def wait_for(root: Path, wanted: Callable[[RunState], bool]) -> RunState:
    """The state of the run, as soon as it is the one that is wanted."""
    deadline = time.monotonic() + PATIENCE_S
    paths = RunPaths(root / "digits")
    while time.monotonic() < deadline:
        if paths.launch.exists() and wanted(state := read_run_state(paths)):
            return state
        time.sleep(0.1)
    raise TimeoutError(str(read_run_state(paths).counts))


def all_train(state: RunState) -> bool:
    """Every branch runs, and has a checkpoint."""
    has_checkpoint = all(state.paths.branch(report.branch).last.exists() for report in state.branches)
    return len(state.those("running")) == len(state.branches) and has_checkpoint


def test_a_killed_worker_costs_nobody_a_failure(tmp_path: Path) -> None:
    """SIGKILL of one of two workers while all four branches train: its branches go on, and the ensemble is made."""
    with launched(tmp_path, "--trainer.max_epochs=150", "--run.checkpoint_every_s=1") as process:
        wait_for(tmp_path, all_train)
        assert ended("status", tmp_path / "digits")[0] == UNFINISHED
        victim = last_launch(tmp_path).workers[0]
        os.kill(victim.pid, signal.SIGKILL)
        code, said = ended("launch", "--config", "configs/digits.yaml", "--local=2", "--run.root", tmp_path)
        assert (code, "trainer.max_epochs was 150" in said) == (REFUSED, True)
        printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == DONE, printed
    state = read_run_state(RunPaths(tmp_path / "digits"))
    assert (state.counts, state.ensemble, state.exit_code) == ({"finished": 4}, "made", DONE)
    assert [report.status.n_failures for report in state.branches if report.status] == [0, 0, 0, 0]
    assert sorted(report.status.attempt for report in state.branches if report.status) == [1, 1, 2, 2]
    assert "killed by SIGKILL" in printed
    assert len(list(state.paths.logs.glob("*-fit-*"))) == 3  # its branches went on together
    assert "Ens." in printed
    assert json.loads(state.paths.results.read_text())["ensemble"]["accuracy"] > 0.9
    assert "[0,2] branch 0: finished" in printed or "[1,3] branch 1: finished" in printed
    assert ended("resubmit", tmp_path / "digits") == (DONE, "nothing to do: 4 finished; ensemble: made\n")


def test_asked_to_leave_it_saves_and_goes_on_later(tmp_path: Path) -> None:
    """`stl cancel` from another terminal; then `stl resubmit` on this machine, to the end."""
    short = ("--trainer.max_epochs=80", "--run.checkpoint_every_s=1")
    run = tmp_path / "digits"
    with launched(tmp_path, *short) as process:
        wait_for(tmp_path, all_train)
        code, said = ended("resubmit", run)
        assert (code, "is at work already" in said) == (REFUSED, True)
        code, said = ended("cancel", run)
        assert (code, "launcher" in said) == (DONE, True)
        assert "goes on" in process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == INTERRUPTED
    state = read_run_state(RunPaths(run))
    assert set(state.counts) <= {"interrupted", "finished"}
    n_left = len(state.those("interrupted"))
    assert n_left > 0
    code, said = ended("resubmit", run, "--retries=0")
    assert code == DONE, said
    assert last_launch(tmp_path).branches == [report.branch for report in state.those("interrupted")]
    assert read_run_state(RunPaths(run)).exit_code == DONE


def test_an_interrupt_reaches_the_workers_once(tmp_path: Path) -> None:
    """The second SIGINT would end them before they have saved."""
    with launched(tmp_path, *LONG) as process:
        wait_for(tmp_path, all_train)
        workers = last_launch(tmp_path).workers
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    assert process.returncode == INTERRUPTED
    assert not any(worker.is_alive() for worker in workers)
    assert read_run_state(RunPaths(tmp_path / "digits")).counts == {"interrupted": 4}


@pytest.fixture
def fault(tmp_path: Path) -> Callable[[str], list[str]]:
    """`fault("raise 1")`: settings under which branch 1, and no other, ends by an exception or kills its process."""
    (tmp_path / "faults.py").write_text(
        "import os\nfrom lightning.pytorch import Callback\n\n"
        "class Fault(Callback):\n"
        "    def __init__(self, kind: str):\n"
        "        self.kind, self.branch = kind.split()\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        "        if trainer.datamodule.branches == (int(self.branch),) and trainer.current_epoch == 2:\n"
        "            if self.kind == 'kill': os.kill(os.getpid(), 9)\n"
        "            raise ValueError('of branch ' + self.branch)\n"
    )

    def settings(kind: str) -> list[str]:
        return ["--trainer.callbacks+=faults.Fault", f"--trainer.callbacks.kind={kind}", "--trainer.max_epochs=4"]

    return settings


@pytest.mark.parametrize("kind", ["raise", "kill"])
def test_a_branch_that_fails_takes_no_sibling_down(
    kind: str, fault: Callable[[str], list[str]], tmp_path: Path
) -> None:
    environ = {"PYTHONPATH": f"{tmp_path}:{CHECKOUT}"}
    with launched(tmp_path, *fault(f"{kind} 1"), "--retries=1", **environ) as process:
        printed = process.communicate(timeout=PATIENCE_S)[0]
    assert process.returncode == FAILED, printed
    state = read_run_state(RunPaths(tmp_path / "digits"))
    assert [report.state for report in state.branches] == ["finished", "failed", "finished", "finished"]
    assert state.ensemble == "partial"
    failed = state.branches[1].status
    assert failed is not None
    assert failed.n_failures == 2  # the first time, and one retry
    assert "ValueError: of branch 1" in (failed.error or "") if kind == "raise" else "SIGKILL" in (failed.error or "")
    assert ("ensemble" in printed, "given up" in printed) == (True, True)
