"""Every path in a run directory, and the one way to write a file there: complete or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from stl_lightning.errors import RunError


@dataclass(frozen=True)
class BranchPaths:
    """The files of one branch. Its owner is the process that trains it."""

    folder: Path

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
    def status(self) -> Path:
        return self.folder / "status.json"

    def logits(self, split: str) -> Path:
        return self.folder / "logits" / f"{split}.safetensors"


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
    def fitted(self) -> Path:
        return self.folder / "ensemble" / "weights.safetensors"

    @property
    def baseline(self) -> "RunPaths":
        """The conventional network on the whole image is a run of one branch inside this one."""
        return RunPaths(self.folder / "baseline")


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk and rename it to `path`.

    Raises: RunError if the folder cannot be written to or the disk is full; `path` is then as it was before.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # NamedTemporaryFile makes it readable by its owner alone
        temporary.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error}. Choose another `run.root`, or free the disk") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(content, indent=2).encode() + b"\n"))


def read_json(path: Path) -> Any:
    """Raises: RunError if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _read_umask()
