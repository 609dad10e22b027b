"""What a branch in training sends is recorded, and a process group is refused at the call."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_training import Calls, die_at, make_job, train_branch

from stl_lightning.status import read_status


def test_what_a_rank_sends_is_recorded(tmp_path: Path) -> None:
    """Nothing; and as a control, what a callback sends to another process, over two attempts."""
    quiet = make_job(tmp_path / "quiet")
    assert train_branch(quiet) == "finished"
    counted = read_status(quiet.paths, 0).traffic
    if counted["bytes_sent"] is None:
        pytest.skip(f"bytes cannot be counted here: {counted['method']}")
    assert (counted["bytes_sent"], counted["bytes_received"], counted["connections"]) == (0, 0, 0)

    with stranger() as address:

        def send() -> None:
            with socket.create_connection(address) as connection:
                connection.sendall(bytes(1000))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)  # until the other has closed too: the kernel counts a socket when it is gone

        killed = make_job(tmp_path / "loud", trainer={"callbacks": [Calls(send), die_at(15)]})
        assert train_branch(killed) == "failed"
        assert read_status(killed.paths, 0).traffic["bytes_sent"] == 2000  # two epochs began
        again = make_job(tmp_path / "loud", trainer={"callbacks": [Calls(send)]})
        assert train_branch(again) == "finished"
        assert read_status(again.paths, 0).traffic["bytes_sent"] == 3000  # the second was resumed, not begun


@contextmanager
def stranger() -> Iterator[tuple[str, int]]:
    """The address of a process that is no descendant of this one (its parent ends at once) and reads what is sent."""
    serve = """
import os, socket
server = socket.create_server(("127.0.0.1", 0))
if child := os.fork():
    print(server.getsockname()[1], child)
    raise SystemExit
while True:
    connection = server.accept()[0]
    while connection.recv(4096):
        pass
    connection.close()
"""
    started = subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE)
    assert started.stdout is not None
    port, pid = map(int, started.stdout.readline().split())
    started.wait()
    try:
        yield "127.0.0.1", port
    finally:
        os.kill(pid, signal.SIGKILL)
        started.stdout.close()


def test_a_process_group_is_refused_at_the_call(tmp_path: Path) -> None:
    job = make_job(tmp_path, trainer={"callbacks": [Calls(lambda: torch.distributed.init_process_group("gloo"))]})
    assert train_branch(job) == "failed"
    assert "init_process_group was called while a branch trains" in read_status(job.paths, 0).error
