"""One round: a run, some faults at random moments while it trains, and what came of it."""

import contextlib
import random
import time
from collections.abc import Callable
from typing import Any

from faulting.check import Keeper, Outcome, wrong_branches
from faulting.kinds import KINDS
from faulting.scene import N_BRANCHES, Progress, Scene
from faulting.waiting import Act, Until, Wrong
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.errors import CheckpointError, STLError

TICK_S = 0.05
PAUSE_S = (0.2, 5.0)  # between two faults
EARLY = 0.15  # of the faults that a branch may suffer at its start are such
Row = dict[str, Any]


def hit_by(name: str, scene: Scene, branch: int) -> list[int]:
    """The branches that a fault of this kind does harm to, if it is aimed at one."""
    kind = KINDS[name]
    if kind.whole or (kind.to_supervisor and scene.has_one_supervisor):
        return list(range(N_BRANCHES))
    return scene.neighbours(branch) if kind.to_node else [branch]


class Fault:
    """One fault in its course: done, healed, got over. `row` is what is kept of it."""

    def __init__(self, scene: Scene, kind: str, branch: int, finished: list[int], rng: random.Random) -> None:
        self.scene, self.kind = scene, kind
        self.branches = hit_by(kind, scene, branch)
        self.at = {b: scene.progress(b) for b in self.branches}
        self.began = time.monotonic()
        self.act: Act | None = KINDS[kind].function()(scene, branch, rng)
        self.wait: Until | None = None
        self.happened: str | None = None
        self.wrong: str | None = None
        self.since: dict[int, Progress] = {}
        self.row: Row = {
            "kind": kind,
            "where": scene.where,
            "branches": self.branches,
            "at": self.at[branch].as_dict(),
            "finished_before": finished,
        }

    @property
    def is_acting(self) -> bool:
        return self.act is not None

    def advance(self) -> None:
        """Go on with the fault, as far as it need not wait."""
        while self.act is not None and (self.wait is None or self.wait.is_over()):
            try:
                self.wait = next(self.act)
                continue
            except StopIteration as end:
                self.happened = end.value
            except Wrong as error:
                self.happened = self.wrong = str(error)
            except (OSError, AssertionError, STLError) as error:
                self.happened = self.wrong = f"could not be done: {error!r}"
            self.act = None
            self.since = {branch: self.scene.progress(branch) for branch in self.branches}

    def give_up(self) -> None:
        """Nothing that it waits for comes any more."""
        if self.act is not None:
            self.act.close()
            self.act, self.wrong = None, "the round took too long"

    def is_over(self) -> bool:
        """Whether its branches have come further since it was healed, or have finished."""
        if self.is_acting:
            return False
        over = all(self.scene.progress(b).step > self.since[b].step or self.scene.is_finished(b) for b in self.branches)
        if over:
            self.row["recovery_s"] = round(time.monotonic() - self.began, 2)
        return over


