"""The manifest of a slice store: what the slices are of, how they were made, and the hash of every file.

It is written last, so a folder that holds one is complete.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stl_lightning.errors import StoreError
from stl_lightning.paths import StorePaths, write_json
from stl_lightning.run import different_keys

VERSION = 1
ELSEWHERE = "Choose another data.store, or delete it"
BLOCK_BYTES = 2**20  # read at once when a file is hashed

Progress = Callable[[str, int, int], None]  # what is counted (images, bytes), how many more are done, of how many


def no_progress(what: str, n_more: int, n_total: int) -> None:
    """For callers who do not ask."""


@dataclass(frozen=True)
class SliceFacts:
    """One slice: what an image of it looks like, and the statistics of the training images before encoding.

    `scale`, `mean` and `std` are per channel; `scale` is None unless the store is int8. `energy` is the mean over
    images of the sum of squares: over all slices, it sums up to that of the images. `n_clipped` counts both splits.
    """

    shape: tuple[int, int, int]
    scale: tuple[float, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    energy: float
    n_clipped: int


@dataclass(frozen=True)
class FileFacts:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`settings` decides the content: two stores of equal settings hold the same slices.

    `settings["seed"]` is there if the transform depends on it, `settings["val_size"]` if it was fitted to the training
    images. `matrix` is what the slices were made with, one basis vector a row. `files` are relative to the store.
    """

    settings: dict[str, Any]
    class_names: tuple[str, ...]
    n_train: int
    n_test: int
    matrix: tuple[tuple[float, ...], ...]
    slices: tuple[SliceFacts, ...]
    files: dict[str, FileFacts]
    versions: dict[str, str]

    @property
    def source(self) -> str:
        return self.settings["source"]

    @property
    def fingerprint(self) -> str:
        return self.settings["fingerprint"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        c, height, width = self.settings["image_shape"]
        return c, height, width

    @property
    def dtype(self) -> str:
        return self.settings["dtype"]

    def n_images(self, split: str) -> int:
        return {"train": self.n_train, "test": self.n_test}[split]


def check_settings(there: Mapping[str, Any], here: Mapping[str, Any], folder: Path, cure: str) -> None:
    """Compare the settings that both sides have. Raises: StoreError that names each and both its values."""
    both = sorted(there.keys() & here.keys())
    old, new = (_plain({key: side[key] for key in both}) for side in (there, here))
    differing = different_keys(old, new)
    if differing:
        listed = "; ".join(f"{key} is {a!r} there and {b!r} here" for key, (a, b) in differing.items())
        raise StoreError(f"{folder} was prepared with other `data` settings: {listed}. {cure}")


def write_manifest(paths: StorePaths, manifest: Manifest) -> None:
    content = asdict(manifest)
    write_json(paths.manifest, {"version": VERSION, "sha256": _content_hash(content), **content})


def read_manifest(paths: StorePaths) -> Manifest:
    """The manifest that `write_manifest` wrote.

    Raises: StoreError if there is no complete store, or one of another version, or the manifest is damaged.
    """
    try:
        content = json.loads(paths.manifest.read_text())
        version, sha256 = content.pop("version"), content.pop("sha256")
    except FileNotFoundError:
        raise _missing(paths) from None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise _damaged(paths, error) from error
    if version != VERSION:
        raise StoreError(
            f"{paths.folder}: expected a store of version {VERSION}, received {version!r}; "
            "delete it and make it again with `stl prepare`"
        )
    if _content_hash(content) != sha256:
        raise _damaged(paths, "its SHA-256 differs")
    return _parse(content)


def _parse(content: dict[str, Any]) -> Manifest:
    """JSON has lists where the manifest has tuples."""
    slices = tuple(SliceFacts(**{key: _tuples(value) for key, value in row.items()}) for row in content["slices"])
    files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
    lists = {name: _tuples(content[name]) for name in ("class_names", "matrix")}
    return Manifest(**content | lists | {"slices": slices, "files": files})


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As it is when it was written to JSON and read back."""
    return json.loads(json.dumps(value))


def _content_hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _missing(paths: StorePaths) -> StoreError:
    if paths.partial.folder.exists():
        return StoreError(f"{paths.folder} is not finished: the same `stl prepare` as before goes on with it")
    return StoreError(
        f"data.store: expected a slice store in {paths.folder}, received a folder without manifest.json or none at "
        "all; make one with `stl prepare --data.store FOLDER`, or set data.store=null to read the images"
    )


def _damaged(paths: StorePaths, what: object) -> StoreError:
    return StoreError(f"{paths.manifest} is damaged ({what}); delete the store and make it again with `stl prepare`")


def file_sha256(path: Path, advance: Callable[[int], None] = lambda n_bytes: None) -> str:
    """The hash of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def hash_files(files: list[Path], n_threads: int, progress: Progress) -> list[str]:
    """`file_sha256` of each; threads suffice, since hashing releases Python's lock."""
    total = sum(path.stat().st_size for path in files)
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        return list(pool.map(lambda path: file_sha256(path, lambda n_more: progress("bytes", n_more, total)), files))
