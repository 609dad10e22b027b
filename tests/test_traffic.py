"""What a rank sends is counted to the byte, by real sockets of real processes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stl_lightning.traffic import Traffic, kernel
from stl_lightning.traffic.kernel import KernelSockets

CHECKOUT = Path(__file__).resolve().parent.parent
ANSWER = b"done\n"
N_BYTES = 300_007  # several segments, not a round number


def kernel_counts() -> bool:
    try:
        KernelSockets().close()
    except OSError:
        return False
    return True


needs_kernel = pytest.mark.skipif(not kernel_counts(), reason="this system does not count bytes of sockets")


@pytest.fixture(scope="module")
def others() -> Iterator[dict[str, tuple[str, int]]]:
    """A foreign process (this one): takes a line on any connection and answers when it has all of it."""
    servers = {"ipv4": socket.create_server(("127.0.0.1", 0))}
    with contextlib.suppress(OSError):
        servers["ipv6"] = socket.create_server(("::1", 0), family=socket.AF_INET6)
    for server in servers.values():
        threading.Thread(target=serve, args=(server,), daemon=True).start()
    yield {name: server.getsockname()[:2] for name, server in servers.items()}
    for server in servers.values():
        server.close()


def serve(server: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the server was closed
        while True:
            threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()


def answer(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while received := connection.recv(1 << 16):
            if received.endswith(b"\n"):
                connection.sendall(ANSWER)


PRELUDE = """
import json, os, socket, subprocess, sys, time
from stl_lightning.traffic import Traffic

HOST, PORT, N = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
ME = sys.executable

def send(connection, n=N):
    connection.sendall(b"x" * (n - 1) + b"\\n")
    assert connection.recv(100) == b"done\\n"

def connect():
    return socket.create_connection((HOST, PORT))

def start(*command):
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

SENDER = "import socket, sys; c = socket.create_connection((sys.argv[1], int(sys.argv[2])));" \\
    "c.sendall(b'x' * (int(sys.argv[3]) - 1) + bytes([10])); c.recv(100); print(flush=True); input();"
