"""Batches of a branch: an order that every rank computes for itself, and a loader that resumes at any batch.

The order of an epoch depends on (seed, epoch) alone, so all branches see the images in the same order without talking.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from stl_lightning.errors import STLError


class BatchSource(Protocol):
    """Labelled examples that are fetched a batch at a time."""

    def __len__(self) -> int: ...

    def batch(self, positions: Tensor, epoch: int | None) -> tuple[Tensor, Tensor]:
        """The inputs and labels (or targets) at `positions` (n,); `epoch` selects the augmentation, None none."""


class Chunk:
    """Several training batches in a row, handed to Lightning as one: what a step costs there is paid once for all.

    Iterates over (x, targets), once; each is fetched when it is asked for, so a chunk holds one batch at a time.
    """

    def __init__(self, batches: Iterator[tuple[Tensor, Tensor]], n_batches: int) -> None:
        self.batches = batches
        self.n_batches = n_batches

    def __len__(self) -> int:
        return self.n_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(self.batches, self.n_batches)


def epoch_order(n_examples: int, seed: int, epoch: int) -> Tensor:
    """A permutation (n,) that depends on (seed, epoch) alone."""
    # Seeds of consecutive runs and epochs must not meet: run 0, epoch 1 is not run 1, epoch 0.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_examples, generator=generator)


def n_training_images(n_examples: int, batch_size: int) -> int:
    """All of them; but a last batch of one is left out, because BatchNorm finds no variance in it."""
    return n_examples - (n_examples > batch_size > 1 and n_examples % batch_size == 1)


class ResumableLoader:
    """Iterates over the batches of the current epoch, in training order or (without a seed) in stored order.

    With `is_same_order`, every epoch has the order of the first, as to overfit a few batches.
    With `chunk`, it yields a `Chunk` of so many batches at a time. `state_dict` counts the batches handed out, whatever
    worker processes have prefetched, so a run that continues from it sees each of the remaining batches once.
    """

    batch_sampler = None  # Lightning looks for it wherever it finds a `sampler`

    def __init__(
        self,
        source: BatchSource,
        batch_size: int,
        seed: int | None = None,
        num_workers: int = 0,
        chunk: int | None = None,
        is_same_order: bool = False,
    ) -> None:
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers
        self.chunk = chunk
        self.is_same_order = is_same_order
        self.epoch = 0
        self.position = 0  # batches handed out since the epoch began
        self._resume_at: tuple[int, int] | None = None

    @property
    def sampler(self) -> "ResumableLoader":
        """Itself: Lightning sets the epoch on the sampler of a loader."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return -(-self._n_used() // self.batch_size)

    def __len__(self) -> int:
        return -(-self.n_batches // (self.chunk or 1))

    def _n_used(self) -> int:
        n = len(self.source)
        return n if self.seed is None else n_training_images(n, self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning creates the iterator before it sets the epoch, and asks for the first batch after.
        first = self._first_batch()
        batches = self._counted(first)
        if self.chunk is None:
            yield from batches
            return
        while (
            first < self.n_batches
        ):  # what a process left of a chunk comes first, so that as many follow as in any epoch
            end = min((first // self.chunk + 1) * self.chunk, self.n_batches)
            yield Chunk(batches, end - first)
            first = end

    def _counted(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = None if self.seed is None else self.epoch
        for position, batch in enumerate(self._batches(epoch, first), start=first + 1):
            self.position = position
            yield batch

    def _first_batch(self) -> int:
        resume_at, self._resume_at = self._resume_at, None
        if resume_at is None or resume_at[0] != self.epoch:
            return 0
        return resume_at[1]

    def _batches(self, epoch: int | None, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.source)
        of_epoch = 0 if self.is_same_order else self.epoch
        order = torch.arange(n) if self.seed is None else epoch_order(n, self.seed, of_epoch)
        wanted = [(positions, epoch) for positions in order[: self._n_used()].split(self.batch_size)[first:]]
        dataset = _Fetched(self.source)
        if self.num_workers == 0:
            return (_or_raise(dataset[key]) for key in wanted)
        # The loader draws a base seed for its workers: from a generator of its own, or the dropout masks would depend
        # on the number of workers.
        fetched = DataLoader(
            dataset,
            sampler=wanted,
            batch_size=None,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        return map(_or_raise, fetched)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batches": self.position, "chunk": self.chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._resume_at = (state["epoch"], state["batches"])


class _Fetched(Dataset[tuple[Tensor, Tensor] | STLError]):
    """A batch source as a data set whose keys are (positions, epoch): workers prefetch with the right epoch.

    What the user can cure is returned, not raised: torch would make a traceback of what a worker raises.
    """

    def __init__(self, source: BatchSource) -> None:
        self.source = source

    def __getitem__(self, key: Any) -> tuple[Tensor, Tensor] | STLError:
        try:
            return self.source.batch(*key)
        except STLError as error:
            return error


def _or_raise(fetched: tuple[Tensor, Tensor] | STLError) -> tuple[Tensor, Tensor]:
    if isinstance(fetched, STLError):
        raise fetched
    return fetched
