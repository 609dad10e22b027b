"""stl's side of a comparison: its training, an epoch a turn, and its commands in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.compare import Side, Turn
from benchmarks.data import Data
from benchmarks.setting import Setting

CHECKOUT = Path(__file__).resolve().parents[2]
CONFIGS = CHECKOUT / "configs"
NO_AUGMENTATION = ("--data.augment.crop_pad=0", "--data.augment.flip=false")
PEAK = """
import re
print("peak_kib", re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1], flush=True)
"""


def arguments(setting: Setting, config: str, data: Data, device: str, *more: str) -> list[str]:
    """The command line of a training without validation that goes on until it is stopped."""
    return [
        f"--config={CONFIGS / config}",
        *data.settings,
        f"--run.root={setting.folder}",
        f"--run.name={Path(mkdtemp(dir=setting.folder)).name}",
        "--trainer.max_epochs=1000000",
        "--trainer.limit_val_batches=0",
        # By default every 10 s of an undisturbed training; here those would be the turns of the other sides.
        "--run.checkpoint_every_s=1e9",
        "--trainer.enable_progress_bar=false",
        f"--trainer.accelerator={device}",
        *more,
    ]


def no_bfloat16(device: str) -> str | None:
    """Emulated, a training takes minutes and tells nothing."""
    from stl_lightning.training import is_emulated

    return f"bfloat16 is emulated on this {device}" if is_emulated("bf16", torch.device(device)) else None


def training(args: Sequence[str], n_samples: int) -> Side:
    """A training that gives up its turn after each epoch, without validation and checkpoints.

    Value: samples x branches per second.
    """

    def side(turn: Turn) -> None:
        from stl_lightning import status
        from stl_lightning.cli.config import SpectralCLI
        from stl_lightning.training import train_branches

        stop_at_epoch_ends(turn, n_samples)
        cli = SpectralCLI(list(args), "fit")
        run = cli.claim()
        jobs = [cli.job(run, branch) for branch in cli.owned_branches()]
        train_branches(jobs)
        raise AssertionError([status.read_status(job.paths, job.branch).error for job in jobs])

    return side


def stop_at_epoch_ends(turn: Turn, n_samples: int) -> None:
    """From now on in this process, a turn ends with each epoch of `n_samples`, of however many branches are stacked.

    Not by a callback, which is a setting of the user's: branches with callbacks of their own train one by one.
    """
    from stl_lightning.module import BranchModule

    original = BranchModule.on_train_epoch_end

    def on_train_epoch_end(module: BranchModule) -> None:
        original(module)
        turn.done(n_samples * module.n_branches / turn.seconds())

    BranchModule.on_train_epoch_end = on_train_epoch_end  # type: ignore[method-assign, assignment]


class LeaveAfterFirstStep(Callback):
    """Ends the process when the first batch has been trained on."""

    def on_train_batch_end(self, *_: Any) -> None:
        os._exit(0)


def command(*argv: str) -> Side:
    """A process, again and again; value: seconds from start to end."""

    def side(turn: Turn) -> None:
        while True:
            execute(argv)
            turn.done(turn.seconds())

    return side


def peak_bytes(code: str, more: int = 0) -> Side:
    """Python code in a process of its own; value: the most memory it held resident, and `more` bytes."""

    def side(turn: Turn) -> None:
        while True:
            printed = execute([sys.executable, "-c", code + PEAK])
            turn.done(1024 * float(printed.split()[-1]) + more)

    return side


def execute(argv: Sequence[str]) -> str:
    """What a command prints. Raises: RuntimeError with its last words if it fails."""
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(CHECKOUT), str(CHECKOUT / "tools")])
    done = subprocess.run(argv, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    if done.returncode:
        raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


def stl(*args: str) -> list[str]:
    return [sys.executable, "-m", "stl_lightning", *args]
