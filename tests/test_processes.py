"""Real processes: torchrun against one process, no sockets while training, a rank killed in mid-epoch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.paths import RunPaths

CHECKOUT = Path(__file__).resolve().parent.parent
DIGITS = CHECKOUT / "configs" / "digits.yaml"

# Each rank has one thread here, `stl run` two, and stacks its branches: sums are taken in another order. Where a
# gradient is almost zero, Adam turns its rounding into a whole step; so in 64 bits, where 30 epochs stay below this.
PRECISION = "--trainer.precision=64-true"
TOLERANCE = 1e-6

pytestmark = pytest.mark.slow


def command(launcher: list[str], name: str, root: Path, *overrides: str) -> list[str]:
    return [*launcher, "-m", "stl_lightning", name, "--config", str(DIGITS), "--run.root", str(root), *overrides]


def start(args: list[str], log: Path, **environ: str) -> subprocess.Popen[bytes]:
    env = os.environ | {"PYTHONPATH": str(CHECKOUT)} | environ
    return subprocess.Popen(args, env=env, stdout=log.open("wb"), stderr=subprocess.STDOUT)


def weights(root: Path, branch: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(RunPaths(root / "digits").branch(branch).last)["state_dict"]


def sockets(process: psutil.Process) -> list[str]:
    """Network connections of a process, without the Unix sockets that never leave the machine."""
    try:
        return [str(connection) for connection in process.net_connections("inet")]
    except psutil.NoSuchProcess:
        return []


class Watched:
    """torchrun with four ranks, and every network socket that a rank was seen with while it trained."""

    def __init__(self, root: Path) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=4"]
        agent = start(command(launcher, "fit", root, PRECISION), root / "log.txt", OMP_NUM_THREADS="1")
        self.seen: list[str] = []
        self.n_looks = 0
        while agent.poll() is None:
            for rank in psutil.Process(agent.pid).children():
                self.seen += sockets(rank)
                self.n_looks += 1
            time.sleep(0.2)
        self.exit_code = agent.returncode
        self.log = (root / "log.txt").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def torchrun(folder: Path) -> Watched:
    (folder / "torchrun").mkdir()
    return Watched(folder / "torchrun")


@pytest.fixture(scope="module")
def one_process(folder: Path) -> Path:
    root = folder / "one"
    root.mkdir()
    process = start(command([sys.executable], "run", root, PRECISION), root / "log.txt", OMP_NUM_THREADS="2")
    assert process.wait(300) == 0, (root / "log.txt").read_text()
    return root


def test_torchrun_trains_every_branch(torchrun: Watched, folder: Path) -> None:
    assert torchrun.exit_code == 0, torchrun.log
    for branch in range(4):
        paths = RunPaths(folder / "torchrun" / "digits").branch(branch)
        status = json.loads(paths.status.read_text())
        assert status["state"] == "finished"
        assert status["traffic"]["bytes_sent"] in (0, None)  # None where this system does not tell
    assert torchrun.log.count("finished") == 4


def test_no_rank_opens_a_socket(torchrun: Watched) -> None:
    assert torchrun.n_looks > 20
    assert torchrun.seen == []


def test_the_watch_would_see_a_socket() -> None:
    """The check above can fail: a process group of one rank listens on a port."""
    code = (
        "import os, torch, time; os.environ |= {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '0'};"
        "torch.distributed.init_process_group('gloo', rank=0, world_size=1); print('up', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert sockets(psutil.Process(process.pid))
    finally:
        process.kill()
        process.communicate()


def test_torchrun_and_one_process_train_the_same_weights(torchrun: Watched, one_process: Path, folder: Path) -> None:
    for branch in range(4):
        ours, theirs = weights(one_process, branch), weights(folder / "torchrun", branch)
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=TOLERANCE, atol=TOLERANCE)


def test_both_ensembles_have_the_same_test_accuracy(torchrun: Watched, one_process: Path, folder: Path) -> None:
    args = [sys.executable, "-m", "stl_lightning", "ensemble", str(folder / "torchrun" / "digits")]
    subprocess.run(args, check=True, cwd=CHECKOUT, capture_output=True)
    results = [json.loads(RunPaths(root / "digits").results.read_text()) for root in (one_process, folder / "torchrun")]
    assert results[0]["ensemble"]["accuracy"] == results[1]["ensemble"]["accuracy"] > 0.93
    assert results[0]["ensemble"]["accuracy"] > results[0]["highest"]


def test_a_rank_killed_in_mid_epoch_resumes_to_the_same_bits(torchrun: Watched, folder: Path) -> None:
    """36 steps an epoch, a checkpoint every 5 steps: SIGKILL comes as soon as there is one."""
    root = folder / "killed"
    root.mkdir()
    branch = RunPaths(root / "digits").branch(2)
    args = command([sys.executable], "fit", root, PRECISION, "--run.branches=[2]", "--run.checkpoint_every_n_steps=5")
    process = start(args, root / "log.txt", OMP_NUM_THREADS="1")
    deadline = time.monotonic() + 120
    while not branch.last.exists():
        assert process.poll() is None, (root / "log.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert json.loads(branch.status.read_text())["state"] == "running"

    again = start(args, root / "log2.txt", OMP_NUM_THREADS="1")
    assert again.wait(300) == 0, (root / "log2.txt").read_text()
    resumed, undisturbed = weights(root, 2), weights(folder / "torchrun", 2)
    for name in undisturbed:
        assert torch.equal(resumed[name], undisturbed[name]), name
    assert json.loads(branch.status.read_text())["attempt"] == 2


def test_an_array_task_trains_the_branch_of_its_number(folder: Path) -> None:
    root = folder / "array"
    root.mkdir()
    args = command([sys.executable], "fit", root, "--trainer.max_epochs=1")
    process = start(args, root / "log.txt", SLURM_ARRAY_TASK_ID="3", SLURM_JOB_ID="17", SLURM_NTASKS="1")
    assert process.wait(120) == 0, (root / "log.txt").read_text()
    assert [path.name for path in (root / "digits" / "branches").iterdir()] == ["03"]