traffic = Traffic()
"""


def rank(code: str, to: tuple[str, int]) -> dict[str, Any]:
    """The totals of a process that runs `code` between `traffic` and its end. `code` starts it itself."""
    program = f"{PRELUDE}\n{code}\ntraffic.stop()\nprint(json.dumps(traffic.totals()))"
    command = [sys.executable, "-c", program, to[0], str(to[1]), str(N_BYTES)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(CHECKOUT)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# name -> what a rank does, bytes it sent by program, how many answers came, calls of Python code in the rank
CASES: dict[str, tuple[str, dict[str, int], int, int]] = {
    "one connection": ("traffic.start(); c = connect(); send(c)", {"python": N_BYTES}, 1, 1),
    "closed before any look": ("traffic.start(); c = connect(); send(c); c.close()", {"python": N_BYTES}, 1, 1),
    "twenty closed before any look": (
        "traffic.start()\nfor _ in range(20):\n    with connect() as c:\n        send(c, 11)",
        {"python": 220},
        20,
        20,
    ),
    "closed between two looks": (
        "traffic.start(); c = connect(); send(c); traffic.sample(); send(c); c.close(); traffic.sample()",
        {"python": 2 * N_BYTES},
        2,
        1,
    ),
    "opened and used before": (
        "c = connect(); send(c); traffic.start(); send(c, 10); traffic.sample(); send(c, 10)",
        {"python": 20},
        2,
        0,
    ),
    "opened and used before, then idle": ("c = connect(); send(c); traffic.start(); traffic.sample()", {}, 0, 0),
    "opened before, used and closed before any look": (
        "c = connect(); send(c); traffic.start(); send(c, 10); c.close()",
        {"python": 10},
        1,
        0,
    ),
    "idle": ("traffic.start(); traffic.sample()", {}, 0, 0),
    "started again": ("traffic.start(); send(connect()); traffic.stop(); traffic.start()", {}, 0, 0),
    "after the end": ("traffic.start(); traffic.stop(); send(connect())", {}, 0, 0),
    "a child": (
        "traffic.start(); p = start(ME, '-c', SENDER, HOST, str(PORT), str(N)); p.stdout.readline(); traffic.sample();"
        "p.communicate('go')",
        {"python": N_BYTES},
        1,
        0,
    ),
    "a child that another program started": (
        "traffic.start(); p = start('/bin/sh', '-c', '\"$@\"; :', 'sh', ME, '-c', SENDER, HOST, str(PORT), str(N));"
        "p.stdout.readline(); traffic.sample(); p.communicate('go')",
        {"python": N_BYTES},
        1,
        0,
    ),
    "a forked child": (
        "traffic.start(); r, w = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    c = connect(); send(c); os.write(w, b'x'); time.sleep(0.2); os._exit(traffic.totals()['connections'])\n"
        "os.read(r, 1); traffic.sample(); assert os.wait()[1] == 0",  # only the parent notes calls
        {"python": N_BYTES},
        1,
        0,
    ),
    "another program": (
        "traffic.start(); p = start('bash', '-c', f'exec 3<>/dev/tcp/{HOST}/{PORT}; echo hello >&3; read a <&3; echo;"
        " read b'); p.stdout.readline(); traffic.sample(); p.communicate('go')",
        {"bash": 6},
        1,
        0,
    ),
    "inside the tree": (
        "traffic.start(); server = socket.create_server((HOST, 0)); PORT = server.getsockname()[1]\n"
        "p = start(ME, '-c', SENDER, HOST, str(PORT), str(10)); a, _ = server.accept(); a.sendall(b'y' * 99)\n"
        "p.stdout.readline(); traffic.sample(); p.communicate('go'); a.close(); traffic.sample()",
        {},
        0,
        1,  # bind
    ),
    "inside the tree, between two looks": (
        'server = \'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True);'
        " a = s.accept()[0]; a.recv(9); a.close(); input()'\n"
        "traffic.start(); p = start(ME, '-c', server); port = int(p.stdout.readline()); traffic.sample()\n"
        "c = socket.create_connection(('127.0.0.1', port)); c.sendall(b'x'); c.recv(1); c.close(); traffic.sample();"
        "p.communicate('go')",
        {},
        0,
        1,
    ),
}


@needs_kernel
@pytest.mark.parametrize("name", CASES)
def test_bytes_are_counted_exactly(name: str, others: dict[str, tuple[str, int]]) -> None:
    code, sent, n_answers, n_calls = CASES[name]
    totals = rank(code, others["ipv4"])
    assert {program: row[0] for program, row in totals["by_program"].items()} == sent
    assert totals["bytes_sent"] == sum(sent.values())
    # Of a closed connection, the mark that ended it may count as a byte received.
    assert 0 <= totals["bytes_received"] - n_answers * len(ANSWER) <= n_answers
    assert totals["connections"] == n_calls
    host, port = others["ipv4"]
    assert totals["remotes"] == ([f"{host}:{port}"] if sent else [])
    assert "missed" not in totals["method"]


@needs_kernel
@pytest.mark.parametrize("target", ["ipv6", "ipv4 through ipv6"])
def test_ipv6_is_counted(target: str, others: dict[str, tuple[str, int]]) -> None:
    if "ipv6" not in others:
        pytest.skip("no IPv6 on this machine")
    host, port = others["ipv6"] if target == "ipv6" else (f"::ffff:{others['ipv4'][0]}", others["ipv4"][1])
    totals = rank("traffic.start(); c = connect(); send(c)", (host, port))
    assert (totals["bytes_sent"], totals["bytes_received"]) == (N_BYTES, len(ANSWER))
    assert totals["remotes"] == [f"[::1]:{port}" if target == "ipv6" else f"127.0.0.1:{port}"]


@pytest.fixture
def lonely(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@needs_kernel
@pytest.mark.usefixtures("lonely")
def test_an_all_reduce_is_seen(tmp_path: Path) -> None:
    """Between this process and another one, which counts."""
    together = f"""
import torch
def reduce(rank):
    torch.distributed.init_process_group("gloo", "file://{tmp_path}/store", rank=rank, world_size=2)
    torch.distributed.all_reduce(torch.ones(50_000))
    torch.distributed.barrier()  # both have all of it: nothing waits in a buffer
