"""Four machines and the one that users log in to, made of namespaces; in plain mode they are all this machine."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from cluster_config import Mode, address

PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"

# Pid 1 of a node. As it ignores SIGCHLD the kernel reaps what is left to it; at the end of its input `cat` ends, and a
# pid namespace ends with its pid 1.
INIT = """set -e
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount --bind "$2/nsswitch.conf" /etc/nsswitch.conf
mount -t tmpfs -o size=256m tmpfs /dev/shm; ip link set lo up
echo ready; exec env --ignore-signal=CHLD cat >/dev/null"""
# Plain mode: a daemon that ends with its input; `$1` is what to do first.
WATCHED = 'end=$1; shift; "$@" & cat >/dev/null; eval "$end"; kill -KILL $!'


class Unavailable(Exception):
    """What the machine cannot do, and why: tests skip with this reason."""


def namespaces_permitted() -> bool:
    """Whether this user may create the namespaces of a node."""
    tools = all(shutil.which(name, path=PATH) for name in ("unshare", "nsenter", "ip"))
    trial = "mount -t tmpfs tmpfs /dev/shm && ip link add br0 type bridge"
    command = [*_unshare(), "sh", "-c", trial]
    return tools and not subprocess.run(command, env=os.environ | {"PATH": PATH}, capture_output=True).returncode


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


class Nodes:
    """Namespaces and cables, and processes in them; `ctl` is the machine of the controller and of users.

    `mode`: None takes the best that this machine allows. Every process ends with this object's.
    """

    def __init__(self, folder: Path, mode: Mode | None = None) -> None:
        self.folder = folder
        self.mode: Mode = mode or ("namespaces" if namespaces_permitted() else "plain")
        self._init: dict[str, subprocess.Popen[str]] = {}  # `unshare` of each node that has power; its child is pid 1
        self._daemons: dict[str, subprocess.Popen[str]] = {}

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
            end(process)
        result = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert not check or not result.returncode, f"{' '.join(command)}: exit {result.returncode}\n{out}{err}"
        return result

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
            self._ip("addr", "add", f"{address('ctl')}/24", "dev", "br0")
            self._ip("link", "set", "br0", "up")
            return
        port = self._port(node)
        self._ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(child_of(init)))
        self._ip("link", "set", port, "master", "br0", "up")
        self._ip("addr", "add", f"{address(node)}/24", "dev", "eth0", node=node)
        self._ip("link", "set", "eth0", "up", node=node)

    def _ip(self, *args: str, node: str = "ctl") -> None:
        """`ip` in the network namespace of a node, but with this process's pids."""
        command = ["nsenter", f"--target={child_of(self._init[node])}", "--net", "ip", *args]
        subprocess.run(command, check=True, env=self.env(), capture_output=True)

    def _enter(self, node: str, cwd: str | Path = "/") -> list[str]:
        """The words before a command that make it run on a node, in a folder."""
        if self.mode == "plain":
            return []
        if node not in self._init:
            raise Unavailable(f"{node} has no power")
        target = child_of(self._init[node])
        return ["nsenter", f"--target={target}", "--mount", "--uts", "--ipc", "--net", "--pid", "env", "-C", str(cwd)]

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

    def _need_namespaces(self, what: str) -> None:
        if self.mode == "plain":
            raise Unavailable(f"{what} needs nodes with namespaces of their own (root, unshare and ip)")

    @staticmethod
    def _port(node: str) -> str:
        return f"port-{node}"

    def power_off(self, node: str) -> None:
        """Power cut: slurmd, its job steps and everything else on the node is gone in one instant."""
        self._need_namespaces("power_off")
        self._ip("link", "del", self._port(node))  # the other end goes with it: no last packet leaves the node
        init = self._init.pop(node)
        os.kill(child_of(init), signal.SIGKILL)
        init.wait()
        if slurmd := self._daemons.pop(node, None):
            end(slurmd)

    def cut_link(self, node: str) -> None:
        """No packet gets through any more; what runs on the node goes on running."""
        self._need_namespaces("cut_link")
        self._ip("link", "set", self._port(node), "down")

    def heal_link(self, node: str) -> None:
        """The link of `cut_link` works again."""
        self._need_namespaces("heal_link")
        self._ip("link", "set", self._port(node), "up")

    def _end_all(self) -> None:
        for init in self._init.values():
            init.communicate()  # closes its input
        for process in self._daemons.values():
            end(process)
        self._init.clear()
        self._daemons.clear()


def child_of(process: subprocess.Popen[str]) -> int:
    """The only child of a process: pid 1 of the namespaces that `unshare` made."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that we started as the leader of its group, with the group, unless it has ended."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
