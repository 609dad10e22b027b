"""Four computers on one: network namespaces that are joined by a switch, each behind a link of a given rate.

A namespace has its own network devices, addresses and counters. Needs root, and the commands `ip` and `tc`.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from networking.cores import Share

SUBNET = "10.77.0"  # seen by nobody but the namespaces
CLONE_NEWNET = 0x40000000  # from <sched.h>
# Variable of glibc -> number in <malloc.h>, bytes: give no memory back, and take what was freed again.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": (-1, 2**30), "MALLOC_MMAP_THRESHOLD_": (-3, 2**25)}
# Without IPv6 nothing announces itself on the link: no neighbour discovery, no multicast membership.
NO_IPV6 = "for of in all default; do f=/proc/sys/net/ipv6/conf/$of/disable_ipv6; [ ! -e $f ] || echo 1 >$f; done"


class Unavailable(Exception):
    """Something that the measurement needs cannot be had here; the message says what."""


@dataclass(frozen=True)
class Link:
    """What limits a node's link in both directions; None: nothing does."""

    shaping: str | None = None


LINKS = {
    "100 Mbit/s": Link("tbf rate 100mbit burst 64kb latency 20ms"),
    "1 Gbit/s": Link("tbf rate 1gbit burst 256kb latency 20ms"),
    "unshaped": Link(),
}


@dataclass(frozen=True)
class Traffic:
    """Bytes that a network device has sent and received since it was made."""

    sent: int
    received: int


def traffic(device: str = "eth0") -> Traffic:
    """The kernel's counters of a device of this process's namespace; zeros where there is no such device."""
    return parse_traffic(Path("/proc/self/net/dev").read_text(), device)


def parse_traffic(text: str, device: str) -> Traffic:
    for line in text.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == device:
            received, *_ = fields = [int(number) for number in numbers.split()]
            return Traffic(fields[8], received)
    return Traffic(0, 0)


class Nodes:
    """`with Nodes(4) as nodes:` makes them and, however the block ends, ends what runs in them and removes them.

    cores: what a node has of a core after `limit`; None: a core it may have to share. name: of several in a process.
    Raises: Unavailable where they cannot be made.
    """

    def __init__(self, n: int, cores: float | None = None, name: str = "nodes") -> None:
        prefix = f"stl-network-{os.getpid()}-{name}"
        self.switch = f"{prefix}-switch"
        self.names = [f"{prefix}-{i}" for i in range(n)]
        self.cores = cores
        self._shares: list[Share] = []
        self._processes: list[BaseProcess] = []

    def __enter__(self) -> "Nodes":
        try:
            self._make()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _make(self) -> None:
        for name in (self.switch, *self.names):
            command("ip", "netns", "add", name)
            command("ip", "netns", "exec", name, "sh", "-c", NO_IPV6)
            command("ip", "-n", name, "link", "set", "lo", "up")
        # A bridge that listens to multicast groups announces that to all ports.
        quiet = ("forward_delay", "0", "mcast_snooping", "0")
        command("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge", *quiet)
        command("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for i, name in enumerate(self.names):
            ends = ("type", "veth", "peer", "name", "eth0", "netns", name)
            command("ip", "-n", self.switch, "link", "add", f"port{i}", *ends)
            command("ip", "-n", self.switch, "link", "set", f"port{i}", "master", "bridge", "up")
            command("ip", "-n", name, "addr", "add", f"{address(i)}/24", "dev", "eth0")
            command("ip", "-n", name, "link", "set", "eth0", "up")
        try:
            for name in self.names if self.cores else ():
                self._shares.append(Share(name))
        except OSError as error:
            what = "no part of a core can be set aside for a worker"
            raise Unavailable(f"{what} ({error}); --cores 0 does without") from error

    def remove(self) -> None:
        self.end_processes()
        for share in self._shares:
            share.remove()
        for name in (*self.names, self.switch):
            if Path("/run/netns", name).exists():
                command("ip", "netns", "del", name)

    def shape(self, link: Link) -> None:
        """Limit every link, at the node's end what it sends and at the switch's end what it receives."""
        shaping = (link.shaping or "noqueue").split()
        ends = [(name, "eth0") for name in self.names] + [(self.switch, f"port{i}") for i in range(len(self.names))]
        for name, device in ends:
            command("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *shaping)

    def limit(self) -> None:
        """From now on what runs on a node has `cores` of a core."""
        for share in self._shares:
            share.limit(self.cores or 1.0)

    def traffic(self) -> list[Traffic]:
        """The counters of every node's link, read from outside."""
        read = ("cat", "/proc/self/net/dev")
        return [parse_traffic(command("ip", "netns", "exec", name, *read), "eth0") for name in self.names]

    def start(self, i: int, work: Callable[[], Any], log: Path) -> BaseProcess:
        """A process on a node, on a core of its own as far as there are enough, that calls `work`; `log` has what it
        prints. It is a fork of this one, so what is imported here is imported there."""
        cores = sorted(os.sched_getaffinity(0))
        where = (self.names[i], cores[i % len(cores)], log)
        process = multiprocessing.get_context("fork").Process(target=_on_node, args=(*where, work))
        self._processes.append(process)  # first: the signal to leave may come at any time
        process.start()
        assert process.pid is not None, "it was started"
        if self._shares:
            self._shares[i].join(process.pid)
        return process

    def end_processes(self) -> None:
        """Kill what was started and still runs, and the children of that."""
        for process in self._processes:
            if process.pid is None:
                continue
            if process.exitcode is None:
                with suppress(ProcessLookupError):  # it has not come to leading a group
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()
        self._processes.clear()


def _on_node(name: str, core: int, log: Path, work: Callable[[], Any]) -> None:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for stream, mode in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY)):
        file = os.open(os.devnull if stream == 0 else log, mode | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
    os.sched_setaffinity(0, {core})
    enter(name)
    keep_memory()
    work()


def keep_memory() -> None:
    """Set `MALLOC` in this process: what a step frees, the next one asks for again; page faults took a tenth of it."""
    libc = ctypes.CDLL(None)
    for option, n_bytes in MALLOC.values():
        libc.mallopt(option, n_bytes)


def enter(name: str) -> None:
    """Move this process into a network namespace. Equivalent: os.setns, which Python has from 3.12 on."""
    with Path("/run/netns", name).open() as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {name}")


def address(i: int) -> str:
    return f"{SUBNET}.{i + 1}"


def check_tools() -> None:
    """Raises: Unavailable without root or without the commands."""
    if os.geteuid() != 0:
        raise Unavailable(f"network namespaces need root, and this is user {os.geteuid()}: run it with sudo")
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        raise Unavailable(f"no {' and no '.join(missing)} on PATH: apt-get install iproute2")


def command(*argv: str) -> str:
    """What a command prints. Raises: Unavailable with what it said if it fails."""
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"`{' '.join(argv)}` failed: {done.stderr.strip()}")
    return done.stdout
