"""The ledger of sockets alone, and what the kernel writes of a socket."""

import socket
import struct

import pytest

from stl_lightning.traffic.kernel import CLOSE_WAIT, LISTEN, Socket, parse_socket
from stl_lightning.traffic.ledger import N_REMOTES, Ledger


def connection(cookie: int, sent: int, received: int = 0, port: int = 1000, remote: int = 80, state: int = 1) -> Socket:
    return Socket(cookie, cookie, state, (bytes([10, 0, 0, 1]), port), (bytes([10, 0, 0, 2]), remote), sent, received)


def test_an_ended_socket_leaves_its_bytes_and_is_forgotten() -> None:
    ledger = Ledger(before=[connection(1, 30, 3)])
    for cookie in range(1, 3001):
        ledger.claim(cookie, "loader")
        ledger.update([connection(cookie, 40, 4, remote=cookie)], [])
        ledger.update([], [connection(cookie, 50, 5, remote=cookie)])
        assert cookie not in ledger
    assert ledger.by_program() == {"loader": [3000 * 50 - 30, 3000 * 5 - 3]}
    assert len(ledger.remotes()) == N_REMOTES


def test_sockets_nobody_claimed_do_not_count() -> None:
    ledger = Ledger()
    ledger.update([connection(1, 40)], [connection(2, 50)])
    assert (ledger.by_program(), ledger.remotes()) == ({}, [])


def test_a_connection_to_a_server_of_the_tree_is_internal_though_both_end_at_once() -> None:
    server = Socket(1, 1, LISTEN, (bytes(4), 80), (bytes(4), 0), 0, 0)
    client = Socket(2, 2, 1, (bytes([127, 0, 0, 1]), 1000), (bytes([127, 0, 0, 1]), 80), 5, 5)
    ledger = Ledger()
    for each in (server, client):
        ledger.claim(each.cookie, "python")
    ledger.update([server], [])
    ledger.update([], [server._replace(state=7), client])
    assert (ledger.by_program(), ledger.remotes()) == ({}, [])


def test_a_server_is_no_remote() -> None:
    ledger = Ledger()
    ledger.claim(1, "python")
    ledger.update([connection(1, 0, remote=0, state=LISTEN)], [])
    assert ledger.remotes() == []


def message(state: int, info: bytes, family: int = socket.AF_INET) -> bytes:
    head = struct.pack("=BBxx2s2s16s16s4xII16xI", family, state, b"\0\x50", b"\1\0", bytes(16), bytes(16), 5, 1, 77)
    return head + struct.pack("=HHB3x", 5, 8, 0) + struct.pack("=HH", 4 + len(info), 2) + info


def tcp_info(data_segments: int, received: int) -> bytes:
    numbers = struct.pack("=QQ16xI4xQQQQ8x", 1001, received, data_segments, 0, 0, 0, 0)
    return (bytes(120) + numbers + struct.pack("=QQ", 1200, 200)).ljust(280, b"\0")


@pytest.mark.parametrize(
    ("state", "data_segments", "received", "expected"),
    [(1, 3, 500, 500), (CLOSE_WAIT, 3, 501, 500), (CLOSE_WAIT, 0, 1, 0), (7, 0, 1, 0), (7, 3, 501, 501)],
)
def test_the_mark_that_ends_a_connection(state: int, data_segments: int, received: int, expected: int) -> None:
    found = parse_socket(message(state, tcp_info(data_segments, received)))
    assert (found.bytes_sent, found.bytes_received) == (1200 - 200, expected)
    assert (found.cookie, found.inode, found.local[1], found.remote[1]) == (5 | 1 << 32, 77, 80, 256)


def test_older_kernels() -> None:
    assert parse_socket(message(1, tcp_info(3, 500)[:192])).bytes_sent == 1001
    assert parse_socket(message(7, b"")[:-4]).bytes_sent == 0  # a UDP socket
    with pytest.raises(OSError, match=r"Linux before 4\.6"):
        parse_socket(message(1, tcp_info(3, 500)[:104]))
