"""A slice store holds what a direct split gives, says when it does not, and survives a kill, a full disk, a rival."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
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
from torch import Tensor

from stl_lightning.__main__ import main
from stl_lightning.errors import ConfigError, DataError, StoreError
from stl_lightning.images import as_float
from stl_lightning.paths import StorePaths
from stl_lightning.sources import SPLITS, Source, open_source
from stl_lightning.spectral import TRANSFORMS, SpectralSplit
from stl_lightning.store import DTYPES, Store, open_store, prepare_store, ranges, verify, writer
from stl_lightning.store.encoding import LEVELS, best_scale, decode, encode

CHECKOUT = Path(__file__).resolve().parent.parent
CONFIG = ["--config", str(CHECKOUT / "configs" / "digits.yaml")]

Capture = pytest.CaptureFixture[str]


def split_of(transform: str = "dct2", block: int | tuple[int, int] = 2, **settings: Any) -> SpectralSplit:
    source = open_source("digits")
    split = SpectralSplit(source.image_shape, block, transform=transform, **settings)
    return split.fit(as_float(source.load("train").fetch(torch.arange(500))))


def prepared(folder: Path, split: SpectralSplit | None = None, dtype: str = "float32", n_workers: int = 1) -> Store:
    prepare_store(folder, open_source("digits"), split or split_of(), dtype, val_size=0.1, n_workers=n_workers)
    return open_store(folder)


def direct(split: SpectralSplit, part: str) -> list[Tensor]:
    images = open_source("digits").load(part)
    return split(as_float(images.fetch(torch.arange(len(images)))))


def hashes(store: Store) -> dict[str, str]:
    return {name: facts.sha256 for name, facts in store.manifest.files.items()}


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even digits are many ranges, whose workers finish in any order."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 100 * 4 * 64)


# What is stored


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_store_holds_the_slices_of_a_direct_split(transform: str, tmp_path: Path, short_ranges: None) -> None:
    split = split_of(transform, (2, 4))
    store = prepared(tmp_path / "store", split, n_workers=2)
    for part in SPLITS:
        for k, expected in enumerate(direct(split, part)):
            stored = store.slice(part, k)
            torch.testing.assert_close(stored.values, expected, atol=1e-6, rtol=0)
            assert torch.equal(stored.gather(torch.tensor([7, 3, 3])), stored.values[[7, 3, 3]])
            assert len(stored) == store.manifest.n_images(part)
        assert torch.equal(store.labels(part), open_source("digits").load(part).labels)
    assert torch.equal(store.matrix, split.matrix)
    assert store.source.class_names == open_source("digits").class_names


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_is_as_near_as_its_steps_allow(dtype: str, tmp_path: Path) -> None:
    split = split_of()
    store = prepared(tmp_path / "store", split, dtype)
    for k, expected in enumerate(direct(split, "train")):
        stored = store.slice("train", k)
        read = stored.gather(torch.arange(len(expected)))
        assert read.dtype == torch.float32
        assert stored.values.dtype == DTYPES[dtype]
        if stored.scale is None:
            torch.testing.assert_close(read, expected, atol=1e-6, rtol=torch.finfo(DTYPES[dtype]).eps)
            continue
        clipped = expected.abs() > (LEVELS + 0.5) * stored.scale
        assert (read - expected)[~clipped].abs().max() <= 0.5001 * stored.scale.max()
        assert torch.equal(stored.values[clipped].abs(), torch.full_like(stored.values[clipped], LEVELS))


def test_the_step_of_int8_is_the_best_there_is() -> None:
    """No step nearby loses less; and heavy tails are worth clipping: the largest value would cost much more."""
    sample = torch.randn(200, 2, 30, 30, generator=torch.Generator().manual_seed(0)) ** 3
    sample *= torch.tensor([1.0, 50.0])[:, None, None]

    def loss(scale: Tensor) -> Tensor:
        return (decode(encode(sample, torch.int8, scale), scale) - sample).square().mean((0, 2, 3))

    chosen = best_scale(sample)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert (loss(chosen * factor) > loss(chosen)).all()
    by_peak = sample.abs().amax((0, 2, 3))[:, None, None] / LEVELS
    assert (loss(by_peak) > 1.2 * loss(chosen)).all()
    assert chosen[1] == pytest.approx(50 * chosen[0], rel=0.3)


def test_statistics_are_those_of_the_training_slices(tmp_path: Path, short_ranges: None) -> None:
    split = split_of("dft", (1, 4))
    facts = prepared(tmp_path / "store", split, "int8", n_workers=2).manifest.slices
    slices = direct(split, "train")
    for row, x in zip(facts, slices, strict=True):
        torch.testing.assert_close(torch.tensor(row.mean), x.mean((0, 2, 3)), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(row.std), x.std((0, 2, 3), correction=0), atol=1e-5, rtol=0)
    pixels = as_float(open_source("digits").load("train").pixels)
    assert sum(row.energy for row in facts) == pytest.approx(float(pixels.square().sum()) / len(pixels), rel=1e-5)
    clipped = sum(
        int((x.abs() > (LEVELS + 0.5) * torch.tensor(row.scale)[:, None, None]).sum())
        for part in SPLITS
        for row, x in zip(facts, direct(split, part), strict=True)
    )
    assert sum(row.n_clipped for row in facts) == clipped


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, short_ranges: None) -> None:
    one, two = (prepared(tmp_path / f"{n}", n_workers=n) for n in (1, 2))
    assert one.manifest.files == two.manifest.files
    assert one.manifest.slices == two.manifest.slices


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.slice("train", 0).values.fill_(3)
    assert verify(store.paths.folder) == []
    assert not torch.equal(store.slice("train", 0).values[:1], torch.full((1, 1, 4, 4), 3.0))


# What is refused


def flip_byte(path: Path, offset: int = 5000) -> None:
    """One bit, with size and time of the file as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_is_found(tmp_path: Path, capsys: Capture) -> None:
    store = prepared(tmp_path / "store")
    flip_byte(store.paths.slice("train", 2))
    flip_byte(store.paths.labels("test"), 200)
    assert verify(store.paths.folder) == ["test/labels.npy", "train/slice-02.npy"]
    assert verify(store.paths.folder, [0]) == ["test/labels.npy"]
    with pytest.raises(StoreError, match=r"slice-02\.npy.*damaged.*stl prepare"):
        store.slice("train", 2)
    store.slice("train", 1)
    assert main(["verify", str(store.paths.folder), "--slices", "1,2"]) == 1
    assert "damaged: train/slice-02.npy" in capsys.readouterr().err
    flip_byte(store.paths.labels("test"), 200)
    assert main(["verify", str(store.paths.folder), "--slices", "0,1"]) == 0


