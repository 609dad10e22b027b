"""A real SLURM of four nodes on one machine: one slurmctld, four slurmd, all state in a temporary folder.

    with Cluster() as cluster:
        job = cluster.submit("--array=0-3", "slurm/array.sbatch", "configs/digits.yaml")
        cluster.power_off("n2")
        assert cluster.wait(job) == "COMPLETED"

Where the kernel lets us, the controller and every node have namespaces of their own (pid, mount, uts, ipc, network), so
a power cut or a cut link is the real thing, and `hostname` is the node's name. They share the file system alone, as on
a cluster. The namespaces are anonymous: nothing is named, listens or is mounted outside of them, and any number of
clusters can run side by side. Elsewhere ("plain" mode) the daemons listen on free loopback ports and the nodes share
the machine; methods that need a namespace raise `Unavailable` there.

The daemons live as long as pipes that this process holds: however it ends, they end, and their jobs with them.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster_config import NODES, Mode, write_config
from cluster_nodes import PATH, Nodes, Unavailable, end, namespaces_permitted, poll

UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STAGE_OUT"}
BINARIES = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    absent = [name for name in BINARIES if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} on PATH: apt-get install slurm-wlm munge"
    if not namespaces_permitted() and shutil.which("munged", path=PATH) is None:
        return "no namespaces without root, and no munged to protect a cluster on loopback: apt-get install munge"
    return None


class Cluster(Nodes):
    """Four nodes `n1` to `n4` and a controller `ctl`; a context manager (`start` and `close` by hand otherwise).

    Each node claims 4 CPUs and 2 GPUs. Partitions: `debug` (default; preemptable: requeued after 20 s of grace) and
    `urgent`, which preempts it. A dead node is noticed in about 20 s, a requeued job waits about 7 s.

    `mode`: "namespaces", "plain", or None for the best this machine allows. `folder` holds slurm.conf, `log/` and all
    state, and is removed by `close` unless `keep`.
    """

    def __init__(self, mode: Mode | None = None, keep: bool = False) -> None:
        if reason := missing():
            raise Unavailable(reason)
        super().__init__(Path(tempfile.mkdtemp(prefix="stl-slurm-")), mode)  # short: a socket's path has 108 bytes
        self.keep = keep

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for clients

    def submit(self, *args: str | Path, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> str:
        """`sbatch` with these arguments -> the job id."""
        return self.run("sbatch", "--parsable", *args, env=env, cwd=cwd).stdout.strip()

    def jobs(self) -> list[dict[str, object]]:
        """All jobs SLURM remembers, finished ones too, as `squeue --json` gives them."""
        found: list[dict[str, object]] = json.loads(self.run("squeue", "--json").stdout)["jobs"]
        return found

    def tasks(self, job_id: str) -> list[dict[str, str]]:
        """The fields of `scontrol show job`, such as JobState, Restarts, NodeList, for each task of an array."""
        shown = self.run("scontrol", "-o", "show", "job", job_id).stdout
        return [dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", line)) for line in shown.splitlines() if "=" in line]

    def state(self, job_id: str) -> str:
        """What SLURM calls it: RUNNING, COMPLETED, ...; where array tasks differ, all of that: COMPLETED,FAILED."""
        return ",".join(sorted({task["JobState"] for task in self.tasks(job_id)}))

    def wait(self, job_id: str, timeout_s: float = 120) -> str:
        """Wait until the job (all tasks of an array) has left the queue -> its final state."""
        return self.wait_for(job_id, lambda state: not UNFINISHED & set(state.split(",")), timeout_s)

    def wait_for(self, job_id: str, wanted: str | Callable[[str], bool], timeout_s: float = 60) -> str:
        """Wait until the job's state is `wanted` (a state or a predicate of it) -> the state."""
        matches = wanted if callable(wanted) else wanted.__eq__
        try:
            poll(lambda: matches(self.state(job_id)), f"job {job_id}", timeout_s, every_s=0.2)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.run('scontrol', 'show', 'job', job_id).stdout}") from None
        return self.state(job_id)

    # --- for faults

    def power_on(self, node: str) -> None:
        """Power back: the node boots and is put into service again; the jobs it had are requeued."""
        self._need_namespaces("power_on")
        self._boot(node)
        self.set_down(node)  # an outage of less than about 20 s is not noticed by itself
        self.start_slurmd(node)
        self.resume(node)

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL for the node's slurmd alone; its job steps go on."""
        end(self._daemons.pop(node))

    def start_slurmd(self, node: str) -> None:
        """The way back from `kill_slurmd`."""
        self._daemons[node] = self._daemon(node, "slurmd", "-D", "-N", node)

    def set_down(self, node: str) -> None:
        """What an administrator does: the node is DOWN, its jobs are requeued at once."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume(self, node: str) -> None:
        """The administrator's way back from `set_down`."""
        self.run("scontrol", "update", f"nodename={node}", "state=resume")

    def node_states(self) -> dict[str, str]:
        """{"n1": "idle", "n2": "down*", ...} as `sinfo` writes it; `*` is a node that does not answer."""
        lines = self.run("sinfo", "-h", "-N", "-p", "debug", "-o", "%N %t").stdout.split()
        return dict(zip(lines[::2], lines[1::2], strict=True))

    def reset(self, timeout_s: float = 60) -> None:
        """Cancel all jobs and bring every node back to idle, whatever was done to it."""
        self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
        self.run("scancel", "--state=PENDING", check=False)
        for node in NODES:
            if self.mode == "namespaces" and node not in self._init:
                self.power_on(node)
            elif node not in self._daemons or self._daemons[node].poll() is not None:
                self.start_slurmd(node)
            if self.mode == "namespaces":
                self.heal_link(node)
            if self.node_states()[node].startswith(("down", "drain")):
                self.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
        poll(lambda: set(self.node_states().values()) == {"idle"}, "all nodes idle", timeout_s)

    # --- start and end

    def start(self) -> "Cluster":
        """Start everything and return when all nodes are idle (a few seconds)."""
        try:
            write_config(self.folder, self.mode)
            if self.mode == "namespaces":
                self._boot("ctl")
                for node in NODES:
                    self._boot(node)
            else:
                self._daemons["munge"] = self._munged()
            self._daemons["ctl"] = self._daemon("ctl", "slurmctld", "-D", "-c", "-i")
            poll(lambda: not self.run("scontrol", "ping", check=False).returncode, "slurmctld answers", 60)
            for node in NODES:
                self.start_slurmd(node)
            poll(lambda: set(self.node_states().values()) == {"idle"}, "all nodes idle", 60)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End all jobs and daemons that this object started, and remove its folder."""
        if "ctl" in self._daemons and self.mode == "plain":
            with contextlib.suppress(TimeoutError):
                self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
                poll(lambda: not self.run("squeue", "-h", "-t", "R,CG", check=False).stdout, "no jobs", 10)
        self._end_all()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _munged(self) -> subprocess.Popen[str]:
        """Keeps other users of the machine off a cluster on loopback."""
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        munged = self._daemon("munge", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
        poll((folder / "socket").exists, "munged answers", 20)
        return munged
