"""Several ways to do one thing, measured in turns in one run.

A way is a `Side`: a function that does its work and calls `turn.done(value)` after each repetition, for ever. Each runs
in a process of its own and waits while the others have their turn. Two in one process would disturb each other even
then: libgomp spins for a shorter time once a process holds more threads than the machine has cores.
"""

import multiprocessing
import operator
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any, Literal

import torch

Side = Callable[["Turn"], None]
Values = dict[str, list[float] | str]  # of each side: its numbers, or why there are none

SPREAD = "median absolute deviation"
SIGNS = {">=": operator.ge, "<=": operator.le}


class Missing(Exception):
    """Something that only a benchmark needs is not here: its rows are skipped with this reason."""


class SideError(Exception):
    """A side ended with an error."""


def needs(package: str, module: str | None = None) -> ModuleType:
    """A module of a package that only benchmarks use. Raises: Missing if it is not installed."""
    try:
        return import_module(module or package)
    except ModuleNotFoundError as error:
        raise Missing(f"{package} cannot be imported ({error}): pip install -e '.[bench]'") from error


def only_where(missing: Callable[[], str | None], side: "Side") -> "Side":
    """The side, where nothing is missing; or else its rows are skipped with what `missing` says."""

    def checked(turn: Turn) -> None:
        if reason := missing():
            raise Missing(reason)
        side(turn)

    return checked


class Turn:
    """A side's end of the line: the clock of its turn, and what it reports."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._wait()

    def _wait(self) -> None:
        try:
            self._channel.recv()
        except EOFError:  # the comparison is over; whatever the side is in the middle of ends here
            os._exit(0)
        self.restart()

    def restart(self) -> None:
        """Set the clock to zero: what came before was set-up."""
        self._since = time.perf_counter()

    def seconds(self) -> float:
        """Wall-clock time since the turn began, with all that was given to the GPU done."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return time.perf_counter() - self._since

    def done(self, value: float) -> None:
        """Report one repetition and wait for the next turn."""
        self._channel.send(value)
        self._wait()


def steadily(amount: float, prepare: Callable[[], Callable[[], Any]], at_least_s: float = 0.3) -> Side:
    """A side that does a short piece of work again and again; value: amount per second.

    `prepare` is called once, in the side's own process, and gives the work.
    """

    def side(turn: Turn) -> None:
        work = prepare()
        turn.restart()
        while True:
            n_done = 0
            while n_done == 0 or turn.seconds() < at_least_s:
                work()
                n_done += 1
            turn.done(n_done * amount / turn.seconds())

    return side


def alternate(sides: Mapping[str, Side], repetitions: int, threads: int, n_warm: int = 1) -> Values:
    """The values of each side, in rounds in which each has one turn; the first `n_warm` rounds are not kept.

    Every other round goes backwards, so that a machine that slows down steadily favours nobody.
    Raises: SideError with the traceback of a side that failed.
    """
    values: Values = {name: [] for name in sides}
    with ExitStack() as running:
        channels = {name: running.enter_context(_started(side, threads)) for name, side in sides.items()}
        for number in range(n_warm + repetitions):
            for name in list(sides)[:: (-1) ** number]:
                kept = values[name]
                if isinstance(kept, str):
                    continue
                answer = _take_turn(name, channels[name])
                if isinstance(answer, str):
                    values[name] = answer
                elif number >= n_warm:
                    kept.append(answer)
    return values


@contextmanager
def _started(side: Side, threads: int) -> Any:
    context = multiprocessing.get_context("fork")  # shares what is imported; nothing here has used a thread pool yet
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(side, theirs, ours, threads), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        process.join(10)
        process.kill()


def _serve(side: Side, channel: Connection, others_end: Connection, threads: int) -> None:
    others_end.close()  # or this process would never see it closed
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what the sides say of their progress; errors come through the channel
        os.dup2(nowhere, stream)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    try:
        side(Turn(channel))
        channel.send(SideError("it ended by itself"))
    except Missing as missing:
        channel.send(str(missing))
    except BaseException:
        # Also SystemExit, which is how jsonargparse says that a setting is wrong: the other end must hear of it.
        channel.send(SideError(traceback.format_exc()))
    os._exit(0)


def _take_turn(name: str, channel: Connection) -> float | str:
    channel.send("go")
    try:
        answer = channel.recv()
    except EOFError:
        answer = SideError("its process died")
    if isinstance(answer, SideError):
        raise SideError(f"{name}: {answer}")
    return answer


@dataclass(frozen=True)
class Pair:
    """One row to make: `name` against `against`; goal: such as "ratio >= 0.9" or "median <= 0.5"."""

    name: str
    against: str
    goal: str | None = None


def rows(
    values: Mapping[str, list[float] | str],
    pairs: Sequence[Pair],
    unit: str,
    better: Literal["higher", "lower"] = "higher",
    **common: Any,
) -> list[dict[str, Any]]:
    """One row per pair. `ratio` is the median over the rounds of name / against; `common` goes into each row."""
    return [row(values, pair) | {"unit": unit, "better": better} | common for pair in pairs]


def row(values: Mapping[str, list[float] | str], pair: Pair) -> dict[str, Any]:
    """The numbers of one pair, or why there are none."""
    names = {"name": pair.name, "against": pair.against}
    ours, theirs = values[pair.name], values[pair.against]
    for side in (ours, theirs):
        if isinstance(side, str):
            return names | {"skipped": side}
    assert not isinstance(ours, str)
    assert not isinstance(theirs, str)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    numbers = {
        "ratio": statistics.median(ratios),
        "spread_ratio": spread(ratios),
        "n": len(ours),
        "median": statistics.median(ours),
        "spread": spread(ours),
        "median_against": statistics.median(theirs),
        "spread_against": spread(theirs),
    }
    return names | numbers | {"goal": pair.goal, "met": is_met(pair.goal, numbers) if pair.goal else None}


def is_met(goal: str, numbers: Mapping[str, Any]) -> bool:
    """Whether e.g. "ratio >= 0.9" is true of a row."""
    key, sign, bound = goal.split()
    return bool(SIGNS[sign](numbers[key], float(bound)))


def spread(values: Sequence[float]) -> float:
    """Median absolute deviation from the median."""
    middle = statistics.median(values)
    return statistics.median([abs(value - middle) for value in values])
