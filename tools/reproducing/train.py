"""Train what an experiment asks for, a run a seed and variant, with the command that a user types."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reproducing.experiments import Experiment, Variant

CHECKOUT = Path(__file__).resolve().parents[2]
STL = (sys.executable, "-m", "stl_lightning")


@dataclass(frozen=True)
class Training:
    """One run: a row of an experiment with one seed."""

    name: str
    experiment: Experiment
    key: str  # of its row
    seed: int
    root: Path
    extra: tuple[str, ...] = ()  # settings of who calls
    data: str | None = None  # folder of the data sets
    n_processes: int | None = None  # that train the branches; None: one for all, which stacks them where it can

    @property
    def folder(self) -> Path:
        """Of the run; of a conventional network, its part of one."""
        return self.root / self.name / ("baseline" if self.only_baseline else "")

    @property
    def variant(self) -> Variant | None:
        return self.experiment.rows[self.key]

    @property
    def only_baseline(self) -> bool:
        return self.variant is not None and self.variant.only_baseline

    def _common_settings(self) -> list[str]:
        own = self.variant.settings if self.variant else ()
        return [*self.experiment.settings, *own, *self.extra]

    def commands(self) -> list[list[str]]:
        """`stl baseline` for a conventional network, `stl run` for branches."""
        own = [f"--seed_everything={self.seed}", f"--run.root={self.root}", f"--run.name={self.name}", *self.where()]
        args = ["--config", str(CHECKOUT / self.experiment.config), *self._common_settings(), *own]
        if self.only_baseline:  # which is a run of one branch
            return [["baseline", *args], ["ensemble", str(self.folder)]]
        train = ["run"] if self.n_processes is None else ["launch", f"--local={self.n_processes}"]
        return [[*train, *args]]

    def where(self) -> list[str]:
        """The setting that names the images, if they lie elsewhere than the config says."""
        return [f"--data.root={Path(self.data) / self.experiment.folder}"] if self.data else []

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

    def costs(self) -> dict[str, Any]:
        """What `stl cost` says of it when it is done."""
        command = [*STL, "cost", str(self.folder), "--json"]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=CHECKOUT)
        found: dict[str, Any] = json.loads(said.stdout)
        return found

    def trained(self) -> dict[str, Any]:
        """With what it is trained, but for the seed: two that agree in it are of one row."""
        config = yaml.safe_load((CHECKOUT / self.experiment.config).read_text())
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        return {"settings": self._common_settings(), "config": digest}


Planned = dict[str, list[Training]]  # of each row of an experiment


def trainings(
    name: str,
    experiment: Experiment,
    root: Path,
    seeds: Sequence[int] | None,
    extra: Sequence[str],
    data: str | None = None,
    n_processes: int | None = None,
) -> Planned:
    """The runs of each row of an experiment; the conventional network is trained in the folder of the recipe."""
    found = {}
    for key, variant in experiment.rows.items():
        listed = range(variant.seeds if variant and variant.seeds else experiment.seeds)
        label = name if key in ("", "baseline") else f"{name}-{key}"
        found[key] = [
            Training(f"{label}-seed{seed}", experiment, key, seed, root, tuple(extra), data, n_processes)
            for seed in (listed if seeds is None else seeds)
        ]
    return found
