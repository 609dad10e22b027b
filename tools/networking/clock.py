"""The epochs of `stl fit`, noted by a callback that its configuration names."""

import os
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from networking.work import WORKER, EpochLog


class EpochClock(Callback):
    """Notes each epoch of a branch, in turns of so many epochs, whichever branch they are of."""

    def __init__(self, folder: str, epochs_per_turn: int) -> None:
        self.notes = EpochLog(Path(folder), int(os.environ[WORKER]), epochs_per_turn)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.first_step = trainer.global_step
        self.notes.begin()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.notes.end(trainer.global_step - self.first_step)
        self.notes.note()
