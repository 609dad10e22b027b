"""Train what an experiment asks for, a run a seed and variant, with the command that a user types."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproducing.experiments import Experiment, Variant

CHECKOUT = Path(__file__).resolve().parents[2]
STL = (sys.executable, "-m", "stl_lightning")
DONE_FILE = "reproduced.json"  # in a run: with which settings it was trained to its end, and what it cost


@dataclass(frozen=True)
class Training:
    """One run: a variant of an experiment with one seed."""

    name: str
    experiment: Experiment
    variant: Variant | None  # None: the recipe itself
    seed: int
    root: Path
    extra: tuple[str, ...] = ()  # settings of who calls
    data: str | None = None  # folder of the data sets
    n_processes: int | None = None  # that train the branches; None: one for all, which stacks them where it can

    @property
    def folder(self) -> Path:
        return self.root / self.name

    @property
    def only_baseline(self) -> bool:
        return self.variant is not None and self.variant.only_baseline

    @property
    def settings(self) -> list[str]:
        own = self.variant.settings if self.variant else ()
        return [*self.experiment.settings, *own, *self.extra, f"--seed_everything={self.seed}"]

    def commands(self) -> list[list[str]]:
        """`stl baseline` where there is one to train, `stl run` where there are branches."""
        place = [f"--run.root={self.root}", f"--run.name={self.name}"]
        place += self.where()
        args = ["--config", str(CHECKOUT / self.experiment.config), *self.settings, *place]
        if self.only_baseline:  # which is a run of one branch
            return [["baseline", *args], ["ensemble", str(self.folder / "baseline")]]
        train = ["run"] if self.n_processes is None else ["launch", f"--local={self.n_processes}"]
        return ([["baseline", *args]] if self.variant is None else []) + [[*train, *args]]

    def where(self) -> list[str]:
        """The setting that names the images, if they lie elsewhere than the config says."""
        return [f"--data.root={Path(self.data) / self.experiment.folder}"] if self.data else []

    def is_done(self) -> bool:
        """Whether it was trained to its end, with the settings and the config of today."""
        done = self.folder / DONE_FILE
        return done.exists() and json.loads(done.read_text()).get("trained") == self._description()

    def costs(self) -> dict[str, Any]:
        """What `stl cost` said when it was done; of a baseline alone, nothing."""
        found: dict[str, Any] = json.loads((self.folder / DONE_FILE).read_text())["costs"]
        return found

    def carry_out(self) -> None:
        """Train what is not there yet; goes on where an earlier call was interrupted.

        Raises: SystemExit with the exit code of the command that failed.
        """
        for command in self.commands():
            print(f"== {self.name}: stl {command[0]}", flush=True)
            quiet = [] if command[0] == "ensemble" else ["--trainer.enable_progress_bar=false"]
            done = subprocess.run([*STL, *command, *quiet], cwd=CHECKOUT)
            if done.returncode:
                sys.exit(done.returncode)
        temporary = self.folder / f".{DONE_FILE}.part"
        temporary.write_text(json.dumps({"trained": self._description(), "costs": self._costs()}))
        os.replace(temporary, self.folder / DONE_FILE)

    def _costs(self) -> dict[str, Any]:
        if self.only_baseline:
            return {}
        command = [*STL, "cost", str(self.folder), "--json"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=CHECKOUT)
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    def _description(self) -> dict[str, object]:
        config = hashlib.sha256((CHECKOUT / self.experiment.config).read_bytes()).hexdigest()
        return {"settings": self.settings, "config": config}


def trainings(
    name: str,
    experiment: Experiment,
    root: Path,
    n_seeds: int | None,
    extra: Sequence[str],
    data: str | None = None,
    n_processes: int | None = None,
) -> dict[str, list[Training]]:
    """The runs of an experiment: those of the recipe itself under "", those of each variant under its name."""
    found = {}
    for key, variant in {"": None, **experiment.variants}.items():
        count = n_seeds or (variant.seeds if variant and variant.seeds else experiment.seeds)
        label = f"{name}-{key}" if key else name
        found[key] = [
            Training(f"{label}-seed{seed}", experiment, variant, seed, root, tuple(extra), data, n_processes)
            for seed in range(count)
        ]
    return found
