"""`stl launch`, `status`, `cancel` and `resubmit` on a real SLURM of four nodes."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import NODES, Cluster

from stl_lightning.exits import DONE, FAILED, REFUSED, UNFINISHED
from stl_lightning.launch.record import METHODS, Launch, read_launches
from stl_lightning.paths import RunPaths

CHECKOUT = Path(__file__).resolve().parent.parent
PATIENCE_S = 300.0

pytestmark = pytest.mark.slow


class Run:
    """A run of the digits, and the commands on it as a user types them on the node that submits jobs."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        self.paths = RunPaths(root / "digits")

    def launch(self, *options: str) -> tuple[int, str]:
        return self("launch", "--config", "configs/digits.yaml", "--run.root", self.root, *options)

    def __call__(self, command: str, *args: str | Path) -> tuple[int, str]:
        env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{self.root}:{CHECKOUT}"}
        done = self.cluster.run("stl", command, *args, cwd=CHECKOUT, env=env, timeout_s=PATIENCE_S, check=False)
        return done.returncode, done.stdout + done.stderr

    def status(self) -> dict[str, Any]:
        code, printed = self("status", self.paths.folder, "--json")
        state: dict[str, Any] = json.loads(printed)
        assert state["exit_code"] == code
        return state

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """What `stl status` said until then, the last one being what was wanted."""
        seen = [self.status()]
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(seen[-1]):
            assert time.monotonic() < deadline, self("status", self.paths.folder)[1] + self.logs()
            time.sleep(0.5)
            seen.append(self.status())
        return seen

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.paths.logs.glob("*")))

    @property
    def last(self) -> Launch:
        return read_launches(self.paths)[-1]


def states(state: dict[str, Any]) -> set[str]:
    return {branch["state"] for branch in state["branches"]}


def is_over(state: dict[str, Any]) -> bool:
    return not states(state) & {"queued", "running"} and state["ensemble"] != "queued"


@pytest.fixture
def run(cluster: Cluster, tmp_path: Path) -> Run:
    return Run(cluster, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_every_branch_and_the_ensemble_follows(method: str, run: Run) -> None:
    nodes = [] if method == "array" else ["--nodes=2"]
    code, said = run.launch("--method", method, *nodes, "--trainer.max_epochs=8", "--sbatch=--time=5")
    assert code == DONE, said
    seen = run.wait_for(is_over)
    assert {"queued", "running"} <= set().union(*map(states, seen)), "of what status said in between"
    running = [branch for state in seen for branch in state["branches"] if branch["state"] == "running"]
    assert all(branch["host"] in NODES or run.cluster.mode == "plain" for branch in running)
    assert all(0 < branch["job_left_s"] <= 300 for branch in running)
    end = seen[-1]
    assert (states(end), end["ensemble"], end["exit_code"]) == ({"finished"}, "made", DONE), run.logs()
    assert {branch["job"] for branch in end["branches"]} == set(run.last.job_names().values())
    assert json.loads(run.paths.results.read_text())["ensemble"]["accuracy"] > 0.8


def test_cancelled_branches_go_on_after_resubmit(run: Run) -> None:
    """They train at a crawl until then: none can finish before it is cancelled, however fast the machine."""
    slow, crawl = run.root / "crawl.py", run.root / "slow"
    slow.write_text(
        "import time\nfrom pathlib import Path\nfrom lightning.pytorch import Callback\n"
        "from stl_lightning.leaving import asked\n\n"
        "class Crawl(Callback):\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        "        until = time.monotonic() + 4\n"
        f"        while Path({str(crawl)!r}).exists() and not asked() and time.monotonic() < until:\n"
        "            time.sleep(0.1)\n"
    )
    crawl.touch()
    options = ["--trainer.max_epochs=40", "--run.checkpoint_every_s=0", "--trainer.callbacks+=crawl.Crawl"]
    code, said = run.launch(*options)
    assert code == DONE, said
    run.wait_for(lambda state: all(branch["state"] == "running" and branch["step"] for branch in state["branches"]))
    code, said = run.launch(*options)
    assert (code, "is at work already" in said, f"jobs {run.last.jobs['branches']}" in said) == (REFUSED, True, True)
    assert run("resubmit", run.paths.folder)[1].startswith("nothing to do: ")
    code, said = run("cancel", run.paths.folder)
    assert (code, f"cancelled job {run.last.jobs['branches']} (branches)" in said) == (DONE, True)
    seen = run.wait_for(is_over)[-1]
    assert states(seen) <= {"interrupted", "lost"}
    assert max(branch["epoch"] for branch in seen["branches"]) > 0
    crawl.unlink()
    assert run("cancel", run.paths.folder) == (DONE, f"{run.paths.folder}: nothing of it is queued or running\n")
    code, said = run("resubmit", run.paths.folder)
    assert code == DONE, said
    assert run.last.branches == [0, 1, 2, 3]
    seen = run.wait_for(is_over)[-1]
    assert (states(seen), seen["exit_code"]) == ({"finished"}, DONE), run.logs()


def test_only_the_branch_that_failed_is_submitted_again(run: Run) -> None:
    """Branch 1 cannot train until the user has mended what is wrong."""
    fault, broken = run.root / "faults.py", run.root / "broken"
    fault.write_text(
        "from pathlib import Path\nfrom lightning.pytorch import Callback\n\n"
        "class Fault(Callback):\n"
        "    def on_train_epoch_end(self, trainer, module):\n"
        f"        if trainer.datamodule.branch == 1 and Path({str(broken)!r}).exists():\n"
        "            raise ValueError('it is broken')\n"
    )
    broken.touch()
    code, said = run.launch("--trainer.callbacks+=faults.Fault", "--trainer.max_epochs=5", "--retries=0")
    assert code == DONE, said
    end = run.wait_for(is_over)[-1]
    assert [branch["state"] for branch in end["branches"]] == ["finished", "failed", "finished", "finished"], run.logs()
    assert (end["ensemble"], end["exit_code"]) == ("partial", FAILED)
    code, said = run("status", run.paths.folder)
    assert "branch 1: ValueError: it is broken" in said.splitlines()
    broken.unlink()
    code, said = run("resubmit", run.paths.folder)
    assert code == DONE, said
    assert run.last.branches == [1]
    assert run.status()["exit_code"] == UNFINISHED
    end = run.wait_for(is_over)[-1]
    assert (states(end), end["ensemble"], end["exit_code"]) == ({"finished"}, "made", DONE), run.logs()
    assert {branch["branch"]: branch["attempt"] for branch in end["branches"]} == {0: 1, 1: 2, 2: 1, 3: 1}


def test_what_slurm_refuses_is_said_in_its_words(run: Run) -> None:
    code, said = run.launch("--sbatch=--partition=nowhere")
    assert code == REFUSED
    assert "sbatch refused the job of the branches" in said
    assert "partition" in said
