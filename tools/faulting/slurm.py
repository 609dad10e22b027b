"""The run on a real SLURM of four nodes: `stl launch`, a branch a task, and `stl resubmit`."""

import json
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faulting.processes import Logged
from faulting.scene import CONFIG, HERE, N_BRANCHES, RETRIES, Rank, Scene

LOOK_EVERY_S = 3.0
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class SlurmScene(Scene):
    """`cluster` is a `Cluster` of tests/cluster.py, which outlives the scene."""

    where = "slurm"
    options = ("--gres=gpu:1",)  # two a node: a fault of a node hits two branches, and two nodes are free
    checkout = str(HERE.parent.parent)

    def __init__(self, folder: Path, rng: random.Random, settings: Sequence[str], cluster: Any) -> None:
        super().__init__(folder, rng, settings)
        self.cluster = cluster
        self.started: list[Logged] = []
        self.nodes_in_use: set[str] = set()
        self.last_look = 0.0
        self.n_stopped = 0
        self.n_released = 0

    def begin(self, *args: str) -> Logged:
        """A command of `stl` on the controller, without waiting for it."""
        log = self.folder / f"{len(self.started):03d}-{args[0]}.log"
        command = [*self.cluster._enter("ctl"), "env", "-C", self.checkout, "stl", *args]
        self.started.append(Logged(subprocess.Popen, command, log, self.cluster.env() | self.ours()))
        return self.started[-1]

    def ours(self) -> dict[str, str]:
        keep = ("PYTHONPATH", "STL_FAULTS", "OMP_NUM_THREADS")
        return {name: value for name, value in self.environ().items() if name in keep}

    def run_stl(self, *args: str) -> tuple[int, str]:
        process = self.begin(*args)
        return process.process.wait(), process.text()

    def start(self) -> None:
        options = ["--no-ensemble", f"--retries={RETRIES}", f"--sbatch={' '.join(self.options)}"]
        self.launch = self.begin("launch", *options, f"--config={CONFIG}", *self.settings)

    def host_of(self, branch: int) -> str:
        return self.status(branch).host

    def rank(self, branch: int) -> Rank | None:
        status = self.status(branch)
        rank = Rank(status.host, status.pid)
        return rank if status.state == "running" and self.lives(rank) else None

    def lives(self, rank: Rank) -> bool:
        return self._on_node(rank.host, "kill", "-0", str(rank.pid))

    def _on_node(self, node: str, *command: str) -> bool:
        if node not in self.cluster._init:
            return False
        return self.cluster.run(*command, node=node, check=False).returncode == 0

    def signal_rank(self, branch: int, number: int) -> bool:
        rank = self.rank(branch)
        return rank is not None and self._on_node(rank.host, "kill", f"-{int(number)}", str(rank.pid))

    def signal_supervisor(self, branch: int, number: int) -> bool:
        rank = self.rank(branch)
        if rank is None:
            return False
        stat = self.cluster.run("cat", f"/proc/{rank.pid}/stat", node=rank.host, check=False).stdout
        parent = stat.rpartition(")")[2].split()[1:2]
        return bool(parent) and self._on_node(rank.host, "kill", f"-{int(number)}", parent[0])

    def ranks_on(self, node: str) -> dict[int, tuple[Rank, int]]:
        """The branches that a node trains: their ranks and attempts."""
        ranks = {branch: self.rank(branch) for branch in range(N_BRANCHES)}
        return {b: (rank, self.attempt(b)) for b, rank in ranks.items() if rank is not None and rank.host == node}

    def n_fenced(self) -> int:
        """How many ranks have found out that they were replaced, by what they printed."""
        logs = self.paths.logs.iterdir() if self.paths.logs.exists() else ()
        return sum(log.read_text(errors="replace").count("stl fit: a newer attempt has taken") for log in logs)

    def steps_on(self, node: str) -> list[str]:
        """The processes by which SLURM watches over jobs on a node."""
        return self.cluster.run("ps", "-C", "slurmstepd", "-o", "pid=", node=node, check=False).stdout.split()

    def resume(self, node: str) -> None:
        """Put a node into service again, unless it has come back by itself."""
        if self.cluster.node_states()[node].startswith(("down", "drain")):
            self.cluster.resume(node)

    def take_node(self, branch: int) -> str | None:
        """The node of a branch, for one fault at a time; at most two at once, so that there are places to go."""
        rank = self.rank(branch)
        if rank is None or rank.host in self.nodes_in_use or len(self.nodes_in_use) >= 2:
            return None
        self.nodes_in_use.add(rank.host)
        return rank.host

    def is_over(self, job: str) -> bool:
        return set(self.cluster.state(job).split(",")) <= OVER

    def judged(self, branch: int) -> tuple[str, float | None]:
        row = self._status()["branches"][branch]
        return row["state"], row["heartbeat_age_s"]

    def _status(self) -> dict[str, Any]:
        try:
            found = self.cluster.run("stl", "status", "--json", str(self.paths.folder), env=self.ours(), check=False)
        except TimeoutError:
            return {"branches": []}
        return json.loads(found.stdout) if found.stdout else {"branches": []}

    def go_on(self) -> None:
        """Resubmit what two looks in a row find at a standstill."""
        now = time.monotonic()
        if not self.launch.is_over() or self.held or now - self.last_look < LOOK_EVERY_S:
            return
        self.last_look = now
        if not self.paths.launch.exists():
            return self.start()  # it did not come as far as to record itself
        self._release()
        states = [row["state"] for row in self._status()["branches"]]
        self.n_stopped = self.n_stopped + 1 if {"failed", "lost", "interrupted", "pending"} & set(states) else 0
        if self.n_stopped > 1:
            self.n_stopped = 0
            self.n_resubmitted += 1
            self.launch = self.begin("resubmit", str(self.paths.folder))

    def _release(self) -> None:
        """Let go what SLURM holds after a start that failed; it waits for somebody to look at the node."""
        queued = self.cluster.run("squeue", "-h", "-r", "-t", "PD", "-o", "%i %r", check=False).stdout.splitlines()
        for job in [line.split()[0] for line in queued if "held" in line]:
            self.n_released += 1
            self.cluster.run("scontrol", "release", job, check=False)

    def close(self) -> None:
        for process in self.started:
            if not process.is_over():
                process.process.kill()
        self.cluster.reset()
