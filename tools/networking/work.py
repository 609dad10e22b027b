"""What all methods train on, in numbers, and what a worker notes of its epochs."""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from networking.nodes import traffic

N_WORKERS = 4
N_BRANCHES = 4
CLOCK = "networking.clock.EpochClock"  # the callback of `stl fit`; importing it takes seconds
WORKER = "STL_NETWORK_WORKER"  # variable that tells it the number of the worker
Record = dict[str, Any]
Widths = tuple[int | Literal["P"], ...]


@dataclass(frozen=True)
class Work:
    """One epoch is one pass over `n_images` images. The first turn of a worker warms up and is not counted."""

    images: str  # file with arrays, as the data source npz reads it
    n_images: int = 1024
    n_held_out: int = 128  # also in the file; nobody trains on them
    batch: int = 128  # of a branch, and of the conventional network: of all workers together
    n_warm_steps: int = 4  # of the conventional network; of a branch it is an epoch
    widths: Widths = (32, 32, 32, "P", 64, 64, 64, "P", 128, 128, 128, 128)
    lr: float = 1e-3
    bucket_mb: float = 1.0  # gradients that DDP exchanges together
    powersgd_rank: int = 1
    local_sgd_period: int = 4  # steps

    @classmethod
    def quick(cls, images: str) -> "Work":
        """Enough to count bytes."""
        return cls(images, 128, 32, 32, widths=(16, "P", 32, "P", 64))

    @property
    def steps_per_epoch(self) -> int:
        return self.n_images // self.batch

    @property
    def baseline_widths(self) -> Widths:
        """Of the conventional network, whose images have sides twice as long: pooled once more, at the end."""
        return (*self.widths, "P")


class EpochLog:
    """The notes of one worker, a line per epoch: how long it took, and how much the counters of its link grew in it.

    Workers take turns of some epochs each. Before the first of a turn, a worker waits until it is let go: until the
    other end of a pipe, which is a file with a name, has been opened and closed.
    """

    def __init__(self, folder: Path, worker: int, epochs_per_turn: int = 1) -> None:
        self.pipe, self.file = folder / f"turns-{worker}", folder / f"epochs-{worker}.jsonl"
        self.epochs_per_turn = epochs_per_turn

    def prepare(self) -> None:
        """For the one who gives the turns, before the worker starts."""
        os.mkfifo(self.pipe)
        self.file.touch()

    def begin(self) -> None:
        if len(self.read()) % self.epochs_per_turn == 0:
            self.pipe.read_bytes()
        self._before = counters()

    def end(self, n_steps: int) -> None:
        after = counters()
        self._epoch = {name: after[name] - self._before[name] for name in after} | {"n_steps": n_steps}

    def note(self, more: Mapping[str, Any] | None = None) -> None:
        """Write down the epoch that ended, and with it the end of the turn."""
        with self.file.open("a") as file:
            file.write(json.dumps(self._epoch | dict(more or {})) + "\n")

    def read(self) -> list[Record]:
        # The last line may be half-way there.
        return [json.loads(line) for line in self.file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def counters() -> dict[str, float]:
    """What is counted of an epoch: its seconds, those of the processor for this process and for anyone, bytes."""
    link = traffic()
    return {
        "epoch_s": time.perf_counter(),
        "cpu_s": time.process_time(),
        "all_cpu_s": all_cpu_s(),
        "sent": link.sent,
        "received": link.received,
    }


def all_cpu_s() -> float:
    first = Path("/proc/stat").read_text().splitlines()[0]
    user, nice, system, _idle, _wait, irq, softirq, *_ = (int(number) for number in first.split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
