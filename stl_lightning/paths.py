"""Every path in a run directory and in a slice store, and the one way to write a file there: complete or not at all."""

import contextlib
import errno
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stl_lightning.errors import FencedError, RunError


@dataclass(frozen=True)
class BranchPaths:
    """The files of one branch. Its owner is the process that trains it, which writes through its `desk`.

    The desk is a folder that a newer attempt moves away before it begins: what an older one, perhaps cut off on a lost
    node, still wants to rename from there to its place is gone, so it cannot overwrite anything.
    """

    folder: Path
    desk: Path | None = None

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def best(self) -> Path:
        return self.folder / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.folder / "last.ckpt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.csv"

    @property
    def epoch_logits(self) -> Path:
        """Logits of the first validation images after every epoch, float16 (epochs, n, k)."""
        return self.folder / "logits" / "epochs.npy"

    @property
    def status(self) -> Path:
        return self.folder / "status.json"

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts"

    def logits(self, split: str) -> Path:
        return self.folder / "logits" / f"{split}.safetensors"

    def write(self, path: Path, write: Callable[[IO[bytes]], Any]) -> None:
        """Write one of these files, complete or not at all.

        Raises: FencedError if a newer attempt owns the branch, and nothing was changed; RunError as `write_atomically`.
        """
        write_atomically(path, write, self.desk)


@dataclass(frozen=True)
class RunPaths:
    """A run directory: what its branches agree on, a folder a branch, and what was made of them."""

    folder: Path

    @property
    def run_json(self) -> Path:
        return self.folder / "run.json"

    def branch(self, branch: int) -> BranchPaths:
        return BranchPaths(self.folder / "branches" / f"{branch:02d}")

    @property
    def results(self) -> Path:
        return self.folder / "ensemble" / "results.json"

    @property
    def report(self) -> Path:
        return self.folder / "report"

    @property
    def fitted(self) -> Path:
        return self.folder / "ensemble" / "weights.safetensors"

    @property
    def launch(self) -> Path:
        """What `stl launch` submitted: job ids, how, and when."""
        return self.folder / "launch.json"

    @property
    def logs(self) -> Path:
        """What the jobs of a launch print."""
        return self.folder / "logs"

    @property
    def baseline(self) -> "RunPaths":
        """The conventional network on the whole image is a run of one branch inside this one."""
        return RunPaths(self.folder / "baseline")


@dataclass(frozen=True)
class StorePaths:
    """A slice store. Until it is complete it lies in `partial`, beside its final place."""

    folder: Path

    @property
    def manifest(self) -> Path:
        return self.folder / "manifest.json"

    def slice(self, split: str, k: int) -> Path:
        return self.folder / split / f"slice-{k:02d}.npy"

    def labels(self, split: str) -> Path:
        return self.folder / split / "labels.npy"

    @property
    def partial(self) -> "StorePaths":
        return StorePaths(self.folder.with_name(f"{self.folder.name}.partial"))

    @property
    def plan(self) -> Path:
        """In `partial` only: what was decided before the first slice was written."""
        return self.folder / "plan.json"

    @property
    def journal(self) -> Path:
        """In `partial` only: the ranges of images that are written, and their sums."""
        return self.folder / "journal.npy"

    @property
    def lock(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.lock")


def write_atomically(
    path: Path, write: Callable[[IO[bytes]], Any], desk: Path | None = None, called: Path | None = None
) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk and rename it to `path`.

    `called` is what an error calls the file, if not `path`. With `desk`, the temporary file lies there, and the file is
    written only as long as that folder is in its place.
    Raises: RunError if the folder cannot be written to or the disk is full; `path` is then as it was before.
    FencedError if the desk is gone.
    """
    temporary = (desk or path.parent) / f".{path.name}.{secrets.token_hex(4)}"
    try:
        if path.parent != desk:  # a desk that was taken away must not come back
            path.parent.mkdir(parents=True, exist_ok=True)
        for is_last_try in (False, False, True):
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                written = os.fstat(file.fileno()).st_ino
            if _moved(temporary, path, written, is_last_try):
                return
    except OSError as error:
        if desk is not None and not desk.exists():
            raise FencedError(f"a newer attempt has taken {path.parent}: this one has changed nothing since") from error
        cure = "Free the disk, or choose" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "Choose"
        of_another = error.filename not in (None, str(temporary))
        reason = error if of_another else error.strerror or error
        raise RunError(f"cannot write {called or path}: {reason}. {cure} another `run.root`") from error
    finally:
        with contextlib.suppress(OSError):  # such as a folder that could not be made
            temporary.unlink(missing_ok=True)


def _moved(temporary: Path, path: Path, inode: int, is_last_try: bool) -> bool:
    """Rename, and find out what happened: a network drive may fail although it renamed, or lose the file's handle."""
    try:
        temporary.replace(path)
    except OSError as error:
        if path.exists() and path.stat().st_ino == inode:
            return True
        if is_last_try or error.errno not in (errno.ESTALE, errno.EIO):
            raise
        return False
    return True


def create_once(path: Path, text: str) -> None:
    """Write a file unless it is there: of several ranks that race, one wins and its whole content stays.

    Raises: RunError if the folder cannot be written to.
    """
    if path.exists():
        return
    mine = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_atomically(mine, lambda file: file.write(text.encode()), called=path)
    try:
        os.link(mine, path)  # fails if another rank was first, where a rename would overwrite
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links: its own exclusive creation, which a reader may catch half-way
        with contextlib.suppress(FileExistsError), path.open("x") as file:
            file.write(text)
    finally:
        mine.unlink()


def write_json(path: Path, content: Any, desk: Path | None = None) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"), desk)


def read_json(path: Path) -> Any:
    """Raises: RunError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def file_system_now(folder: Path) -> float:
    """The time (s since 1970) by the clock that stamps the files in `folder`: on a network drive, the server's.

    Raises: RunError if nothing can be written there.
    """
    probe = folder / f".clock.{secrets.token_hex(4)}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError as error:
        raise RunError(f"cannot write into {folder}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