class Round:
    """Faults of the given kinds, done to one scene. `run` returns their rows; `undone` are those it had no time for."""

    def __init__(self, scene: Scene, kinds: list[str], expected: list[Outcome], rng: random.Random) -> None:
        self.scene, self.expected, self.rng = scene, expected, rng
        self.undone = list(kinds)
        self.keeper = Keeper(scene)
        self.faults: list[Fault] = []
        self.next_fault = 0.0
        self.notes: list[str] = []
        self.followed: set[int] = set()  # branches whose damaged best.ckpt was found out by the ensemble

    def run(self, limit_s: float) -> list[Row]:
        began = time.monotonic()
        self.scene.start()
        while not self._is_complete() and time.monotonic() - began < limit_s:
            self._tick()
        for fault in self.faults:
            fault.give_up()
        if self._is_complete():
            self._follow_messages(began + limit_s)
        return self._rows()

    def _tick(self) -> None:
        time.sleep(TICK_S)
        with contextlib.suppress(STLError):  # a file may be gone between two looks
            self.keeper.look()
        for fault in self.faults:
            fault.advance()
            if not fault.is_acting and "recovery_s" not in fault.row:
                fault.is_over()
        if self.undone and time.monotonic() >= self.next_fault and (new := self._new_fault()):
            self.faults.append(new)
            self.next_fault = time.monotonic() + self.rng.uniform(*PAUSE_S)
        self.scene.go_on()

    def _new_fault(self) -> Fault | None:
        """The next kind that finds a branch to harm."""
        name = self.undone[0]
        branch = self._target(name)
        if branch is None:
            self.undone.append(self.undone.pop(0))
            return None
        fault = Fault(self.scene, name, branch, self.keeper.look(), self.rng)
        fault.advance()
        if not fault.is_acting and fault.happened is None:
            self.undone.append(self.undone.pop(0))
            return None
        self.undone.pop(0)
        return fault

    def _target(self, name: str) -> int | None:
        """A branch that trains and has got over earlier faults; for some kinds one that has just begun, or finished."""
        kind = KINDS[name]
        suffering = {branch for fault in self.faults if "recovery_s" not in fault.row for branch in fault.branches}
        fits: Callable[[int], bool] = self.scene.is_training
        if kind.early and self.rng.random() < EARLY:
            fits = lambda b: not self.scene.is_finished(b)  # noqa: E731
        elif kind.late and sum(fault.kind == name for fault in self.faults) % 2:  # every second one of a round
            fits = self.scene.is_finished
        fit = [branch for branch in range(N_BRANCHES) if branch not in suffering and fits(branch)]
        free = [branch for branch in fit if not suffering & set(hit_by(name, self.scene, branch))]
        return self.rng.choice(free) if free else None

    def _is_complete(self) -> bool:
        is_acting = any(fault.is_acting for fault in self.faults)
        return not is_acting and len(self.scene.finished()) == N_BRANCHES

    def _follow_messages(self, deadline: float) -> None:
        """The ensemble must leave out a branch whose checkpoint was cut, and say what to do; do it."""
        cut = [file for file in sorted(self.scene.damaged) if _is_damaged(file)]
        self.scene.damaged.clear()
        for file in cut:
            code, text = self.scene.run_stl("ensemble", str(self.scene.paths.folder))
            said = "".join(text.split())  # a table may break its lines anywhere
            if str(file) not in said or "Deleteit" not in said:
                self.notes.append(
                    f"`stl ensemble` does not tell of the damaged {file} (exit code {code}): {text[-300:]}"
                )
                continue
            branch = int(file.parent.name)
            self.keeper.forget(branch)
            self.followed.add(branch)
            file.unlink()
        while cut and not (self._is_complete() and all(file.exists() for file in cut)):
            if time.monotonic() > deadline:
                return
            self._tick()

    def _rows(self) -> list[Row]:
        lost, wrong = self.keeper.lost(), wrong_branches(self.scene, self.expected)
        unfinished = set(range(N_BRANCHES)) - set(self.scene.finished())
        for fault in self.faults:
            mine = set(fault.branches)
            problems = [fault.wrong] if fault.wrong else []
            problems += [f"branch {b}: {wrong[b]}" for b in sorted(mine & set(wrong))]
            problems += [f"branch {b} has not finished" for b in sorted(mine & unfinished)]
            problems += [f"branch {b}: {lost[b]}" for b in sorted(set(fault.row["finished_before"]) & set(lost))]
            problems += self.notes if fault.kind == "truncated_checkpoint" else []
            happened = fault.happened
            if fault.kind == "truncated_checkpoint" and "best.ckpt" in (happened or ""):
                told = "was left out of the ensemble, whose message was followed"
                happened = f"{happened}; it {told if mine & self.followed else 'was written again'}"
            fault.row |= {"happened": happened, "recovered": not problems}
            fault.row |= {"problems": problems} if problems else {}
        self.lost, self.wrong = lost, wrong
        return [fault.row for fault in self.faults]


def _is_damaged(file: Any) -> bool:
    try:
        load_checkpoint(file)
    except CheckpointError:
        return True
    return False
