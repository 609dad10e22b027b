"""Ranges of images and their place in the files of a store: what the worker processes of a writer do.

Rows are written with `pwrite` and not through a memory map: there, a full disk is not an error but the end of the
process, and every page that was touched counts as its memory.

Letters: n samples, c channels, h w space, k slices.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stl_lightning.errors import DataError, RunError, STLError, StoreError
from stl_lightning.images import ImageArray, ImageFiles, as_float
from stl_lightning.paths import StorePaths
from stl_lightning.sources import SPLITS
from stl_lightning.spectral import SpectralSplit
from stl_lightning.store.encoding import DTYPES, count_clipped, encode

RANGE_BYTES = 16 * 2**20  # of float32 pixels in a range; with the slices of them, a worker holds some six times as much


@contextmanager
def writing(paths: StorePaths) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a StoreError."""
    try:
        yield
    except (OSError, RunError) as error:
        reason = error.__cause__ or error
        raise StoreError(
            f"cannot write {paths.folder}: {reason}. Choose another data.store, or make the folder writable or "
            "free the disk, and give the same command again: it goes on where it stopped"
        ) from error


@dataclass(frozen=True)
class ArrayFile:
    """A `.npy` file that is written in parts; `numpy.load` reads it."""

    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def header(self) -> bytes:
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=self.dtype).numpy().dtype)
        np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return buffer.getvalue()

    @property
    def n_bytes(self) -> int:
        return len(self.header) + prod(self.shape) * self.dtype.itemsize

    def create(self) -> None:
        """The file in its full length, without taking the space yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("wb") as file:
            file.write(self.header)
            file.truncate(self.n_bytes)

    def write_rows(self, descriptor: int, start: int, rows: Tensor) -> None:
        """Put rows (n, ...) at `start`."""
        left = rows.contiguous().numpy().data.cast("B")
        offset = len(self.header) + start * prod(self.shape[1:]) * self.dtype.itemsize
        while left:  # a disk that is nearly full takes a part first
            n_written = os.pwrite(descriptor, left, offset)
            left, offset = left[n_written:], offset + n_written

    def sync(self) -> None:
        """Flush to the disk what any process has written."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class Range:
    """Images `start` to `stop` - 1 of a split."""

    split: str
    start: int
    stop: int


@dataclass
class RangeWriter(Dataset[tuple[int, Any]]):
    """Ranges as a data set: to fetch one is to write its slices. Copied to every worker process."""

    paths: StorePaths
    images: dict[str, ImageArray | ImageFiles]
    spectral: SpectralSplit
    dtype: str
    scales: list[Tensor | None]  # (c, 1, 1) of each slice
    descriptors: dict[Path, int] = field(default_factory=dict)  # of the files that this process has opened

    def __post_init__(self) -> None:
        n_images = max(1, RANGE_BYTES // (4 * prod(self.spectral.image_shape)))
        self.ranges = [
            Range(split, start, min(start + n_images, len(self.images[split])))
            for split in SPLITS
            for start in range(0, len(self.images[split]), n_images)
        ]
        self.files = {
            (split, k): ArrayFile(
                self.paths.slice(split, k), (len(self.images[split]), *self.spectral.slice_shape(k)), DTYPES[self.dtype]
            )
            for split in SPLITS
            for k in range(self.spectral.n_slices)
        }

    def __getitem__(self, index: int) -> tuple[int, Any]:
        """The sums of a range as nested lists, or the error that its writing ended with.

        The loader would raise it with the traceback of the worker for a message.
        """
        try:
            with writing(self.paths):
                return index, self.write(self.ranges[index]).tolist()
        except STLError as error:
            return index, error

    def write(self, part: Range) -> Tensor:
        """Write one range; its `channel_sums` over the channels of all slices. Shape: (3, sum of c)."""
        pixels = self.images[part.split].fetch(torch.arange(part.start, part.stop))
        sums = []
        for k, x in enumerate(self.spectral(as_float(pixels))):
            encoded = encode(x, DTYPES[self.dtype], self.scales[k])
            sums.append(channel_sums(x, self.scales[k]))
            if not (sums[-1].isfinite().all() and encoded.isfinite().all()):
                raise DataError(
                    f"data.root: expected images whose slices are finite in {self.dtype}, received NaN or infinity "
                    f"among {part.start}..{part.stop - 1} of {part.split}; correct them, or choose --dtype float32"
                )
            file = self.files[part.split, k]
            file.write_rows(self._descriptor(file.path), part.start, encoded)
        return torch.cat(sums, 1)

    def _descriptor(self, path: Path) -> int:
        if path not in self.descriptors:
            self.descriptors[path] = os.open(path, os.O_WRONLY)
        return self.descriptors[path]


def channel_sums(x: Tensor, scale: Tensor | None) -> Tensor:
    """Sum, sum of squares and number of clipped values of each channel. Shapes: (n, c, h, w) -> (3, c) float64."""
    # Over the pixels of one image in float32: what a million images add up to needs float64, and so few values do not.
    of_images = torch.stack([x.sum((2, 3)), x.square().sum((2, 3))])
    return torch.cat([of_images.double().sum(1), count_clipped(x, scale).double()[None]])
