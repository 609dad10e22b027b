"""Checkpoints, one file a branch: written whole or not at all, read without executing them, resumed to the bit."""

import copy
import errno
import hashlib
import math
import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from stl_lightning.errors import CheckpointError
from stl_lightning.module import AVERAGES, IDENTITY, TOTALS
from stl_lightning.paths import BranchPaths, write_atomically
from stl_lightning.stacked import stack_optimizers, stack_states, unstack_optimizer, unstack_state


class BranchFiles(TorchCheckpointIO):
    """Keeps the checkpoint of a process as one file a branch, whichever branches it trained together.

    Lightning saves and loads one checkpoint; here it is taken apart, and put together again. A path without a folder
    means the file of that name in the folder of each branch, `storage_options` chooses among the branches; any other
    path means itself. Files are written through a temporary one that is flushed and renamed.

    The best weights wait in memory until `last.ckpt` is written: a run that is killed goes on from there, and finds
    them again. An epoch of a small network takes less time than the disk.
    """

    def __init__(self, branches: Sequence[BranchPaths]) -> None:
        super().__init__()
        self.branches = branches
        self._waiting: dict[BranchPaths, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if Path(path).name != str(path):
            write_atomically(Path(path), partial(torch.save, checkpoint))
            return
        chosen = range(len(self.branches)) if storage_options is None else storage_options
        if path == "best.ckpt":
            self._waiting |= {self.branches[i]: _kept(take_apart(checkpoint, i)) for i in chosen}
            return
        self.flush()  # the best weights first: the file says that they are there
        for i in chosen:
            branch = self.branches[i]
            branch.write(branch.folder / path, partial(torch.save, take_apart(checkpoint, i)))

    def flush(self) -> None:
        """Write the best weights that wait."""
        for branch, checkpoint in self._waiting.items():
            branch.write(branch.best, partial(torch.save, checkpoint))
        self._waiting.clear()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        if Path(path).name != str(path):
            return load_checkpoint(Path(path))
        return put_together([load_checkpoint(branch.folder / path) for branch in self.branches])


def _kept(value: Any) -> Any:
    """A copy in the memory of the CPU, which the training does not change."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _kept(entry) for key, entry in value.items()}
    return [_kept(entry) for entry in value] if isinstance(value, list) else copy.copy(value)


def take_apart(checkpoint: dict[str, Any], i: int) -> dict[str, Any]:
    """The checkpoint of the i-th of several branches that train together; undone by `put_together`.

    Equivalent: the checkpoint that the branch would have written alone.
    """
    if len(checkpoint[IDENTITY]) == 1:
        return checkpoint
    return checkpoint | {key: PARTS[key].apart(value, i) for key, value in checkpoint.items() if key in PARTS}


def put_together(checkpoints: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The checkpoint of branches that go on together from the same step.

    Raises: CheckpointError if they are at different steps, as after another process has written one of them meanwhile.
    """
    first = checkpoints[0]
    if any(progress(checkpoint) != progress(first) for checkpoint in checkpoints):
        raise CheckpointError("the branches' checkpoints are of different steps")
    if len(checkpoints) == 1:
        return first
    return first | {key: PARTS[key].together([of[key] for of in checkpoints]) for key in first if key in PARTS}


def progress(checkpoint: dict[str, Any]) -> tuple[int, Any]:
    """How far the training is: branches at which this is equal can go on together."""
    return checkpoint["global_step"], checkpoint["loops"]["fit_loop"]["state_dict"]


@dataclass(frozen=True)
class Part:
    """One row of `PARTS`: how an entry of a checkpoint is taken apart, and put together."""

    apart: Callable[[Any, int], Any]
    together: Callable[[Sequence[Any]], Any]


def _lists_apart(lists: dict[str, list[Any]], i: int) -> dict[str, list[Any]]:
    return {key: values[i : i + 1] for key, values in lists.items()}


def _lists_together(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {key: [value for part in parts for value in part[key]] for key in parts[0]}


PARTS = {
    IDENTITY: Part(lambda of, i: of[i : i + 1], lambda parts: [of for part in parts for of in part]),
    TOTALS: Part(lambda totals, i: totals[i : i + 1].clone(), lambda parts: torch.cat(list(parts))),
    "state_dict": Part(unstack_state, stack_states),
    AVERAGES: Part(unstack_state, stack_states),
    "SpectralDataModule": Part(_lists_apart, _lists_together),
    "optimizer_states": Part(
        lambda states, i: [unstack_optimizer(state, i) for state in states],
        lambda parts: [stack_optimizers(states) for states in zip(*parts, strict=True)],
    ),
    "callbacks": Part(
        lambda of, i: of | {"BestCheckpoint": _lists_apart(of["BestCheckpoint"], i)},
        lambda parts: parts[0] | {"BestCheckpoint": _lists_together([of["BestCheckpoint"] for of in parts])},
    ),
}


def load_checkpoint(path: Path, identity: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, and check whose it is if `identity` is given.

    Raises: CheckpointError if the file is missing, truncated, holds anything but tensors and plain types, or is of
    another branch or run.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}; train the branch with `stl fit`") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"refused to load {path}: it holds objects that would execute code when loaded, or is no checkpoint. "
            "Delete it to train the branch again"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        # In some files that were cut, torch looks for what would lie before their beginning.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        raise CheckpointError(f"cannot read {path}: it is truncated or damaged. Delete it to train again") from error
    if identity is not None:
        _check_identity(checkpoint, identity, path)
    return checkpoint


def _check_identity(checkpoint: Any, identity: dict[str, Any], path: Path) -> None:
    found = checkpoint.get(IDENTITY) if isinstance(checkpoint, dict) else None
    if not isinstance(found, list) or len(found) != 1:
        raise CheckpointError(f"{path} was not written by this version; delete it to train the branch again")
    wrong = [key for key in identity if found[0].get(key) != identity[key]]
    if wrong:
        listed = ", ".join(f"{key} is {found[0].get(key)!r}, expected {identity[key]!r}" for key in wrong)
        raise CheckpointError(f"{path} belongs to another branch or run: {listed}")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hex: ties cached logits to the weights they were computed with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt`, from which a resumed run is bit-identical: at the end of epochs, and every so many steps.

    Epochs that end less than `every_s` seconds after the last file are passed over, but not the last one of a Trainer.
    Beyond what Lightning saves it keeps the state of the random generators. Validation runs before the end of the
    epoch, so a checkpoint at that point has nothing left to repeat. A branch that diverged keeps the file it has.

    `before` is called before the file is written, to write what belongs to the same epochs. Where `is_leaving` answers
    true, the file is written at the next point at which one may be, and `leave` is called after it, which raises.
    """

    def __init__(
        self,
        every_s: float,
        every_n_steps: int | None,
        before: Callable[[], None],
        is_leaving: Callable[[], bool] = lambda: False,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        self.every_s = every_s
        self.every_n_steps = every_n_steps
        self.before = before
        self.is_leaving = is_leaving
        self.leave = leave
        self._rng: dict[str, Any] | None = None
        self._saved_step, self._saved_at = 0, -math.inf

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        _forget_half_a_chunk(trainer)
        if self._rng is not None:
            _restore_rng(self._rng, module.device)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """Save at the end of the chunk in which a multiple of `every_n_steps` was passed."""
        every = self.every_n_steps
        is_due = self.is_leaving() or (every is not None and trainer.global_step // every > self._saved_step // every)
        # The end of an epoch, or of the training, has its own checkpoint, after validation. Between the minibatches of
        # one accumulated step there are gradients, which no checkpoint holds.
        if is_due and module.has_stepped and not (trainer.is_last_batch or trainer.should_stop):
            loop = trainer.fit_loop
            # A run that resumes takes the validation at its checkpoint for done: where one comes now, the next step.
            if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):  # type: ignore[arg-type]
                self._save(trainer, module)
                if self.is_leaving():
                    self.leave()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        is_last = trainer.should_stop or trainer.current_epoch + 1 == trainer.max_epochs
        is_last |= 0 <= trainer.max_steps <= trainer.global_step
        is_leaving = self.is_leaving() and not is_last  # what has come to its end ends
        if is_last or is_leaving or time.monotonic() - self._saved_at >= self.every_s:
            self._save(trainer, module)
        if is_leaving:
            self.leave()

    def save_and_leave(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, module)
        self.leave()

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        self.before()
        trainer.save_checkpoint("last.ckpt", storage_options=alive(module))
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = _rng_state(module.device)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]


def _forget_half_a_chunk(trainer: Trainer) -> None:
    """Where a chunk was left half-way, have Lightning count it as not begun.

    It starts its count of the epoch anew, but keeps the one of the whole training: from each later checkpoint it would
    conclude that the last chunk was not done, wait for one more than there are, and leave out the epoch's validation.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarted_on_train_batch_end:
        total: Any = loop.batch_progress.total
        total.ready = total.started = total.processed = total.completed


class BestCheckpoint(Checkpoint):
    """Keeps `best.ckpt` of each branch, the weights with the best value of `monitor` on the validation split.

    The first of equals; with `model.averaging`, the averaged weights, which are what is validated. Lightning's
    ModelCheckpoint forgets the best value when the run directory has been moved, and overwrites the file. With
    `patience`, a branch has reached its end after so many validations without a better value.
    """

    def __init__(self, monitor: str, patience: int | None, n_branches: int) -> None:
        self.monitor = monitor
        self.patience = patience
        self.sign = 1 if monitor.endswith("acc") else -1
        self.best = [-math.inf] * n_branches
        self.waited = [0] * n_branches  # validations since

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        values = (self.sign * module.val_scores()[self.monitor]).tolist()
        better = [i for i in alive(module) if values[i] > self.best[i]]  # never true of NaN
        self.waited = [waited + 1 for waited in self.waited]
        for i in better:
            self.best[i], self.waited[i] = values[i], 0
        if better:
            trainer.save_checkpoint("best.ckpt", weights_only=True, storage_options=better)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A run that was killed between its last epoch and its end has nothing left to do."""
        self._stop_if_any_ended(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Leave when a branch has reached its end: the others go on without it, from the checkpoint of this epoch."""
        self._stop_if_any_ended(trainer, module)

    def _stop_if_any_ended(self, trainer: Trainer, module: Any) -> None:
        if self.ended(module):
            trainer.should_stop = True

    def ended(self, module: Any) -> list[int]:
        """The positions of the branches that have diverged or run out of patience: an end before the last epoch."""
        limit = math.inf if self.patience is None else self.patience
        return [i for i, waited in enumerate(self.waited) if waited >= limit or not module.is_alive(i)]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = list(state_dict["best"]), list(state_dict["waited"])


def alive(module: Any) -> list[int]:
    """The positions of the branches that have not diverged."""
    return [i for i in range(module.n_branches) if module.is_alive(i)]


def _rng_state(device: torch.device) -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _restore_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
