"""The kernel's counter of every TCP socket, read over `NETLINK_SOCK_DIAG`, as `ss --info` does; no privilege is needed.

Source: linux/inet_diag.h, linux/sock_diag.h, linux/tcp.h (`struct tcp_info`); man 7 sock_diag.
"""

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from typing import NamedTuple

CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = 8, 9, 10, 11  # of the states of a socket

_SOCK_DIAG = 4  # NETLINK_SOCK_DIAG
_ERROR, _DONE, _BY_FAMILY = 2, 3, 20  # NLMSG_ERROR, NLMSG_DONE, SOCK_DIAG_BY_FAMILY: types of messages
_DUMP = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_ENDED = 0b1111  # multicast groups that announce the end of a TCP or UDP socket, IPv4 and IPv6
_INFO = 2  # INET_DIAG_INFO: the attribute that holds a `struct tcp_info`
_STATES = 0xFFF & ~(1 << 6)  # all but TIME_WAIT, which has no counters
_HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBBxI48x")  # struct inet_diag_req_v2: family, protocol, attributes, states, any socket
_SOCKET = struct.Struct("=BBxx2s2s16s16s4xII16xI")  # inet_diag_msg: family, state, ports, addresses, cookie, inode
_COUNTERS = struct.Struct("=120xQQ16xI44xQQ")  # of tcp_info: acked, received, data_segs_in, bytes_sent, bytes_retrans
_OLD_COUNTERS = struct.Struct("=120xQQ16xI")  # the same before Linux 4.19

Endpoint = tuple[bytes, int]  # IP address (4 bytes where it has an IPv4 form, else 16), port


class Socket(NamedTuple):
    """One socket as the kernel describes it. No other ever has its cookie; its inode is 0 once no process holds it."""

    cookie: int
    inode: int
    state: int
    local: Endpoint
    remote: Endpoint
    bytes_sent: int
    bytes_received: int


class KernelSockets:
    """The sockets of this network namespace. Raises: OSError where the system does not tell."""

    def __init__(self) -> None:
        if not hasattr(socket, "AF_NETLINK"):
            raise OSError(errno.ENOSYS, f"no netlink on {sys.platform}")
        self.lost = False  # whether the ends of some sockets went by unread
        self._ends = _netlink()
        try:
            self._ends.bind((0, _ENDED))
            self._ends.setblocking(False)
        except OSError:
            self._ends.close()
            raise

    def alive(self) -> list[Socket]:
        """All TCP sockets that are not closed."""
        return [found for family in (socket.AF_INET, socket.AF_INET6) for found in _dump(family)]

    def ended(self) -> list[Socket]:
        """The TCP and UDP sockets that ended since the last call, with their final counters (UDP has none: 0)."""
        found: list[Socket] = []
        while True:
            try:
                found += (parse_socket(body) for _, body in _messages(self._ends.recv(1 << 16)))
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost = True

    def close(self) -> None:
        self._ends.close()


def _netlink() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _SOCK_DIAG)


def _dump(family: int) -> Iterator[Socket]:
    request = _REQUEST.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _STATES)
    with _netlink() as kernel:
        kernel.settimeout(1)
        kernel.send(_HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, _DUMP, 0, 0) + request)
        while True:
            for kind, body in _messages(kernel.recv(1 << 16)):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "the kernel lists no sockets")
                yield parse_socket(body)


def _messages(packet: bytes) -> Iterator[tuple[int, bytes]]:
    while packet:
        length, kind, *_ = _HEADER.unpack_from(packet)
        yield kind, packet[_HEADER.size : length]
        packet = packet[_padded(length) :]


def parse_socket(message: bytes) -> Socket:
    """A `struct inet_diag_msg` with its attributes. Raises: OSError if this kernel does not count bytes."""
    family, state, local_port, remote_port, local, remote, low, high, inode = _SOCKET.unpack_from(message)
    return Socket(
        low | high << 32,
        inode,
        state,
        _endpoint(family, local, local_port),
        _endpoint(family, remote, remote_port),
        *_payload(_tcp_info(message), state),
    )


def _endpoint(family: int, ip: bytes, port: bytes) -> Endpoint:
    if family == socket.AF_INET:
        ip = ip[:4]
    elif ip.startswith(bytes(10) + b"\xff\xff"):  # IPv4 through an IPv6 socket
        ip = ip[12:]
    return ip, int.from_bytes(port, "big")


def _tcp_info(message: bytes) -> bytes:
    at = _SOCKET.size
    while at + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, at)
        if kind == _INFO:
            return message[at + 4 : at + length]
        at += _padded(length)
    return b""


def _padded(length: int) -> int:
    return (length + 3) & ~3


def _payload(info: bytes, state: int) -> tuple[int, int]:
    """Bytes sent (without what was sent again) and received, from a `struct tcp_info`.

    The kernel counts the mark that ends a connection as a byte received. On a closed socket nothing tells whether it
    came: there it stays in, so a closed connection counts at most one byte too many, and never too few.
    """
    if not info:
        return 0, 0
    if len(info) < _OLD_COUNTERS.size:
        raise OSError(errno.ENOSYS, "Linux before 4.6 counts no bytes of a socket")
    if len(info) < _COUNTERS.size:
        sent, received, data_segments = _OLD_COUNTERS.unpack_from(info)  # acknowledged, up to two marks included
        repeated = 0
    else:
        _, received, data_segments, sent, repeated = _COUNTERS.unpack_from(info)
    mark = state in (CLOSE_WAIT, LAST_ACK, CLOSING)
    return sent - repeated, received - mark if data_segments else 0
