"""Writing a slice store: every image is read once, in parallel, and its slices go to all B files.

Worker processes write ranges of images straight to their place in the files. This process keeps the journal of the
ranges that are on the disk, and goes on with the others if a writer was killed. The store gets its name when it is
complete.

Letters: n samples, c channels, h w space.
"""

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from stl_lightning.errors import STLError, StoreError, unknown
from stl_lightning.paths import StorePaths, write_atomically
from stl_lightning.sources import SPLITS, Source
from stl_lightning.spectral import SpectralSplit
from stl_lightning.store.encoding import DTYPES
from stl_lightning.store.manifest import (
    ELSEWHERE,
    FileFacts,
    Manifest,
    Progress,
    SliceFacts,
    check_settings,
    hash_files,
    no_progress,
    read_manifest,
    write_manifest,
)
from stl_lightning.store.plan import Plan, open_plan, store_settings
from stl_lightning.store.ranges import RangeWriter, writing

COMMIT_S = 20.0  # between two entries in the journal: the work that is lost when the process is killed
LOCK_S = 15.0  # in which the workers of a killed process notice it and let go of its lock


def prepare_store(
    folder: str | Path,
    source: Source,
    spectral: SpectralSplit,
    dtype: str = "float32",
    val_size: int | float | None = None,
    fit: Callable[[], object] | None = None,
    n_workers: int = 1,
    progress: Progress = no_progress,
) -> bool:
    """Write the slices of all images of a source; False if they were there already.

    `fit` is called if the transform has to be fitted first: to the training images that `val_size` leaves.
    Raises: StoreError for a folder with other settings or content, a full or unwritable disk, or another writer at
    work; ConfigError for an unknown dtype; DataError for unreadable images.
    """
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    paths = StorePaths(Path(folder).expanduser().absolute())
    settings = store_settings(source, spectral, dtype, val_size)
    if _is_complete(paths, settings):
        return False
    with writing(paths), _locked(paths):
        if _is_complete(paths, settings):  # by whom the lock was waited for
            return False
        if not (paths.partial.manifest.exists() and _is_complete(paths.partial, settings)):
            _fill(paths.partial, settings, source, spectral, fit, n_workers, progress)
        _publish(paths)
    return True


def _is_complete(paths: StorePaths, settings: dict[str, Any]) -> bool:
    """Raises: StoreError if the folder holds something else."""
    if paths.manifest.exists():
        check_settings(read_manifest(paths).settings, settings, paths.folder, ELSEWHERE)
        return True
    if paths.folder.exists() and not (paths.folder.is_dir() and not any(paths.folder.iterdir())):
        raise StoreError(f"data.store: expected an empty folder or none in {paths.folder}, received other files")
    return False


@contextmanager
def _locked(paths: StorePaths) -> Iterator[None]:
    from filelock import FileLock, Timeout

    paths.folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(paths.lock, timeout=LOCK_S)
    try:
        lock.acquire()
    except Timeout:
        raise StoreError(f"another `stl prepare` is writing {paths.folder}: wait until it has finished") from None
    try:
        yield
    finally:
        lock.release()


def _fill(
    paths: StorePaths,
    settings: dict[str, Any],
    source: Source,
    spectral: SpectralSplit,
    fit: Callable[[], object] | None,
    n_workers: int,
    progress: Progress,
) -> None:
    """Write everything that is missing, the manifest last."""
    images = {split: source.load(split) for split in SPLITS}
    plan = open_plan(paths, settings, images["train"], spectral, fit)
    writer = RangeWriter(paths, images, spectral, settings["dtype"], plan.scale_tensors)
    journal = _open_journal(writer)
    _write_ranges(writer, journal, n_workers, progress)
    files = _hash(paths, n_workers, progress)
    write_manifest(paths, _summarise(plan, source, writer, journal, files))


def _publish(paths: StorePaths) -> None:
    """Give a complete store its name. A process that is killed here leaves a manifest that says it is complete."""
    left_over = paths.partial.folder.rglob(".*")  # by a process that was killed in `write_atomically`
    for working in (paths.partial.plan, paths.partial.journal, *left_over):
        working.unlink(missing_ok=True)
    paths.partial.folder.rename(paths.folder)


def _open_journal(writer: RangeWriter) -> np.ndarray:
    """`RangeWriter.write` of every range that is on the disk, NaN for the others. Shape: (ranges, 3, sum of c)."""
    paths = writer.paths
    is_begun = paths.journal.exists()
    allocated = sum(file.path.stat().st_blocks * 512 for file in writer.files.values()) if is_begun else 0
    _check_space(paths, sum(file.n_bytes for file in writer.files.values()) - allocated)
    n_channels = sum(writer.spectral.slice_shape(k)[0] for k in range(writer.spectral.n_slices))
    shape = (len(writer.ranges), 3, n_channels)
    if is_begun:
        journal = np.load(paths.journal, allow_pickle=False)
        if journal.shape != shape:
            raise StoreError(f"{paths.folder} was begun by another version of this program; delete it to start again")
        return journal
    for file in writer.files.values():
        file.create()
    for split in SPLITS:
        write_atomically(paths.labels(split), _saver(writer.images[split].labels.numpy()))
    journal = np.full(shape, np.nan)
    _commit(writer, journal)
    return journal


