"""What is compared: final weights with those of a run without faults, to the bit; finished branches with themselves."""

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from faulting.scene import Scene
from stl_lightning.checkpoint import fingerprint, load_checkpoint
from stl_lightning.errors import CheckpointError, RunError
from stl_lightning.paths import BranchPaths
from stl_lightning.status import read_status


@dataclass(frozen=True)
class Outcome:
    """What a branch comes to: the best and the last weights, where it ended, how it did."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    epoch: int
    step: int
    loss: float | None
    metrics: tuple[str, ...]  # the rows of metrics.csv but for the time

    @classmethod
    def of(cls, paths: BranchPaths, branch: int) -> "Outcome":
        """Raises: CheckpointError, RunError if a file is missing or damaged."""
        status, last = read_status(paths, branch), load_checkpoint(paths.last)
        best = load_checkpoint(paths.best)["state_dict"]
        rows = paths.metrics.read_text().splitlines() if paths.metrics.exists() else ()
        metrics = tuple(row.rpartition(",")[0] for row in rows)  # epoch_s is the last column
        return cls(best, last["state_dict"], status.epoch, last["global_step"], status.loss, metrics)

    def difference(self, other: "Outcome") -> str | None:
        """What differs in any bit; None if nothing does."""
        if (self.epoch, self.step, self.loss) != (other.epoch, other.step, other.loss):
            mine, theirs = (f"epoch {of.epoch}, step {of.step}, loss {of.loss}" for of in (self, other))
            return f"{mine}; expected {theirs}"
        for mine, theirs in zip_longest(self.metrics, other.metrics):
            if mine != theirs:
                return f"a row of metrics.csv: {mine}; expected {theirs}"
        for name in ("best", "last"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours.keys() != theirs.keys() or not all(torch.equal(ours[key], theirs[key]) for key in ours):
                return f"the weights of {name}.ckpt"
        return None


def wrong_branches(scene: Scene, expected: list[Outcome]) -> dict[int, str]:
    """The finished branches whose outcome is not the expected one, and what differs."""
    found = {}
    for branch in scene.finished():
        try:
            reason = Outcome.of(scene.branch(branch), branch).difference(expected[branch])
        except (CheckpointError, RunError) as error:
            reason = str(error)
        if reason:
            found[branch] = reason
    return found


class Keeper:
    """Remembers the files of branches when they finish, and finds those that are not as they were then."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.hashes: dict[int, dict[str, str]] = {}

    def look(self) -> list[int]:
        """The branches that have finished."""
        for branch in self.scene.finished():
            if branch not in self.hashes:
                self.hashes[branch] = self._hashes(branch)
        return sorted(self.hashes)

    def forget(self, branch: int) -> None:
        """One whose files were damaged on purpose, and which is to be trained again."""
        self.hashes.pop(branch, None)

    def lost(self) -> dict[int, str]:
        """The branches that had finished and have not any more, or are not the same; what of them."""
        found = {}
        for branch, hashes in self.hashes.items():
            now = self._hashes(branch)
            changed = [name for name in hashes if now.get(name) != hashes[name]]
            if changed:
                found[branch] = f"{', '.join(changed)} changed after the branch had finished"
        return found

    def _hashes(self, branch: int) -> dict[str, str]:
        """Of its files, and of what its status says but for the time."""
        paths, status = self.scene.branch(branch), self.scene.status(branch)
        files = {path.name: path for path in (paths.best, paths.last, paths.config)}
        found = {name: fingerprint(path) if path.exists() else "none" for name, path in files.items()}
        return found | {"status": f"{status.state} {status.attempt} {status.epoch} {status.loss}"}
