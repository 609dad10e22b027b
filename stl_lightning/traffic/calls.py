"""`PythonCalls`: every use of the network by Python code of this process, however short, by an audit hook (PEP 578)."""

import functools
import os
import socket
import sys
from contextlib import suppress

_EVENTS = frozenset({"socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"})
_SO_COOKIE = 57  # linux/socket.h; the socket module has no name for it


class PythonCalls:
    """Counts calls of connect, bind, sendto and sendmsg for IP between `start` and `stop`."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._pending: list[int] = []
        self._n_taken = 0

    @property
    def count(self) -> int:
        return self._n_taken + len(self._pending)

    def start(self) -> None:
        _install_hook()
        _RUNNING.append(self)

    def stop(self) -> None:
        with suppress(ValueError):  # stopped before
            _RUNNING.remove(self)

    def take(self) -> set[int]:
        """Cookies (the kernel's names) of the sockets that were used since the last call."""
        cookies = self._pending[:]
        del self._pending[: len(cookies)]
        self._n_taken += len(cookies)
        return set(cookies) - {0}

    def note(self, used: socket.socket) -> None:
        """Called inside any thread's call: takes no lock, since a forked process would inherit it locked."""
        if used.family not in (socket.AF_INET, socket.AF_INET6) or os.getpid() != self._pid:
            return
        cookie = 0
        with suppress(OSError):  # closed, or a system without cookies
            cookie = int.from_bytes(used.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)
        self._pending.append(cookie)


_RUNNING: list[PythonCalls] = []


@functools.cache
def _install_hook() -> None:
    sys.addaudithook(_hook)  # Python has no way to take it out again


def _hook(event: str, args: tuple[socket.socket, object]) -> None:
    if _RUNNING and event in _EVENTS:
        for calls in tuple(_RUNNING):
            calls.note(args[0])