def test_files_of_another_size_and_missing_ones(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.paths.slice("train", 3).unlink()
    open_store(store.paths.folder).slice("train", 0)  # a rank needs no slice but its own
    assert verify(store.paths.folder) == ["train/slice-03.npy"]
    with pytest.raises(StoreError, match=r"slice-03\.npy"):
        store.slice("train", 3)
    with store.paths.slice("train", 1).open("ab") as file:
        file.write(b"more")
    with pytest.raises(StoreError, match=r"sizes.*slice-01\.npy"):
        open_store(store.paths.folder)


def test_a_damaged_manifest_and_one_of_another_version(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    path = store.paths.manifest
    text = path.read_text()
    path.write_text(text.replace('"n_test": 3', '"n_test": 2'))
    assert path.read_text() != text
    with pytest.raises(StoreError, match="damaged"):
        open_store(store.paths.folder)
    path.write_text(text[:1000])
    with pytest.raises(StoreError, match="damaged"):
        open_store(store.paths.folder)
    path.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(StoreError, match="version 1, received 99"):
        open_store(store.paths.folder)


def test_no_store_and_no_such_slice(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"data\.store.*stl prepare"):
        open_store(tmp_path / "nowhere")
    store = prepared(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        store.slice("train", 4)
    with pytest.raises(ConfigError, match="test, train"):
        store.slice("val", 0)
    with pytest.raises(ConfigError, match="--slices"):
        verify(store.paths.folder, [4])
    with pytest.raises(StoreError, match=r"data\.store=null"):
        store.source.load("train")


SETTINGS = {"source": "digits", "block": 2, "transform": "dct2", "reorganisation": "polyphase", "pad": None}
OTHER = {
    "source": "mnist", "block": (1, 4), "transform": "dct", "reorganisation": "tiles", "pad": "zeros", "image_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_run_of_other_settings_is_told_which(key: str, tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.check(SETTINGS | {"seed": 3, "val_size": 0.3, "batch_size": 9})  # a store serves every seed and split
    with pytest.raises(StoreError, match=rf"settings: {key} is .* there and .* here.*data\.store") as raised:
        store.check(SETTINGS | {key: OTHER[key]})
    assert str(raised.value).count(" there and ") == 1


@pytest.mark.parametrize(
    ("transform", "matters"), [("random", {"seed"}), ("klt", {"seed", "val_size"}), ("dct", set())]
)
def test_what_the_matrix_depends_on_must_agree(transform: str, matters: set[str], tmp_path: Path) -> None:
    store = prepared(tmp_path / "store", split_of(transform, seed=1))
    same = SETTINGS | {"transform": transform, "seed": 1, "val_size": 0.1}
    store.check(same)
    for key, other in {"seed": 2, "val_size": 0.2}.items():
        if key in matters:
            with pytest.raises(StoreError, match=key):
                store.check(same | {key: other})
            with pytest.raises(StoreError, match=f"{key} is .* there and None here"):
                store.check({name: value for name, value in same.items() if name != key})
        else:
            store.check(same | {key: other})


def test_other_settings_for_the_same_folder(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    with pytest.raises(StoreError, match="transform is 'dct2' there and 'haar' here"):
        prepared(tmp_path / "store", split_of("haar"))
    with pytest.raises(StoreError, match="dtype is 'float32' there and 'int8' here"):
        prepared(tmp_path / "store", dtype="int8")
    with pytest.raises(ConfigError, match="float16, float32, int8"):
        prepared(tmp_path / "other", dtype="int4")
    assert verify(store.paths.folder) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    with pytest.raises(StoreError, match="received other files"):
        prepared(tmp_path / "mine")


def test_images_that_are_not_finite(tmp_path: Path) -> None:
    for dtype in DTYPES:
        with pytest.raises(DataError, match=rf"finite in {dtype}"):
            generated(tmp_path / dtype, 20, (1, 4, 4), dtype, spoil=True)


# Killed, filled up, at once


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


# The commands


def test_the_commands(tmp_path: Path, capfd: Capture) -> None:
    folder = str(tmp_path / "store")
    args = [*CONFIG, "--data.transform=klt", "--data.store", folder, "--workers=1", "--dtype=float16"]
    assert main(["prepare", *args]) == 0
    assert re.search(r"written: .*store \(4 slices of \d+ \+ \d+ images, 0\.000 GB", capfd.readouterr().out)
    assert main(["prepare", *args]) == 0
    assert "is complete" in capfd.readouterr().out
    assert main(["prepare", *args, "--data.val_size=77"]) == 2
    assert "val_size is" in capfd.readouterr().err
    store = open_store(folder)
    assert store.dtype == "float16"
    assert (store.matrix @ store.matrix.T - torch.eye(4)).abs().max() < 1e-5
    assert main(["verify", folder]) == 0
    assert "all files are intact" in capfd.readouterr().out
    for bad, said in {"--workers=0": "--workers", "--dtype=bf16": "float16, float32, int8"}.items():
        assert main(["prepare", *args, bad]) == 2
        assert said in capfd.readouterr().err
    assert main(["prepare", *CONFIG]) == 2
    assert "data.store" in capfd.readouterr().err
    assert main(["verify", folder, "--slices=a"]) == 2


@pytest.mark.parametrize("command", ["prepare", "verify"])
def test_help_needs_nothing_heavy(command: str) -> None:
    code = f"""
        import contextlib
        from stl_lightning.__main__ import main
        with contextlib.suppress(SystemExit):
            main([{command!r}, "--help"])
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + textwrap.dedent(code)], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert f"usage: stl {command}" in done.stdout
