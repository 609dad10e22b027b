"""The templates of `slurm/` on a real SLURM of four nodes: training, leaving when asked, a lost node, wrong use."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cluster import Cluster, poll
from cluster_config import free_ports

from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.exits import INTERRUPTED, REFUSED
from stl_lightning.paths import RunPaths
from stl_lightning.status import read_status

CHECKOUT = Path(__file__).resolve().parent.parent
TEMPLATES = CHECKOUT / "slurm"
DIGITS = "configs/digits.yaml"
PATIENCE_S = 300.0

# What each is for, in this cluster: branches of the digits in tasks that take a CPU each.
TRAINING = {
    "array": ["--array=0-3", "--exclusive"],  # a task on each node
    "srun": ["--nodes=2", "--ntasks=4"],
    "torchrun": ["--nodes=2", "--ntasks=4"],
}
# One process trains all branches stacked, another one alone: in 32 bits Adam amplifies the difference in rounding.
SETTINGS = ["--trainer.precision=64-true"]
# The array is interrupted: its branches save after every step, so that they have something to go on from.
ALSO = {"array": ["--run.checkpoint_every_s=0"]}
N_BRANCHES = 4
REQUEUED, CUT_OFF = 1, 2  # branches of the array, and what happens to them


# --- without a cluster


def test_every_template_is_known_here() -> None:
    assert {path.stem for path in TEMPLATES.iterdir()} == {*TRAINING, "ensemble"}


@pytest.mark.parametrize("template", [*TRAINING, "ensemble"])
def test_shellcheck_finds_nothing(template: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck on PATH: apt-get install shellcheck")
    checked = subprocess.run(["shellcheck", TEMPLATES / f"{template}.sbatch"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_what_the_templates_share_is_the_same() -> None:
    """sbatch copies a script, so they cannot share a file: what happens after the training is in each of them."""
    tails = {(TEMPLATES / f"{name}.sbatch").read_text().partition("code=$?\n")[2] for name in TRAINING}
    assert len({tail.replace("$SLURM_JOB_ID", "$job") for tail in tails}) == 1
    assert all("scontrol requeue" in tail for tail in tails)


JOB = {"SLURM_JOB_ID": "7", "STL": "true", "TORCHRUN": "true"}
TASK = JOB | {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
WRONG_USES = [
    ("array", {}, [DIGITS], "expected to be a task of a job array"),
    ("array", JOB, [DIGITS], "expected to be a task of a job array"),
    ("array", TASK, [], "expected a config file"),
    ("array", TASK, ["nothing.yaml"], "cannot read the config nothing.yaml from "),
    ("array", TASK | {"STL": "no-such-stl"}, [DIGITS], "no command no-such-stl on PATH"),
    ("torchrun", JOB | {"TORCHRUN": "no-such-torchrun"}, [DIGITS], "no command no-such-torchrun on PATH"),
    ("torchrun", JOB | {"SLURM_GPUS_PER_TASK": "1"}, [DIGITS], "--gpus-per-node"),
    ("ensemble", {}, ["runs/digits"], "expected to be a job of SLURM"),
    ("ensemble", JOB, [], "expected the folder of a run"),
    ("ensemble", JOB, ["nothing"], "no run in nothing"),
    *[
        (name, environ, args, message)
        for name in ("srun", "torchrun")
        for environ, args, message in (
            ({}, [DIGITS], "expected to be a job of SLURM"),
            (TASK, [DIGITS], "which slurm/array.sbatch is for"),
            (JOB, [], "expected a config file"),
            (JOB, ["nothing.yaml"], "cannot read the config nothing.yaml from "),
            (JOB | {"STL": "no-such-stl"}, [DIGITS], "no command no-such-stl on PATH"),
        )
    ],
]


@pytest.mark.parametrize(("template", "environ", "args", "message"), WRONG_USES)
def test_wrong_use_is_refused_with_the_usage(
    template: str, environ: dict[str, str], args: list[str], message: str
) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STL"))}
    script = ["bash", TEMPLATES / f"{template}.sbatch", *args]
    refused = subprocess.run(script, env=clean | environ, cwd=CHECKOUT, capture_output=True, text=True)
    assert refused.returncode == REFUSED
    assert refused.stderr.startswith(f"{template}.sbatch: ")
    assert message in refused.stderr
    assert "usage: sbatch --" in refused.stderr


@pytest.mark.parametrize("template", TRAINING)
@pytest.mark.parametrize(
    ("code", "state", "restarts", "requeued"),
    [
        (75, "RUNNING None", "", True),
        (75, "COMPLETING TimeLimit", "2", True),
        (75, "RUNNING None", "3", False),  # as often as it may
        (75, "COMPLETING None", "", False),  # cancelled, or requeued by SLURM
        (75, "", "", False),
        (1, "RUNNING None", "", False),
        (0, "RUNNING None", "", False),
    ],
)
def test_who_puts_himself_into_the_queue_again(
    template: str, code: int, state: str, restarts: str, requeued: bool, tmp_path: Path
) -> None:
    commands = {"srun": f"exit {code}", "squeue": f"echo {state}", "scontrol": f'echo "$@" >{tmp_path}/requeued'}
    for name, what in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{what}\n")
        (tmp_path / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environ |= TASK if template == "array" else JOB | {"SLURM_NNODES": "1"}
    environ |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STL_REQUEUES": "3"}
    environ |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    script = ["bash", TEMPLATES / f"{template}.sbatch", CHECKOUT / DIGITS]
    ended = subprocess.run(script, env=environ, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    job = "7_3" if template == "array" else "7"
    asked = (tmp_path / "requeued").read_text() if (tmp_path / "requeued").exists() else None
    assert asked == (f"requeue {job}\n" if requeued else None)
    assert ("time limit too short" in ended.stderr) == (restarts == "3")


# --- with a command that stands for `stl`: what is started where, and what a signal does


@dataclass
class Fake:
    """A command that notes what it was started with, and saves when it is asked to leave."""

    folder: Path

    @property
    def command(self) -> Path:
        return self.folder / "stl"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def stop(self) -> Path:
        """Where it is, all end."""
        return self.folder / "stop"

    def lines(self, *words: str) -> list[str]:
        """What it noted, as far as it contains all of the words."""
        noted = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in noted if all(word in line for word in words)]


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Goes on until asked; after a requeue it ends by itself. Rank $FAILS of torchrun fails at once."""
    noted = Fake(tmp_path)
    noted.command.write_text(
        textwrap.dedent(f"""\
        #!{sys.executable} -S
        import os, signal, sys, time

        def note(*what):
            with open({str(noted.log)!r}, "a") as log:
                print(*what, file=log)

        def leave(*_):
            note("asked")
            time.sleep(1)  # to save
            note("left")
            os._exit({INTERRUPTED})

        for asked in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(asked, leave)
        threads, gpus = os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES")
        note("began", f"{{threads=}} {{gpus=}}", *sys.argv[1:])
        if os.environ.get("FAILS") == os.environ.get("RANK", "none"):
            note("failed")
            sys.exit(1)
        while "SLURM_RESTART_COUNT" not in os.environ and not os.path.exists({str(noted.stop)!r}):
            time.sleep(0.1)
        """)
    )
    noted.command.chmod(0o755)
    return noted