"""
    counting = """
import json
from stl_lightning.traffic import Traffic
traffic = Traffic()
traffic.start()
reduce(1)
traffic.sample()
torch.distributed.barrier()
print(json.dumps(traffic.totals()))
"""
    env = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    other = subprocess.Popen([sys.executable, "-c", together + counting], env=env, stdout=subprocess.PIPE)
    here: dict[str, Any] = {}
    exec(together, here)
    here["reduce"](0)
    torch.distributed.barrier()
    totals = json.loads(other.communicate(timeout=60)[0])
    assert totals["bytes_sent"] > 50_000 * 4
    assert totals["bytes_received"] > 50_000 * 4
    assert totals["remotes"]


@needs_kernel
def test_a_look_takes_two_requests_for_all_sockets(
    others: dict[str, tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests: list[int] = []
    monkeypatch.setattr(kernel, "_dump", lambda family, real=kernel._dump: requests.append(family) or real(family))
    traffic = Traffic()
    traffic.start()
    with contextlib.ExitStack() as held:
        for _ in range(20):
            held.enter_context(socket.create_connection(others["ipv4"]))
        requests.clear()
        traffic.sample()
        assert requests == [socket.AF_INET, socket.AF_INET6]
        traffic.stop()


def test_looks_of_several_threads_agree(others: dict[str, tuple[str, int]]) -> None:
    """A heartbeat looks while the training connects: all calls are counted, whoever makes them."""
    traffic = Traffic()
    traffic.start()

    def connect() -> None:
        for _ in range(50):
            socket.create_connection(others["ipv4"]).close()

    threads = [threading.Thread(target=connect) for _ in range(3)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        traffic.sample()
    traffic.stop()
    assert traffic.totals()["connections"] == 150


@pytest.mark.parametrize(
    "use",
    [
        lambda to: socket.create_connection(to).close(),
        lambda to: datagram().sendto(b"x", to),
        lambda to: datagram().sendmsg([b"x"], [], 0, to),
        lambda to: datagram().bind(("127.0.0.1", 0)),
        lambda to: socket.socket().connect_ex(("127.0.0.1", 1)),  # nobody listens there
    ],
    ids=["connect", "sendto", "sendmsg", "bind", "refused"],
)
def test_every_use_of_the_network_by_python_is_noticed(
    use: Callable[[tuple[str, int]], object], others: dict[str, tuple[str, int]]
) -> None:
    traffic = Traffic()
    traffic.start()
    use(others["ipv4"])
    traffic.stop()
    use(others["ipv4"])
    assert traffic.totals()["connections"] == 1


def datagram() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


def test_unix_sockets_are_no_network(tmp_path: Path) -> None:
    traffic = Traffic()
    traffic.start()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    traffic.stop()
    assert traffic.totals()["connections"] == 0


def test_where_the_system_does_not_tell_the_totals_say_so(
    monkeypatch: pytest.MonkeyPatch, others: dict[str, tuple[str, int]]
) -> None:
    monkeypatch.delattr(socket, "AF_NETLINK", raising=False)
    traffic = Traffic()
    traffic.start()
    socket.create_connection(others["ipv4"]).close()
    traffic.sample()
    traffic.stop()
    totals = traffic.totals()
    assert (totals["bytes_sent"], totals["bytes_received"], totals["connections"]) == (None, None, 1)
    assert "missed: the bytes, since the system does not tell: " in totals["method"]


@needs_kernel
@pytest.mark.parametrize("method", ["alive", "ended"])
def test_a_look_that_fails_is_stated_and_the_next_one_counts(method: str, others: dict[str, tuple[str, int]]) -> None:
    code = f"""
from unittest.mock import patch
traffic.start()
with connect() as c:
    send(c)
time.sleep(0.02)
with patch("stl_lightning.traffic.count.KernelSockets.{method}", side_effect=OSError("not now")):
    traffic.sample()
"""
    totals = rank(code, others["ipv4"])
    assert totals["bytes_sent"] == N_BYTES
    assert "missed: a look, since the system did not answer: not now" in totals["method"]


def test_counting_imports_no_torch() -> None:
    code = "import sys, stl_lightning.traffic; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)
