"""Writing a slice store: killed and begun again, two at once, a full disk, little memory."""

import errno
import os
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from test_store import hashes
from torch import Tensor

from stl_lightning.errors import DataError, StoreError
from stl_lightning.paths import StorePaths
from stl_lightning.sources import Source
from stl_lightning.spectral import SpectralSplit
from stl_lightning.store import DTYPES, open_store, prepare_store, ranges, verify, writer


def test_images_that_are_not_finite(tmp_path: Path) -> None:
    for dtype in DTYPES:
        with pytest.raises(DataError, match=rf"finite in {dtype}"):
            generated(tmp_path / dtype, 20, (1, 4, 4), dtype, spoil=True)


@dataclass
class Generated:
    """Images that are made when they are fetched: a data set of any size that takes no memory."""

    n: int
    shape: tuple[int, int, int]
    pause_s: float = 0.0
    spoil: bool = False

    @property
    def labels(self) -> Tensor:
        return torch.arange(self.n) % 3

    def __len__(self) -> int:
        return self.n

    def fetch(self, indices: Tensor) -> Tensor:
        time.sleep(self.pause_s)
        values = (torch.as_tensor(indices)[:, None, None, None] * 7919 % 251) + torch.arange(self.shape[-1])
        images = (values / 600).expand(-1, *self.shape[:2], -1).clone()
        if self.spoil:
            images[-1, 0, 0, 0] = torch.nan
        return images


def generated(folder: Path, n: int, shape: tuple[int, int, int], dtype: str = "float32", **options: Any) -> bool:
    """Prepare a store of generated images; also what the child processes of the tests below do."""
    images = {"train": Generated(n, shape, **options), "test": Generated(max(1, n // 10), shape, **options)}
    source = Source("generated", shape, ["a", "b", "c"], "f", images.__getitem__)  # type: ignore[arg-type]
    return prepare_store(folder, source, SpectralSplit(shape, 2), dtype)


def child(work: Callable[[], object]) -> BaseProcess:
    """A process in a group of its own, so that it can be killed with its workers.

    With one thread: a fork of a process that has used OpenMP would wait for threads that it does not have.
    """
    process = get_context("fork").Process(target=lambda: (os.setsid(), torch.set_num_threads(1), work()))
    process.start()
    return process


def wait_for(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def journaled(folder: Path) -> int:
    """Ranges in the journal of an unfinished store."""
    path = StorePaths(folder).partial.journal
    return int((~np.isnan(np.load(path)[:, 0, 0])).sum()) if path.exists() else 0


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store whose writer got a SIGKILL in the middle."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 4096)
    monkeypatch.setattr(writer, "COMMIT_S", 0.0)
    folder = tmp_path / "store"
    process = child(lambda: generated(folder, 300, (1, 8, 8), pause_s=0.05))
    wait_for(lambda: journaled(folder) >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return folder


def test_killed_in_the_middle_and_given_again(killed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not killed.exists()
    with pytest.raises(StoreError, match="not finished"):
        open_store(killed)
    with pytest.raises(StoreError, match="dtype is 'float32' there and 'int8' here"):
        generated(killed, 300, (1, 8, 8), "int8")
    n_before, fetched = journaled(killed), tmp_path / "fetched"
    real = Generated.fetch

    def counted(self: Generated, indices: Tensor) -> Tensor:
        with fetched.open("a") as file:  # workers are other processes
            file.write("x")
        return real(self, indices)

    monkeypatch.setattr(Generated, "fetch", counted)
    assert generated(killed, 300, (1, 8, 8))
    assert 0 < len(fetched.read_text()) == 21 - n_before  # 300 + 30 images, 16 a range
    monkeypatch.setattr(Generated, "fetch", real)
    generated(tmp_path / "whole", 300, (1, 8, 8))
    resumed, whole = open_store(killed), open_store(tmp_path / "whole")
    assert hashes(resumed) == hashes(whole)
    assert resumed.manifest.slices == whole.manifest.slices
    assert sorted(path.name for path in killed.iterdir()) == ["manifest.json", "test", "train"]
    assert not StorePaths(killed).partial.folder.exists()


def test_killed_between_the_manifest_and_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(writer, "_publish", lambda paths: None)
        generated(tmp_path / "store", 30, (1, 4, 4))
    partial = StorePaths(tmp_path / "store").partial
    (partial.folder / ".journal.npy.0a1b").write_text("left over")
    monkeypatch.setattr(writer, "_fill", lambda *_: pytest.fail("nothing is missing"))
    assert generated(tmp_path / "store", 30, (1, 4, 4))
    assert verify(tmp_path / "store") == []
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["manifest.json", "test", "train"]


def test_complete_stores_are_left_alone(tmp_path: Path) -> None:
    assert generated(tmp_path / "store", 30, (1, 4, 4))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert not generated(tmp_path / "store", 30, (1, 4, 4))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_two_writers_of_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "store"
    monkeypatch.setattr(writer, "LOCK_S", 0.1)
    with FileLock(StorePaths(folder).lock), pytest.raises(StoreError, match="another `stl prepare` is writing"):
        generated(folder, 30, (1, 4, 4))
    generated(tmp_path / "theirs", 30, (1, 4, 4))
    lock = writer._locked

    @contextmanager
    def late(paths: StorePaths) -> Iterator[None]:
        with lock(paths):
            (tmp_path / "theirs").rename(folder)  # the other writer had finished when the lock was free
            yield

    monkeypatch.setattr(writer, "_locked", late)
    assert not generated(folder, 30, (1, 4, 4))


def test_a_disk_that_is_too_small_is_seen_before_work_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    monkeypatch.setattr(Generated, "fetch", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(StoreError, match=r"0\.002 GB free for .*store.*received 0\.000 GB.*int8"):
        generated(tmp_path / "store", 500, (1, 32, 32))


def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As disks do it: the last write that fits is cut short, the next one fails."""
    real, room = os.pwrite, [100_000]

    def limited(descriptor: int, data: memoryview, offset: int) -> int:
        if room[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= (fits := min(room[0], len(data)))
        return real(descriptor, data[:fits], offset)

    monkeypatch.setattr(os, "pwrite", limited)
    with pytest.raises(StoreError) as raised:
        generated(tmp_path / "store", 500, (1, 32, 32))
    monkeypatch.undo()
    assert re.search(r"cannot write .*store.*No space left.*free the disk.*same command", str(raised.value))
    assert "Traceback" not in str(raised.value)
    generated(tmp_path / "whole", 500, (1, 32, 32))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:5000], offset))
    assert generated(tmp_path / "store", 500, (1, 32, 32))
    assert hashes(open_store(tmp_path / "store")) == hashes(open_store(tmp_path / "whole"))


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """220 MB of slices in 50 MB, a limit that holds for each process."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 2**20)

    def limited() -> None:
        status = Path("/proc/self/status").read_text()
        taken_kb = int(re.findall(r"VmData:\s*(\d+)", status)[0])
        resource.setrlimit(resource.RLIMIT_DATA, (taken_kb * 1024 + 50_000_000,) * 2)
        generated(tmp_path / "store", 4000, (3, 64, 64))

    process = child(limited)
    process.join()
    assert process.exitcode == 0
    assert sum(row.bytes for row in open_store(tmp_path / "store").manifest.files.values()) > 210_000_000