@pytest.fixture
def no_jobs(cluster: Cluster) -> Iterator[Cluster]:
    yield cluster
    cluster.reset()


def submit(cluster: Cluster, fake: Fake, template: str, *options: str, **environ: str) -> str:
    script = [TEMPLATES / f"{template}.sbatch", CHECKOUT / DIGITS, "--run.root", "a folder"]
    return cluster.submit(f"--output={fake.folder}/%j.out", *options, *script, env={"STL": str(fake.command)} | environ)


def ask_to_leave(cluster: Cluster, fake: Fake, how: str, job: str) -> None:
    """All the ways in which SLURM asks a job, or all tasks of an array."""
    tasks = [task.get("ArrayJobId", job) + "_" * ("ArrayTaskId" in task) + task.get("ArrayTaskId", "") for task in
             cluster.tasks(job)]  # fmt: skip
    if how == "signal":  # what --signal has sent before the time limit
        cluster.run("scancel", "--signal=USR1", job)
    elif how == "requeue":
        cluster.run("scontrol", "requeue", ",".join(tasks))
    elif how == "preempt":
        node = cluster.tasks(job)[0]["NodeList"]
        cluster.submit("-p", "urgent", "-w", node, "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    else:
        cluster.run("scancel", job)


@pytest.mark.slow
@pytest.mark.parametrize("template", ["array", "srun"])
def test_asked_to_leave_a_job_requeues_once_unless_cancelled(template: str, fake: Fake, no_jobs: Cluster) -> None:
    cluster = no_jobs
    sizes = {"array": ["--array=4,7"], "srun": ["--nodes=1", "--ntasks=2"]}[template]
    ways = dict(zip(("signal", "requeue", "preempt", "cancel"), ("n1", "n2", "n3", "n4"), strict=True))
    jobs = {how: submit(cluster, fake, template, *sizes, f"--nodelist={node}") for how, node in ways.items()}
    poll(lambda: len(fake.lines("began")) == 2 * len(ways), "all began", 60)
    for how, job in jobs.items():
        ask_to_leave(cluster, fake, how, job)
    ended = {how: cluster.wait(job, 90) for how, job in jobs.items()}
    restarts = {how: {task["Restarts"] for task in cluster.tasks(job)} for how, job in jobs.items()}
    assert ended == dict.fromkeys(ways, "COMPLETED") | {"cancel": "CANCELLED"}
    assert restarts == {how: {"1"} for how in ways} | {"cancel": {"0"}}
    assert (len(fake.lines("began")), len(fake.lines("left"))) == (2 * 4 + 2 * 3, 2 * 4)


@pytest.mark.slow
def test_torchrun_lets_its_ranks_save_and_the_job_requeues_once(fake: Fake, no_jobs: Cluster) -> None:
    job = submit(no_jobs, fake, "torchrun", "--nodes=2", "--ntasks=3")
    poll(lambda: len(fake.lines("began")) == 3, "all ranks began", 120)
    ask_to_leave(no_jobs, fake, "signal", job)
    assert no_jobs.wait(job, PATIENCE_S) == "COMPLETED"
    assert [task["Restarts"] for task in no_jobs.tasks(job)] == ["1"]
    assert (len(fake.lines("began")), len(fake.lines("left"))) == (6, 3)


@pytest.mark.slow
def test_the_ranks_of_a_node_save_though_only_their_elders_are_signalled(fake: Fake) -> None:
    """SLURM may signal a task's first process alone; the agent must not end the ranks, that it hears of it or not."""
    step = {"SLURM_STEP_ID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1"}
    environ = os.environ | step | {"N_RANKS": "3", "PORT": str(free_ports(1)[0]), "OMP_NUM_THREADS": "1"}
    environ |= {"TORCHRUN": f"{sys.executable} -m torch.distributed.run", "FAILS": "1"}
    # In a group with its agent; each rank makes a group of its own.
    node = subprocess.Popen(["bash", TEMPLATES / "torchrun.sbatch", fake.command], env=environ, start_new_session=True)
    try:
        poll(lambda: fake.lines("failed") and len(fake.lines("began")) == 3, "all began, one failed", 120)
        time.sleep(1)  # for the agent to notice
        assert not fake.lines("asked"), "a rank that fails leaves the others alone"
        for number in (signal.SIGUSR1, signal.SIGTERM):  # before the time limit, and a preemption while they save
            os.killpg(node.pid, number)
            time.sleep(0.2)
        assert node.wait(60) == INTERRUPTED
        assert len(fake.lines("left")) == 2
    finally:
        fake.stop.touch()
        node.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "options", "gpus"),
    [
        ("array", ["--array=0-1", "--gpus-per-task=1"], ["0", "1"]),
        ("array", ["--array=0-1"], [None, None]),
        ("srun", ["--nodes=1", "--ntasks=2", "--gpus-per-task=1"], ["0", "1"]),
        ("srun", ["--nodes=1", "--ntasks=2", "--gpus-per-node=2"], ["0,1", "0,1"]),
    ],
)
def test_tasks_get_what_the_job_asked_for(
    template: str, options: list[str], gpus: list[str | None], fake: Fake, no_jobs: Cluster
) -> None:
    submit(no_jobs, fake, template, "--nodelist=n1", "--cpus-per-task=2", *options, STL_RETRIES="5")
    poll(lambda: len(fake.lines("began")) == 2, "both began", 60)
    args = f"fit --retries 5 --trainer.enable_progress_bar=false --config {CHECKOUT / DIGITS} --run.root a folder"
    assert sorted(fake.lines("began")) == [f"began threads='2' gpus={visible!r} {args}" for visible in gpus]


