"""What Linux tells of the tree of a rank's processes, and of its node."""

import os
import socket
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from test_traffic import kernel_counts

from stl_lightning.traffic import Traffic, node
from stl_lightning.traffic.node import ProcessTree, node_bytes


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_look_asks_no_process_twice_for_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine has hundreds, and a rank looks every few seconds."""
    asked: Counter[int] = Counter()
    monkeypatch.setattr(node, "parent_of", lambda pid, real=node.parent_of: asked.update([pid]) or real(pid))
    tree = ProcessTree(os.getpid())
    for _ in range(3):
        tree.holders()
    assert set(asked.values()) == {1}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_descendant_stays_in_the_tree_when_its_parent_ends() -> None:
    shell = subprocess.Popen(
        ["/bin/sh", "-c", "sleep 60 >/dev/null & echo $!; read line"], stdin=-1, stdout=-1, text=True
    )
    assert shell.stdin is not None
    assert shell.stdout is not None
    sleeper = int(shell.stdout.readline())
    tree = ProcessTree(shell.pid)
    try:
        assert tree.pids() == [shell.pid, sleeper]
        shell.communicate("\n")
        assert tree.pids() == [sleeper]
    finally:
        os.kill(sleeper, 9)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_socket_that_children_inherit_is_its_parent_s() -> None:
    with socket.socket() as shared:
        child = subprocess.Popen(["cat"], stdin=-1, pass_fds=[shared.fileno()])
        held = ProcessTree(child.pid).holders(), ProcessTree(os.getpid()).holders()
        child.communicate()
        inode = os.fstat(shared.fileno()).st_ino
    assert [holders[inode] for holders in held] == [child.pid, os.getpid()]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_process_that_may_not_be_looked_into_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_allowed(pid: int) -> list[int]:
        raise PermissionError(pid)

    monkeypatch.setattr("stl_lightning.traffic.node.socket_inodes", not_allowed)
    traffic = Traffic()
    traffic.start()
    traffic.stop()
    assert not kernel_counts() or "missed: processes whose open files" in traffic.totals()["method"]


def test_bytes_of_the_node(tmp_path: Path) -> None:
    row = "  {}: {} 1 0 0 0 0 0 0 {} 2 0 0 0 0 0 0\n"
    (tmp_path / "dev").write_text(
        "head\nhead\n" + row.format("lo", 7, 7) + row.format("eth0", 100, 20) + row.format("ib0", 3, 4)
    )
    for name, words in (("port_xmit_data", "5"), ("port_rcv_data", "50"), ("port_xmit_wait", "9")):
        path = tmp_path / "infiniband/mlx5_0/ports/1/counters" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(words + "\n")
    assert node_bytes(tmp_path / "dev", tmp_path / "infiniband") == (24 + 4 * 5, 103 + 4 * 50)
    assert node_bytes(tmp_path / "dev", tmp_path / "none") == (24, 103)
    assert node_bytes(tmp_path / "none", tmp_path / "none") is None
