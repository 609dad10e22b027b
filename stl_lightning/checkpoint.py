"""Checkpoints of a branch: written whole or not at all, read without executing them, resumed to the bit."""

import hashlib
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from stl_lightning.errors import CheckpointError
from stl_lightning.module import IDENTITY
from stl_lightning.paths import BranchPaths, write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes through a temporary file that is flushed and renamed; loads tensors and plain types only."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(Path(path))


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
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: it is truncated or damaged. Delete it to train again") from error
    if identity is not None:
        _check_identity(checkpoint, identity, path)
    return checkpoint


def _check_identity(checkpoint: Any, identity: dict[str, Any], path: Path) -> None:
    found = checkpoint.get(IDENTITY) if isinstance(checkpoint, dict) else None
    if found is None:
        raise CheckpointError(f"{path} was not written by stl_lightning; delete it to train the branch again")
    wrong = [key for key in identity if found.get(key) != identity[key]]
    if wrong:
        listed = ", ".join(f"{key} is {found.get(key)!r}, expected {identity[key]!r}" for key in wrong)
        raise CheckpointError(f"{path} belongs to another branch or run: {listed}")


def fingerprint(path: Path) -> str:
    """SHA-256 of a file, in hex: ties cached logits to the weights they were computed with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` after every epoch and, if asked, every so many steps; makes the resumed run bit-identical.

    Beyond what Lightning saves it keeps the state of the random generators (dropout). Validation runs before the end
    of the epoch, so a checkpoint at that point has nothing left to repeat.
    """

    def __init__(self, paths: BranchPaths, every_n_steps: int | None = None) -> None:
        self.paths = paths
        self.every_n_steps = every_n_steps
        self._rng: dict[str, Any] | None = None
        self._step = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._rng is not None:
            _restore_rng(self._rng, module.device)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        # Between the batches of one accumulated step there are gradients, which no checkpoint holds.
        has_stepped, self._step = trainer.global_step > self._step, trainer.global_step
        is_due = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # The end of an epoch has its own checkpoint, after validation.
        if has_stepped and is_due and not trainer.is_last_batch:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save(trainer, module)

    def _save(self, trainer: Trainer, module: LightningModule) -> None:
        module.stop_if_diverged()  # type: ignore[operator]
        trainer.save_checkpoint(self.paths.last)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = _rng_state(module.device)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint["rng"]


class BestCheckpoint(Checkpoint):
    """Keeps `best.ckpt`, the weights with the best value of `monitor` on the validation split; the first of equals.

    Lightning's ModelCheckpoint forgets the best value when the run directory has been moved, and overwrites the file.
    """

    def __init__(self, paths: BranchPaths, monitor: str) -> None:
        self.paths = paths
        self.monitor = monitor
        self.sign = 1 if monitor.endswith("acc") else -1
        self.best = -math.inf

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        value = self.sign * float(trainer.callback_metrics[self.monitor])
        if value > self.best:  # never true of NaN
            self.best = value
            module.stop_if_diverged()  # type: ignore[operator]
            trainer.save_checkpoint(self.paths.best, weights_only=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]


def _rng_state(device: torch.device) -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _restore_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
