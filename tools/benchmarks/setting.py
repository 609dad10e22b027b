"""How a measurement is made: the options of `tools/bench` as all subjects read them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.compare import Side, Values, alternate
from benchmarks.data import Data, generated, training_data

T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """`quick` only shows that everything runs: few repetitions on little, generated data; `folder` is temporary."""

    folder: Path
    data_root: Path
    devices: tuple[str, ...] = ("cpu",)
    quick: bool = False
    threads: int | None = None

    def choose(self, full: T, quick: T) -> T:
        return quick if self.quick else full

    def take_turns(self, sides: Mapping[str, Side], threads: int, warm: bool = True) -> Values:
        """Five rounds that count, after one (where `warm`) that does not; quick: one."""
        return alternate(sides, self.choose(5, 1), threads, n_warm=self.choose(int(warm), 0))

    def n_threads(self, of_subject: int) -> int:
        """Threads of each side: what the user asked for, or the subject's own number."""
        return self.threads or of_subject

    def data(self, name: str, n: int, n_quick: int = 256) -> Data:
        """`n` training images of a data set."""
        if self.quick:
            return generated(name, self.folder, n_quick)
        return training_data(name, self.data_root, self.folder, n)
