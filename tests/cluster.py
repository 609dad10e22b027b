"""A real SLURM of four nodes on one machine: one slurmctld, four slurmd, all state in a temporary folder.

    with Cluster() as cluster:
        job = cluster.submit("--array=0-3", "slurm/array.sbatch", "configs/digits.yaml")
        cluster.power_off("n2")
        assert cluster.wait(job) == "COMPLETED"

Where the kernel lets us, the controller and every node are namespaces of their own (pid, mount, uts, ipc, network), so a
power cut, a cut link or a killed slurmd is the real thing and `hostname` is the node's name. All namespaces are
anonymous: nothing is named, listens or is mounted outside them, and any number of clusters can run side by side.
Elsewhere ("plain" mode) the daemons listen on free loopback ports and the nodes share the machine; the methods that
need a namespace then raise `Unavailable`. Only the file system is shared by the nodes, as on a cluster.

The daemons live as long as pipes that this process holds: however it ends, they end, and their jobs with them.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

NODES = ("n1", "n2", "n3", "n4")
CPUS_PER_NODE, GPUS_PER_NODE = 4, 2  # claimed, not real: the GPUs are device files without a device
SUBNET = "10.231.0"  # seen inside the namespaces only
UNFINISHED = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED", "STAGE_OUT"}
BINARIES = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"

# Pid 1 of a node. As it ignores SIGCHLD the kernel reaps what is left to it; at the end of its input `cat` ends, and a
# pid namespace ends with its pid 1.
INIT = """set -e
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=256m tmpfs /dev/shm; ip link set lo up
echo ready; exec env --ignore-signal=CHLD cat >/dev/null"""
# Plain mode: a daemon that ends with its input; `$1` is what to do first.
WATCHED = 'end=$1; shift; "$@" & cat >/dev/null; eval "$end"; kill -KILL $!'

CONF = """ClusterName=test
SlurmctldHost={ctl_host}({ctl_addr})
SlurmctldPort={ctl_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/{auth}
CredType=cred/{auth}
AuthInfo={auth_info}
# Without these two SLURM listens on every address of the machine.
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
# A node that was lost comes back by itself; one that was set down stays down.
ReturnToService=1
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Failures are noticed, and killed jobs given up, within seconds.
SlurmdTimeout=10
KillWait=5
MinJobAge=3600
MessageTimeout=5
GresTypes=gpu
{nodes}
PartitionName=debug Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL DefaultTime=10 MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


class Unavailable(Exception):
    """What the machine cannot do, and why: tests skip with this reason."""


def missing() -> str | None:
    """Why no cluster can be started here; None where it can."""
    absent = [name for name in BINARIES if shutil.which(name, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} on PATH: apt-get install slurm-wlm munge"
    if not namespaces_permitted() and shutil.which("munged", path=PATH) is None:
        return "no namespaces without root, and no munged to protect a cluster on loopback: apt-get install munge"
    return None


def namespaces_permitted() -> bool:
    """Whether this user may create the namespaces of a node."""
    tools = all(shutil.which(name, path=PATH) for name in ("unshare", "nsenter", "ip"))
    trial = "mount -t tmpfs tmpfs /dev/shm && ip link add br0 type bridge"
    return tools and subprocess.run([*_unshare(), "sh", "-c", trial], capture_output=True).returncode == 0


def _unshare() -> list[str]:
    spaces = ["--pid", "--mount", "--uts", "--ipc", "--net"]
    return ["unshare", *spaces, "--fork", "--kill-child=KILL", "--propagation=private", "--mount-proc"]


def poll(done: Callable[[], object], what: str, timeout_s: float, every_s: float = 0.05) -> None:
    """Return as soon as `done()` is true; raises TimeoutError naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout_s:g} s")
        time.sleep(every_s)


class Cluster:
    """Four nodes `n1` to `n4` and a controller `ctl`; a context manager (`start` and `close` by hand otherwise).

    Each node claims 4 CPUs and 2 GPUs. Partitions: `debug` (default; preemptable: requeued after 20 s of grace) and
    `urgent`, which preempts it. A dead node is noticed in about 30 s, a requeued job waits about 7 s.

    `mode`: "namespaces", "plain", or None for the best this machine allows. `folder` holds slurm.conf, `log/` and all
    state, and is removed by `close` unless `keep`.
    """

    def __init__(self, mode: str | None = None, keep: bool = False) -> None:
        if reason := missing():
            raise Unavailable(reason)
        self.mode = mode or ("namespaces" if namespaces_permitted() else "plain")
        self.keep = keep
        self.folder = Path(tempfile.mkdtemp(prefix="stl-slurm-"))  # short: it holds sockets, whose paths have 108 bytes
        self._init: dict[str, subprocess.Popen[str]] = {}  # `unshare` of each node that has power; its child is pid 1
        self._daemons: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- for clients

    def env(self) -> dict[str, str]:
        """This process's environment without any job's variables, with SLURM_CONF and this Python's folder on PATH."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return clean | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}

    def run(
        self,
        *args: str | Path,
        node: str = "ctl",
        timeout_s: float = 60,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command (`sbatch`, `squeue`, `stl launch`, ...) on the controller or on a node.

        `env` is added to `self.env()`. Raises AssertionError with the output where `check` and the command fails,
        TimeoutError where it takes longer (it is killed, with its children).
        """
        cwd = cwd or os.getcwd()
        command = [*self._enter(node, cwd), *map(str, args)]
        process = subprocess.Popen(
            command,
            env=self.env() | dict(env or {}),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{' '.join(command)}: still running after {timeout_s:g} s") from None
        finally:
            _end(process)
        result = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert not check or not result.returncode, f"{' '.join(command)}: exit {result.returncode}\n{out}{err}"
        return result

    def submit(self, *args: str | Path, env: Mapping[str, str] | None = None, cwd: str | Path | None = None) -> str:
        """`sbatch` with these arguments -> the job id."""
        return self.run("sbatch", "--parsable", *args, env=env, cwd=cwd).stdout.strip()

    def jobs(self) -> list[dict[str, object]]:
        """All jobs SLURM remembers, finished ones too, as `squeue --json` gives them."""
        found: list[dict[str, object]] = json.loads(self.run("squeue", "--json").stdout)["jobs"]
        return found

    def tasks(self, job_id: str) -> list[dict[str, str]]:
        """The fields of `scontrol show job` (JobState, Restarts, NodeList, ExitCode, ...), a row for each array task."""
        shown = self.run("scontrol", "-o", "show", "job", job_id).stdout
        return [dict(re.findall(r"(?:^|\s)([A-Za-z:/]+)=(\S*)", line)) for line in shown.splitlines() if "=" in line]

    def state(self, job_id: str) -> str:
        """ "RUNNING", "COMPLETED", ...; where array tasks differ, all their states: "COMPLETED,FAILED"."""
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

    def power_off(self, node: str) -> None:
        """Power cut: slurmd, its job steps and everything else on the node is gone in one instant."""
        self._need_namespaces("power_off")
        self._ip("link", "del", self._port(node))  # the other end goes with it: no last packet leaves the node
        init = self._init.pop(node)
        os.kill(_child(init), signal.SIGKILL)
        init.wait()
        _end(self._daemons.pop(node))

    def power_on(self, node: str) -> None:
        """Power back: the node boots and is put into service again; the jobs it had are requeued."""
        self._need_namespaces("power_on")
        self._boot(node)
        self.set_down(node)  # an outage of less than about 20 s is not noticed by itself
        self.start_slurmd(node)
        self.resume(node)

    def cut_link(self, node: str) -> None:
        """No packet gets through any more; what runs on the node goes on running."""
        self._need_namespaces("cut_link")
        self._ip("link", "set", self._port(node), "down")

    def heal_link(self, node: str) -> None:
        """The link of `cut_link` works again."""
        self._ip("link", "set", self._port(node), "up")

    def kill_slurmd(self, node: str) -> None:
        """SIGKILL for the node's slurmd alone; its job steps go on."""
        _end(self._daemons.pop(node))

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
            elif node not in self._daemons:
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
            self._write_files()
            if self.mode == "namespaces":
                self._boot("ctl")
                for node in NODES:
                    self._boot(node)
            else:
                self._daemons["munge"] = self._munged()
            self._daemons["ctl"] = self._daemon("ctl", "slurmctld", "-D", "-c", "-i")
            poll(lambda: not self.run("scontrol", "ping", check=False).returncode, "slurmctld answers", 20)
            for node in NODES:
                self.start_slurmd(node)
            poll(lambda: set(self.node_states().values()) == {"idle"}, "all nodes idle", 20)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """End all jobs and daemons that this object started, and remove its folder."""
        if "ctl" in self._daemons and self.mode == "plain":
            self.run("scancel", "--full", "--signal=KILL", "--state=RUNNING", check=False)
            with contextlib.suppress(TimeoutError):
                poll(lambda: not self.run("squeue", "-h", "-t", "R,CG", check=False).stdout, "no jobs", 10)
        for init in self._init.values():
            init.communicate()  # closes its input
        for process in self._daemons.values():
            _end(process)
        self._init.clear()
        self._daemons.clear()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    # --- namespaces and daemons

    def _boot(self, node: str) -> None:
        """Namespaces for a node, held by a pid 1 of its own, and a cable to the switch (a bridge in ctl's)."""
        command = [*_unshare(), "sh", "-c", INIT, "sh", node, str(self.folder)]
        pipe = subprocess.PIPE
        init = subprocess.Popen(
            command, env=self.env(), stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        assert init.stdout is not None, "a pipe was asked for"
        if init.stdout.readline() != "ready\n":
            raise Unavailable(f"no namespaces for {node}: {init.communicate()[1]}")
        self._init[node] = init
        if node == "ctl":
            self._ip("link", "add", "br0", "type", "bridge", "forward_delay", "0")
            self._ip("addr", "add", f"{self._address('ctl')}/24", "dev", "br0")
            self._ip("link", "set", "br0", "up")
            return
        port = self._port(node)
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(_child(init)))
        self._ip("link", "set", port, "master", "br0", "up")
        self._ip("addr", "add", f"{self._address(node)}/24", "dev", "eth0", node=node)
        self._ip("link", "set", "eth0", "up", node=node)

    def _ip(self, *args: str, node: str = "ctl") -> None:
        """`ip` in the network namespace of a node, but with this process's pids."""
        command = ["nsenter", f"--target={_child(self._init[node])}", "--net", "ip", *args]
        subprocess.run(command, check=True, env=self.env(), capture_output=True)

    def _enter(self, node: str, cwd: str | Path = "/") -> list[str]:
        """The words before a command that make it run on a node, in a folder."""
        if self.mode == "plain":
            return []
        if node not in self._init:
            raise Unavailable(f"{node} has no power")
        target = _child(self._init[node])
        return ["nsenter", f"--target={target}", "--mount", "--uts", "--ipc", "--net", "--pid", f"--wdns={cwd}"]

    def _daemon(self, node: str, *command: str) -> subprocess.Popen[str]:
        if self.mode == "plain":
            end = "scancel --full --signal=KILL --state=RUNNING; sleep 2" if node == "ctl" else "sleep 4"
            command = ("sh", "-c", WATCHED, "sh", end, *command)
        quiet = subprocess.DEVNULL
        return subprocess.Popen(
            [*self._enter(node, self.folder), *command],
            env=self.env(),
            cwd=self.folder,
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
            text=True,
            start_new_session=True,
        )

    def _munged(self) -> subprocess.Popen[str]:
        """Keeps other users of the machine off a cluster on loopback."""
        folder = self.folder / "munge"
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "log", "seed")]
        munged = self._daemon("munge", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
        poll((folder / "socket").exists, "munged answers", 20)
        return munged

    def _need_namespaces(self, what: str) -> None:
        if self.mode == "plain":
            raise Unavailable(f"{what} needs nodes with namespaces of their own (root, unshare and ip)")

    @staticmethod
    def _port(node: str) -> str:
        return f"port-{node}"

    @staticmethod
    def _address(node: str) -> str:
        return f"{SUBNET}.{254 if node == 'ctl' else NODES.index(node) + 1}"

    def _write_files(self) -> None:
        for name in ("run", "log", "state", "munge", "gpu", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        for index in range(GPUS_PER_NODE):
            _device(self.folder / "gpu" / f"gpu{index}")
        hosts = "".join(f"{self._address(node)} {node}\n" for node in ("ctl", *NODES))
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        services = Path("/etc/nsswitch.conf").read_text() if Path("/etc/nsswitch.conf").exists() else ""
        (self.folder / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*$", "", services) + "\nhosts: files\n")
        gpus = f"Name=gpu Type=fake File={self.folder}/gpu/gpu[0-{GPUS_PER_NODE - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-{len(NODES)}] {gpus}\n")
        # slurmd loads a cgroup plugin although no job uses one; unnamed, it looks for a file system it may not see.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        (self.folder / "slurm.conf").write_text(self._conf())

    def _conf(self) -> str:
        private = self.mode == "namespaces"
        ports = [6817] + [6818] * len(NODES) if private else _free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        claim = f"CPUs={CPUS_PER_NODE} RealMemory=4000 Gres=gpu:fake:{GPUS_PER_NODE} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeHostname={node if private else host} "
            f"NodeAddr={self._address(node) if private else '127.0.0.1'} Port={port} {claim}"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        return CONF.format(
            ctl_host="ctl" if private else host,
            ctl_addr=self._address("ctl") if private else "127.0.0.1",
            ctl_port=ports[0],
            user=subprocess.check_output(["id", "-un"], text=True).strip(),
            folder=self.folder,
            auth="none" if private else "munge",
            auth_info="cred_expire=5" + ("" if private else f",socket={self.folder}/munge/socket"),
            nodes="\n".join(nodes),
        )


def _child(process: subprocess.Popen[str]) -> int:
    """The only child of a process: pid 1 of the namespaces that `unshare` made."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def _end(process: subprocess.Popen[str]) -> None:
    """Kill a process that we started as the leader of its group, with the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()


def _device(path: Path) -> None:
    """A device file where we may make one (as /dev/null), an empty file elsewhere: SLURM only looks whether it is there."""
    try:
        os.mknod(path, 0o20666, os.makedev(1, 3))
    except PermissionError:
        path.touch()


def _free_ports(count: int) -> Sequence[int]:
    """Loopback ports that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