def _check_space(paths: StorePaths, n_bytes: int) -> None:
    free = shutil.disk_usage(paths.folder).free
    if n_bytes > free:
        raise StoreError(
            f"data.store: expected {n_bytes / 1e9:.3f} GB free for {paths.folder}, received {free / 1e9:.3f} GB; free "
            "the disk, choose another data.store, or --dtype float16 (half of float32) or int8 (a quarter)"
        )


def _write_ranges(writer: RangeWriter, journal: np.ndarray, n_workers: int, progress: Progress) -> None:
    todo = np.flatnonzero(np.isnan(journal[:, 0, 0])).tolist()
    sizes = [part.stop - part.start for part in writer.ranges]
    progress("images", sum(sizes) - sum(sizes[index] for index in todo), sum(sizes))
    committed = time.monotonic()
    for index, outcome in _outcomes(writer, todo, n_workers):
        if isinstance(outcome, STLError):
            raise outcome
        journal[index] = outcome
        progress("images", sizes[index], sum(sizes))
        if time.monotonic() - committed > COMMIT_S:
            _commit(writer, journal)
            committed = time.monotonic()
    _commit(writer, journal)


def _outcomes(writer: RangeWriter, todo: list[int], n_workers: int) -> Iterator[tuple[int, Any]]:
    """What became of each range, in the order in which they are finished.

    Always in other processes, which compute with one thread: so the bytes do not depend on how many there are.
    """
    loader = DataLoader(writer, sampler=todo, batch_size=None, num_workers=max(1, n_workers), in_order=False)
    try:
        yield from loader if todo else []
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        raise StoreError(
            f"a worker process was ended from outside, as for want of memory ({error}); give the same command again "
            "with fewer --workers, and it goes on where it stopped"
        ) from error


def _commit(writer: RangeWriter, journal: np.ndarray) -> None:
    """Enter ranges into the journal; first the data must be on the disk."""
    for file in writer.files.values():
        file.sync()
    write_atomically(writer.paths.journal, _saver(journal))


def _saver(array: np.ndarray) -> Callable[[Any], None]:
    return lambda file: np.save(file, array, allow_pickle=False)


def _hash(paths: StorePaths, n_threads: int, progress: Progress) -> dict[str, FileFacts]:
    """Size and hash of every array, by its name in the store."""
    files = sorted(path for split in SPLITS for path in (paths.folder / split).glob("*.npy"))
    sizes = [path.stat().st_size for path in files]
    hashes = hash_files(files, n_threads, progress)
    names = [path.relative_to(paths.folder).as_posix() for path in files]
    return {name: FileFacts(size, digest) for name, size, digest in zip(names, sizes, hashes, strict=True)}


def _summarise(
    plan: Plan, source: Source, writer: RangeWriter, journal: np.ndarray, files: dict[str, FileFacts]
) -> Manifest:
    is_train = np.array([part.split == "train" for part in writer.ranges])
    sums = torch.from_numpy(np.concatenate([journal[is_train, :2].sum(0), journal[:, 2:].sum(0)]))
    shapes = [writer.spectral.slice_shape(k) for k in range(writer.spectral.n_slices)]
    n_train, n_test = (len(writer.images[split]) for split in SPLITS)
    parts = zip(shapes, plan.scales, sums.split([c for c, _, _ in shapes], 1), strict=True)
    return Manifest(
        settings=plan.settings,
        class_names=tuple(source.class_names),
        n_train=n_train,
        n_test=n_test,
        matrix=tuple(map(tuple, plan.matrix)),
        slices=tuple(_facts(shape, scale, part, n_train) for shape, scale, part in parts),
        files=files,
        versions={"stl-lightning": _own_version(), "torch": torch.__version__, "python": platform.python_version()},
    )


def _own_version() -> str:
    try:
        return version("stl-lightning")
    except PackageNotFoundError:  # a checkout that is not installed
        return "unknown"


def _facts(shape: tuple[int, int, int], scale: list[float] | None, sums: Tensor, n_train: int) -> SliceFacts:
    """Shape: sums (3, c), see `channel_sums`."""
    total, squares, n_clipped = sums
    n_values = n_train * prod(shape[1:])
    mean = total / n_values
    std = (squares / n_values - mean.square()).clamp(min=0).sqrt()
    return SliceFacts(
        shape=shape,
        scale=None if scale is None else tuple(scale),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        energy=float(squares.sum()) / n_train,
        n_clipped=int(n_clipped.sum()),
    )
