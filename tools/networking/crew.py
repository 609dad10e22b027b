"""The workers of one method, on nodes of their own, which train whenever it is their turn."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from networking import conventional
from networking.nodes import LINKS, MALLOC, Nodes
from networking.work import CLOCK, N_BRANCHES, N_WORKERS, WORKER, EpochLog, Record, Work

CHECKOUT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 600.0  # of a turn
# A launcher's variables, which this tool sets itself or does without.
LAUNCHER = ("SLURM_", "TORCHELASTIC_", "STL_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_")


class MeasurementError(Exception):
    """A training failed or took too long."""


@dataclass(frozen=True)
class Method:
    """What the workers do. `alone`: each the work of one worker, as copies that know nothing of each other."""

    name: str
    alone: bool = False

    @property
    def is_spectral(self) -> bool:
        return self.name.startswith("spectral")

    @property
    def epochs_per_turn(self) -> int:
        """An epoch of the whole work is one of each branch."""
        return N_BRANCHES if self.is_spectral and self.alone else 1


class Crew:
    """`with Crew(...) as crew:` starts four workers that take `n_turns` turns; the first turn warms up."""

    def __init__(self, method: Method, work: Work, folder: Path, n_turns: int, cores: float | None) -> None:
        self.method, self.work, self.folder, self.n_turns = method, work, folder, n_turns
        self.nodes = Nodes(N_WORKERS, cores, folder.name)
        self.notes = [EpochLog(folder, i) for i in range(N_WORKERS)]
        self._ends: list[int] = []  # of the pipes
        self.logs = [folder / f"worker-{i}.log" for i in range(N_WORKERS)]

    def __enter__(self) -> "Crew":
        self.folder.mkdir()
        self.nodes.__enter__()
        try:
            for notes in self.notes:
                notes.prepare()
            self.workers = [self.nodes.start(i, self._work(i), log) for i, log in enumerate(self.logs)]
        except BaseException:
            self.nodes.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.nodes.remove()
        self._let_go()

    def turn(self, link: str) -> list[list[Record]]:
        """Let all workers train for a turn, and wait until they have nothing more to do before the next one.

        Returns what each noted of its epochs. Raises: MeasurementError with a worker's last words if it fails.
        """
        self._wait(self._all_wait)
        self.nodes.shape(LINKS[link])
        self.nodes.limit()  # what came before was starting up
        before = [len(notes.read()) for notes in self.notes]
        self._let_go()
        n_epochs = self.method.epochs_per_turn
        self._wait(lambda: all(len(notes.read()) == n + n_epochs for notes, n in zip(self.notes, before, strict=True)))
        self._wait(lambda: self._all_wait() or self._all_ended())
        return [notes.read()[n:] for notes, n in zip(self.notes, before, strict=True)]

    def finish(self) -> float:
        """After the last turn: the bytes in and out of each worker since its link was made."""
        self._wait(self._all_ended)
        return sum(each.sent + each.received for each in self.nodes.traffic()) / N_WORKERS

    def _all_wait(self) -> bool:
        """Whether all workers wait for their turn; holds the pipes from which they read."""
        with suppress(OSError):  # nobody reads from the next pipe yet
            while len(self._ends) < N_WORKERS:
                self._ends.append(os.open(self.notes[len(self._ends)].pipe, os.O_WRONLY | os.O_NONBLOCK))
        return len(self._ends) == N_WORKERS

    def _let_go(self) -> None:
        while self._ends:
            os.close(self._ends.pop())

    def _all_ended(self) -> bool:
        return all(worker.exitcode == 0 for worker in self.workers)

    def _wait(self, is_over: Callable[[], bool]) -> None:
        give_up_s = time.monotonic() + TIMEOUT_S
        while not is_over():
            for i, (worker, log) in enumerate(zip(self.workers, self.logs, strict=True)):
                if worker.exitcode:
                    last = log.read_text(errors="replace")[-3000:]
                    raise MeasurementError(f"{self.method.name}: worker {i} ended with {worker.exitcode}:\n{last}")
            if time.monotonic() > give_up_s:
                raise MeasurementError(f"{self.method.name}: a turn took longer than {TIMEOUT_S:.0f} s")
            time.sleep(0.02)

    def _work(self, i: int) -> Callable[[], Any]:
        """What the i-th worker does: the command `stl fit`, or the plain loop."""
        if not self.method.is_spectral:
            return partial(conventional.train_worker, self.method.name, i, self.work, self.notes[i], self.n_turns)
        run = f"run-{i}" if self.method.alone else "run"
        config = self.folder / f"{run}.yaml"
        settings = spectral_config(self.work, self.folder, run, self.n_turns, self.method.epochs_per_turn)
        config.write_text(json.dumps(settings, indent=2))  # JSON is YAML
        argv = [sys.executable, "-m", "stl_lightning", "fit", "--config", str(config)]
        return partial(os.execve, sys.executable, argv, environ(i, self.method.alone))


def spectral_config(work: Work, folder: Path, run: str, n_epochs: int, epochs_per_turn: int) -> dict[str, Any]:
    """Settings of `stl fit`: four branches on the images of `work`, without validation, which others do not do."""
    network = {"class_path": "stl_lightning.networks.ConvNet", "init_args": {"widths": list(work.widths)}}
    optimizer = {"class_path": "torch.optim.Adam", "init_args": {"lr": work.lr, "fused": True}}
    clock = {"class_path": CLOCK, "init_args": {"folder": str(folder), "epochs_per_turn": epochs_per_turn}}
    return {
        "run": {"name": run, "root": str(folder)},
        "data": {
            "source": "npz", "root": work.images, "val_size": work.n_held_out, "batch_size": work.batch,
            "reorganisation": "polyphase", "block": 2, "transform": "dct",
        },
        "model": {"network": network, "optimizer": optimizer},
        "trainer": {
            "accelerator": "cpu", "max_epochs": n_epochs, "limit_val_batches": 0,
            "enable_progress_bar": False, "callbacks": [clock],
        },
    }  # fmt: skip


def environ(i: int, alone: bool) -> dict[str, str]:
    """As `srun` with one task a node would set it, without a job that could be asked for."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)}
    paths = [*filter(None, [os.environ.get("PYTHONPATH")]), str(CHECKOUT), str(CHECKOUT / "tools")]
    ours = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", WORKER: str(i)}
    ours |= {variable: str(n_bytes) for variable, (_, n_bytes) in MALLOC.items()}
    numbers = {"STEP_ID": 0, "PROCID": i, "NTASKS": N_WORKERS, "LOCALID": 0, "NODEID": i}
    return kept | ours | ({} if alone else {f"SLURM_{name}": str(number) for name, number in numbers.items()})
