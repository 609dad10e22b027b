"""What Linux tells about this process tree and this node, as far as it has to do with networks."""

import os
import socket
from contextlib import suppress
from pathlib import Path

from stl_lightning.traffic.kernel import Endpoint

_PROC = Path("/proc")
_ENDED = (FileNotFoundError, ProcessLookupError)  # what looking into a process gives that is no more


class ProcessTree:
    """A process and its descendants. One that was seen once stays in, even if its parent ends before it."""

    def __init__(self, root: int) -> None:
        self.root = root
        self.unreadable: set[int] = set()  # processes whose open files may not be listed
        self._members = {root}
        self._others: set[int] = set()

    def pids(self) -> list[int]:
        """The tree now, the root first. Only processes that are new since the last call are asked for their parent."""
        listed = {int(name) for name in os.listdir(_PROC) if name.isdigit()}
        self._members &= listed
        self._others &= listed
        parents = {pid: parent_of(pid) for pid in listed - self._members - self._others}
        while found := {pid for pid, parent in parents.items() if parent in self._members} - self._members:
            self._members |= found
        self._others |= parents.keys() - self._members
        return sorted(self._members, key=lambda pid: (pid != self.root, pid))

    def holders(self) -> dict[int, int]:
        """Inode of every open socket -> the process that holds it; of several (after a fork) the oldest."""
        found: dict[int, int] = {}
        for pid in self.pids():
            try:
                inodes = socket_inodes(pid)
            except PermissionError:
                self.unreadable |= {pid} if parent_of(pid) is not None else set()
            except _ENDED:
                continue
            else:
                for inode in inodes:
                    found.setdefault(inode, pid)
        return found


def parent_of(pid: int) -> int | None:
    """The parent of a living process; None if it ended, even where its parent did not notice yet (a zombie)."""
    try:
        state, parent = (_PROC / str(pid) / "stat").read_bytes().rpartition(b")")[2].split()[:2]
    except _ENDED:
        return None
    return None if state in (b"Z", b"X") else int(parent)


def socket_inodes(pid: int) -> list[int]:
    folder = f"{_PROC}/{pid}/fd"
    found = []
    for name in os.listdir(folder):
        with suppress(FileNotFoundError):  # closed meanwhile
            target = os.readlink(f"{folder}/{name}")
            if target.startswith("socket:["):
                found.append(int(target[8:-1]))
    return found


def program(pid: int) -> str:
    """The file that a process runs; `python` whatever the version."""
    try:
        name = os.path.basename(os.readlink(_PROC / str(pid) / "exe"))
    except OSError:
        return "unknown"
    return "python" if name.startswith("python") else name.removesuffix(" (deleted)")


def address(endpoint: Endpoint) -> str:
    ip, port = endpoint
    if len(ip) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, ip)}:{port}"
    return f"[{socket.inet_ntop(socket.AF_INET6, ip)}]:{port}"


def node_bytes(
    interfaces: Path = _PROC / "net/dev", infiniband: Path = Path("/sys/class/infiniband")
) -> tuple[int, int] | None:
    """Bytes sent and received by all interfaces but lo and InfiniBand ports since boot; None where it is not told."""
    try:
        lines = interfaces.read_text().splitlines()[2:]
    except OSError:
        return None
    rows = [line.replace(":", " ").split() for line in lines]
    sent, received = (sum(int(row[at]) for row in rows if row[0] != "lo") for at in (9, 1))
    return sent + _infiniband_bytes(infiniband, "xmit"), received + _infiniband_bytes(infiniband, "rcv")


def _infiniband_bytes(folder: Path, direction: str) -> int:
    total = 0
    for path in folder.glob(f"*/ports/*/counters/port_{direction}_data"):
        with suppress(OSError, ValueError):  # some drivers have the file and no counter
            total += 4 * int(path.read_text())  # the unit is four bytes
    return total
