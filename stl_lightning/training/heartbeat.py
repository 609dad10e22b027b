"""The heart of a process that trains: a thread that rewrites `status.json` of its branches every few seconds.

A thread, because a validation, or the first look at a data set, may take longer than a living process may be silent. It
also looks at what the process sends and receives.
"""

import math
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from stl_lightning import leaving
from stl_lightning.errors import FencedError, LeaveError, STLError
from stl_lightning.paths import BranchPaths
from stl_lightning.status import HEARTBEAT_S, Status, write_status
from stl_lightning.supervisor import is_orphan
from stl_lightning.traffic import BYTES, Traffic, total_bytes

LOOK_S = 1.0  # between two looks at the sockets and at the supervisor


class Heartbeat(Callback):
    """Beats while it is entered as a context; as a callback of the Trainer it learns how far the training is.

    A beat that finds a newer attempt in possession leaves the error in `fenced`. One that cannot write, such as on a
    disk that is full for a while, is left out: a checkpoint that cannot be written will end the training.
    """

    def __init__(self, branches: Sequence[tuple[BranchPaths, Status]], every_s: float = HEARTBEAT_S) -> None:
        self.branches = branches
        self.every_s = every_s
        self.fenced: FencedError | None = None
        self._traffic = Traffic()
        self._window = secrets.token_hex(4)  # names what this process counts from here on, for all its branches
        self._earlier = [status.traffic.get("windows", {}) for _, status in branches]
        self._trainer: Trainer | None = None
        self._epoch_began = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        self._traffic.start()
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()
        self._traffic.stop()
        self._note_traffic()

    def _note_traffic(self) -> None:
        totals = self._traffic.totals()
        for (_, status), earlier in zip(self.branches, self._earlier, strict=True):
            windows = earlier | {self._window: [totals[name] for name in BYTES]}
            status.traffic = totals | total_bytes([windows]) | {"windows": windows}

    def _run(self) -> None:
        last = time.monotonic()
        while not self._over.wait(min(LOOK_S, self.every_s)):
            self._traffic.sample()
            if is_orphan():
                leaving.note("the end of its supervisor")
            if time.monotonic() - last < self.every_s:
                continue
            last = time.monotonic()
            try:
                self.beat()
            except FencedError as error:
                self.fenced = error
                return
            except STLError as error:
                with suppress(OSError):  # where the log is on the same full disk
                    print(f"no heartbeat: {error}", file=sys.stderr, flush=True)

    def beat(self) -> None:
        """Raises: FencedError, RunError as `write_status`."""
        trainer = self._trainer
        self._note_traffic()
        for paths, status in self.branches:
            if trainer is not None:
                status.step = trainer.global_step
            write_status(paths, status)

    def is_leaving(self) -> bool:
        """Whether the training should end at the next step boundary."""
        return self.fenced is not None or leaving.asked() is not None

    def leave(self) -> None:
        """Raises: FencedError, or LeaveError that names the signal."""
        if self.fenced is not None:
            raise self.fenced
        assert self._trainer is not None, "only a training leaves"
        for _, status in self.branches:
            status.step = self._trainer.global_step
        raise LeaveError(f"asked to leave by {leaving.asked()}; saved at step {self._trainer.global_step}")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._trainer = trainer
        for _, status in self.branches:
            status.epoch, status.n_epochs = trainer.current_epoch, trainer.max_epochs
        self._epoch_began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        now = time.monotonic()
        for (_, status), loss in zip(self.branches, module.val_scores()["val/loss"].tolist(), strict=True):
            status.epoch, status.step = trainer.current_epoch + 1, trainer.global_step
            status.epoch_s = now - self._epoch_began
            status.loss = loss if math.isfinite(loss) else None
        self._epoch_began = now

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._traffic.sample()
        self._note_traffic()