# --- real training


@dataclass
class Trained:
    """The runs of all templates, as jobs: of the branches, and of the ensemble that follows by dependency."""

    cluster: Cluster
    folder: Path
    jobs: dict[str, str]
    ensembles: dict[str, str]
    dead_node: str | None

    def run(self, template: str) -> RunPaths:
        """Its run, once the ensemble is there."""
        ended = self.cluster.wait(self.jobs[template], PATIENCE_S), self.cluster.wait(self.ensembles[template], 60)
        assert ended == ("COMPLETED", "COMPLETED"), self.logs(template)
        return RunPaths(self.folder / template / "digits")

    def logs(self, template: str) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(self.folder.glob(f"{template}*.out")))


def submit_training(cluster: Cluster, folder: Path, template: str, *options: str) -> tuple[str, str]:
    common = [f"--output={folder}/{template}-%x-%a.out", *options]
    job = cluster.submit(
        *common, *TRAINING[template], f"slurm/{template}.sbatch", DIGITS, f"--run.root={folder / template}", *SETTINGS,
        *ALSO.get(template, []), cwd=CHECKOUT,
    )  # fmt: skip
    run = folder / template / "digits"
    return job, cluster.submit(*common, f"--dependency=afterany:{job}", "slurm/ensemble.sbatch", run, cwd=CHECKOUT)


