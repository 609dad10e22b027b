"""`Ledger`: from what the kernel says about sockets, look after look, to the bytes of one process tree."""

from collections import Counter
from collections.abc import Iterable

from stl_lightning.traffic.kernel import LISTEN, Socket
from stl_lightning.traffic.node import address

N_REMOTES = 8
_MAX_REMOTES = 1000  # that are remembered of ended sockets


class Ledger:
    """The sockets that were claimed for a program of the tree. Those in `before` count only what they add.

    A connection with both ends in the tree does not count. An ended socket leaves its bytes and is forgotten: a
    training that opens a connection for every file does not fill the memory.
    """

    def __init__(self, before: Iterable[Socket] = ()) -> None:
        self._before = {each.cookie: (each.bytes_sent, each.bytes_received) for each in before}
        self._programs: dict[int, str] = {}  # by cookie, like the next two
        self._seen: dict[int, Socket] = {}
        self._internal: set[int] = set()
        self._ended: Counter[tuple[str, int]] = Counter()  # (program, 0 for sent or 1 for received) -> bytes
        self._ended_remotes: Counter[str] = Counter()

    def __contains__(self, cookie: int) -> bool:
        return cookie in self._programs

    def claim(self, cookie: int, program: str) -> None:
        """Count this socket for a program, unless it is claimed already."""
        self._programs.setdefault(cookie, program)

    def update(self, alive: Iterable[Socket], ended: Iterable[Socket]) -> None:
        """Take over one look. Only claimed sockets matter."""
        final = [each for each in ended if each.cookie in self]
        claimed = [*(each for each in alive if each.cookie in self), *final]
        known = [*self._seen.values(), *claimed]  # of a server that just ended, the earlier look has the port
        self._seen |= {each.cookie: each for each in claimed}
        self._mark_internal(known)
        for each in final:
            self._settle(each.cookie)

    def by_program(self) -> dict[str, list[int]]:
        """Bytes sent and received of every program that sent or received some."""
        total = self._ended.copy()
        for cookie in self._seen.keys() - self._internal:
            total.update(self._share(cookie))
        programs = sorted({name for (name, _), count in total.items() if count})
        return {name: [total[name, 0], total[name, 1]] for name in programs}

    def remotes(self) -> list[str]:
        """Addresses of others, those with the most bytes first."""
        total = self._ended_remotes.copy()
        for cookie in self._seen.keys() - self._internal:
            total.update(self._remote(cookie))
        return [name for name, _ in total.most_common(N_REMOTES)]

    def _mark_internal(self, known: list[Socket]) -> None:
        ends = {(each.local, each.remote) for each in known}
        served = {each.local[1] for each in known if each.state == LISTEN}
        for cookie, each in self._seen.items():
            # The second case: the other end was accepted and closed between two looks.
            to_own_server = each.local[0] == each.remote[0] and each.remote[1] in served
            if (each.remote, each.local) in ends or to_own_server:
                self._internal.add(cookie)

    def _settle(self, cookie: int) -> None:
        if cookie not in self._internal:
            self._ended.update(self._share(cookie))
            self._ended_remotes.update(self._remote(cookie))
        if len(self._ended_remotes) > _MAX_REMOTES:
            self._ended_remotes = Counter(dict(self._ended_remotes.most_common(N_REMOTES)))
        del self._programs[cookie], self._seen[cookie]
        self._internal.discard(cookie)

    def _share(self, cookie: int) -> dict[tuple[str, int], int]:
        name, each, (sent, received) = self._programs[cookie], self._seen[cookie], self._before.get(cookie, (0, 0))
        return {(name, 0): each.bytes_sent - sent, (name, 1): each.bytes_received - received}

    def _remote(self, cookie: int) -> dict[str, int]:
        count, remote = sum(self._share(cookie).values()), self._seen[cookie].remote
        shown = remote[1] and (count or cookie not in self._before)
        return {address(remote): count} if shown else {}
