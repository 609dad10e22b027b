"""`Traffic`: the bytes that a process and its descendants sent to and received from others between two moments."""

import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from stl_lightning.traffic.calls import PythonCalls
from stl_lightning.traffic.kernel import KernelSockets, Socket
from stl_lightning.traffic.ledger import Ledger
from stl_lightning.traffic.node import ProcessTree, node_bytes, program

METHOD = (
    "bytes: TCP payload of this process and its descendants, by the kernel's counter of each socket. Not counted: "
    "connections inside the tree, UDP, Unix sockets, files (network file systems too), RDMA, shared memory, links "
    "between GPUs, and sockets that live shorter than the time between two looks, unless Python code of this process "
    "connected them. connections: calls of connect, bind, sendto and sendmsg for IP by Python code of this process. "
    "node_bytes: everything on all interfaces but lo and on all InfiniBand ports, whoever sent it"
)
_END_PAUSE_S = 0.02  # the kernel announces the end of a socket some milliseconds later


BYTES = ("bytes_sent", "bytes_received")


class Traffic:
    """Counts from `start` on, looks again at every `sample` and a last time at `stop`. Never raises.

    A socket counts from the moment a look finds it open in the tree or Python code of this process connects it, with
    all it sent and received since `start`, up to its final counters. A connection inside the tree does not count; one
    to another process of this machine does, since that may be another rank. Where the system does not tell (another
    than Linux, a sandbox), the bytes are None and `method` says so.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._tree = ProcessTree(os.getpid())
        self._calls = PythonCalls()
        self._ledger = Ledger()
        self._kernel: KernelSockets | None = None
        self._ended: list[Socket] = []  # read, but not yet in the ledger
        self._gaps: dict[str, None] = {}  # what was missed, in the order in which it was noticed
        self._counted = False  # whether the kernel told anything
        self._node_before = self._node_now = node_bytes()

    def start(self) -> None:
        """Count from now on, from zero. A `Traffic` may be started again."""
        with self._lock:
            self._close()
            self._reset()
            self._calls.start()
            try:
                self._kernel = KernelSockets()
                self._ledger = Ledger(self._kernel.alive())
                self._counted = True
            except OSError as error:
                self._missed(f"the bytes, since the system does not tell: {error}")
            self._look()

    def sample(self) -> None:
        """Look at the sockets of the tree. Any thread may do it, often: it takes about a millisecond."""
        with self._lock:
            self._look()

    def stop(self) -> None:
        """Look a last time, after a pause for the kernel's news about what just ended. The totals stay."""
        time.sleep(_END_PAUSE_S)
        with self._lock:
            self._look()
            self._close()

    def totals(self) -> dict[str, Any]:
        """What was counted until the last look, as JSON can hold it."""
        with self._lock:
            programs = self._ledger.by_program()
            sent, received = (sum(row[at] for row in programs.values()) for at in (0, 1))
            node_sent, node_received = self._node_since_start()
            return {
                "bytes_sent": sent if self._counted else None,
                "bytes_received": received if self._counted else None,
                "connections": self._calls.count,
                "by_program": programs,
                "remotes": self._ledger.remotes(),
                "node_bytes_sent": node_sent,
                "node_bytes_received": node_received,
                "method": "; missed: ".join([METHOD, *self._gaps]),
            }

    def _look(self) -> None:
        try:
            self._node_now = node_bytes()
            if self._kernel is not None:
                self._read(self._kernel)
        except Exception as error:  # whatever the system answers, it must not end the thread that looks
            self._missed(f"a look, since the system did not answer: {error}")

    def _read(self, kernel: KernelSockets) -> None:
        self._ended += kernel.ended()  # first, so that every call on a socket that ended is known below
        for cookie in self._calls.take():
            self._ledger.claim(cookie, program(self._tree.root))
        holders = self._tree.holders()
        alive = kernel.alive()
        for each in alive:
            if each.inode in holders and each.cookie not in self._ledger:
                self._ledger.claim(each.cookie, program(holders[each.inode]))
        self._ledger.update(alive, self._ended)
        self._ended.clear()
        if kernel.lost:
            self._missed("the end of some sockets, since too many ended at once")
        if self._tree.unreadable:
            self._missed("processes whose open files this user may not list")

    def _missed(self, what: str) -> None:
        self._gaps[what] = None

    def _node_since_start(self) -> tuple[int | None, int | None]:
        if self._node_before is None or self._node_now is None:
            return None, None
        sent, received = (max(0, now - then) for now, then in zip(self._node_now, self._node_before, strict=True))
        return sent, received

    def _close(self) -> None:
        self._calls.stop()
        if self._kernel is not None:
            self._kernel.close()
            self._kernel = None


def total_bytes(windows: Iterable[Mapping[str, Sequence[int | None]]]) -> dict[str, int | None]:
    """The bytes of several branches over all attempts: each maps the windows it was in to the counts (`BYTES`).

    Branches that one process trained together share a window, which counts once. None if a window was not counted.
    """
    each = {name: counts for of_branch in windows for name, counts in of_branch.items()}
    columns = [[counts[i] for counts in each.values()] for i in range(len(BYTES))]
    return {name: _sum(column) for name, column in zip(BYTES, columns, strict=True)}


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