@pytest.fixture(scope="module")
def trained(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """Starts everything; a task of the array is requeued and the node of another loses power while they train."""
    folder = tmp_path_factory.mktemp("templates")
    jobs, ensembles = {}, {}
    jobs["array"], ensembles["array"] = submit_training(cluster, folder, "array")
    branches = [RunPaths(folder / "array" / "digits").branch(branch) for branch in range(N_BRANCHES)]
    poll(branches[REQUEUED].last.exists, "a checkpoint", PATIENCE_S)
    cluster.run("scontrol", "requeue", f"{jobs['array']}_{REQUEUED}")
    poll(branches[CUT_OFF].last.exists, "a checkpoint", PATIENCE_S)
    dead_node = read_status(branches[CUT_OFF], CUT_OFF).host if cluster.mode == "namespaces" else None
    if dead_node:
        cluster.power_off(dead_node)
    elsewhere = [f"--exclude={dead_node}"] if dead_node else []
    for template in ("srun", "torchrun"):
        jobs[template], ensembles[template] = submit_training(cluster, folder, template, *elsewhere)
    yield Trained(cluster, folder, jobs, ensembles, dead_node)
    cluster.reset()


@pytest.fixture(scope="module")
def one_machine(trained: Trained) -> RunPaths:
    root = trained.folder / "one"
    trained.cluster.run(
        "stl", "run", "--config", DIGITS, f"--run.root={root}", *SETTINGS, cwd=CHECKOUT, timeout_s=PATIENCE_S
    )
    return RunPaths(root / "digits")


def ensemble(run: RunPaths) -> dict[str, float]:
    results = json.loads(run.results.read_text())
    assert len(results["members"]) == N_BRANCHES
    return results["ensemble"]


def weights(run: RunPaths, branch: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.branch(branch).last)["state_dict"]


@pytest.mark.slow
@pytest.mark.parametrize("template", ["srun", "torchrun", "array"])
def test_every_template_is_as_accurate_as_one_machine(template: str, trained: Trained, one_machine: RunPaths) -> None:
    accuracy = ensemble(trained.run(template))["accuracy"]
    assert accuracy == ensemble(one_machine)["accuracy"]
    assert accuracy > 0.9


@pytest.mark.slow
def test_a_requeued_task_ends_with_the_weights_of_an_undisturbed_one(trained: Trained) -> None:
    array, undisturbed = trained.run("array"), trained.run("srun")
    assert read_status(array.branch(REQUEUED), REQUEUED).attempt == 2, "it had finished before it was requeued"
    assert read_status(undisturbed.branch(REQUEUED), REQUEUED).attempt == 1
    for branch in range(N_BRANCHES):
        expected = weights(undisturbed, branch)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(array, branch).items())


@pytest.mark.slow
def test_a_power_cut_costs_only_the_branch_of_that_node(trained: Trained) -> None:
    if trained.dead_node is None:
        pytest.skip("power_off needs nodes with namespaces of their own (root, unshare and ip)")
    array = trained.run("array")
    statuses = [read_status(array.branch(branch), branch) for branch in range(N_BRANCHES)]
    assert [status.attempt for status in statuses] == [1, 2, 2, 1]
    assert trained.dead_node not in [status.host for status in statuses]
    restarts = {task["ArrayTaskId"]: task["Restarts"] for task in trained.cluster.tasks(trained.jobs["array"])}
    assert restarts == {"0": "0", str(REQUEUED): "1", str(CUT_OFF): "1", "3": "0"}
