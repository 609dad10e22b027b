"""Train what an experiment asks for, a run a seed and row, with the commands that a user types."""

import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reproducing.experiments import RECIPE, Experiment
from reproducing.files import read_json, write
from reproducing.origin import CHECKOUT, origin
from stl_lightning.errors import ConfigError
from stl_lightning.exits import INTERRUPTED

STL = (sys.executable, "-m", "stl_lightning")
PRECISION, MIXED = "--trainer.precision=", "bf16-mixed"


@dataclass(frozen=True)
class Training:
    """A row of an experiment with one seed. What it is trained with is read when it is planned."""

    name: str  # of the run
    experiment: Experiment
    key: str  # of its row
    seed: int
    root: Path
    config: dict[str, Any]
    extra: tuple[str, ...] = ()  # settings of who calls, as --key=value
    data: Path | None = None  # folder of the data sets
    n_processes: int | None = None  # that train the branches; None: one for all, which stacks them where it can
    named_precision: str | None = None  # `trainer.precision`, by who calls

    @property
    def folder(self) -> Path:
        """Of the run; of a conventional network, its part of one."""
        return self.root / self.name / ("baseline" if self.only_baseline else "")

    @property
    def only_baseline(self) -> bool:
        variant = self.experiment.rows[self.key]
        return variant is not None and variant.only_baseline

    def settings(self) -> list[str]:
        """What is set beside the config, but for what a seed has of its own: its number and its precision."""
        variant = self.experiment.rows[self.key]
        return [*self.experiment.settings, *(variant.settings if variant else ()), *self.extra]

    def precision(self) -> str | None:
        """`trainer.precision` of this seed, if it may be another than the recipe's. A row may have seeds of several.

        What the caller named, or with what the run has begun; or else float32, where the recipe is in mixed bfloat16
        and this machine only emulates that, many times slower.
        """
        if self.named_precision:
            return self.named_precision
        if config := next(self.folder.glob("branches/*/config.yaml"), None):
            begun: str | None = yaml.safe_load(config.read_text())["trainer"]["precision"]
            return begun
        if self._asked("trainer.precision") != MIXED:
            return None
        from stl_lightning.strategy import pick_device  # takes seconds, and few recipes get here
        from stl_lightning.training import is_emulated

        try:
            device = pick_device(self._asked("trainer.accelerator") or "auto", 0)
        except ConfigError:  # as `stl` will say
            return None
        return "32-true" if is_emulated(MIXED, device) else None

    def _asked(self, key: str) -> Any:
        """The value of a setting, such as trainer.precision: of the last one that names it, or of the config."""
        section, name = key.split(".")
        named = [setting.partition("=")[2] for setting in self.settings() if setting.startswith(f"--{key}=")]
        return named[-1] if named else self.config.get(section, {}).get(name)

    def trained(self) -> dict[str, Any]:
        """With what it is trained, but for the seed and `precision`: two that agree in it are of one row."""
        text = json.dumps(self.config, sort_keys=True)
        return {"settings": self.settings(), "config": hashlib.sha256(text.encode()).hexdigest()}

    def commands(self) -> list[list[str]]:
        """`stl baseline` for a conventional network, `stl run` or `stl launch` for branches; then `stl ensemble`.

        A run that was there keeps the settings of its ensemble: those of today go to `stl ensemble` by name.
        """
        own = [f"--seed_everything={self.seed}", f"--run.root={self.root}", f"--run.name={self.name}"]
        quiet = "--trainer.enable_progress_bar=false"
        precision = [f"{PRECISION}{found}"] if (found := self.precision()) else []
        config = ["--config", str(CHECKOUT / self.experiment.config)]
        args = [*config, *self.settings(), *precision, *own, *self.where(), quiet]
        side_by_side = ["launch", f"--local={self.n_processes}", "--no-ensemble"]
        train = ["baseline"] if self.only_baseline else ["run"] if self.n_processes is None else side_by_side
        return [[*train, *args], *([] if train == ["run"] else [self._scored()])]

    def score(self) -> list[str]:
        """The command that scores what is trained, with the settings of today."""
        return [*STL, *self._scored()]

    def _scored(self) -> list[str]:
        of_config = [f"--ensemble.{key}={json.dumps(value)}" for key, value in self.config.get("ensemble", {}).items()]
        of_call = [setting for setting in self.settings() if setting.startswith("--ensemble.")]
        return ["ensemble", str(self.folder), *self.where(), *of_config, *of_call]

    def where(self) -> list[str]:
        """The setting that names the images, if they lie elsewhere than the config says."""
        return [f"--data.root={self.data / self.experiment.folder}"] if self.data else []

    def carry_out(self) -> int:
        """Train what is not there yet, from where an earlier call was interrupted; 0, or the code of what failed."""
        if not (self.folder / "branches").exists():
            self.root.mkdir(parents=True, exist_ok=True)
            write(self._origin, json.dumps(origin()))
        for command in self.commands():
            precision = [arg for arg in command if arg.startswith(PRECISION)][-1:]
            print(" ".join([f"== {self.name}: stl {command[0]}", *precision]), flush=True)
            if code := call([*STL, *command]):
                return code
        return 0

    @property
    def _origin(self) -> Path:
        return self.root / f"{self.name}{'-baseline' if self.only_baseline else ''}.origin.json"

    def origin(self) -> dict[str, Any]:
        """On which machine it was begun, with which commit; None for each if that is not known."""
        return read_json(self._origin) if self._origin.exists() else {"machine": None, "commit": None}

    def missing(self) -> dict[int, str]:
        """The branches that are not in the ensemble it was scored with, and why not."""
        results = self.results()
        return {k: results["left_out"].get(str(k), "it has not begun") for k in results["missing"]}

    def stacked(self) -> dict[str, Any]:
        """The results of a conventional network with stacking: the affine correction of outputs that an ensemble gets.

        The run is left scored as it was.
        """

        def scored(*weighting: str) -> dict[str, Any]:
            subprocess.run([*self.score(), *weighting], stdout=subprocess.DEVNULL, check=True, cwd=CHECKOUT)
            return self.results()

        found = scored("--ensemble.weighting=stacking")
        scored()
        return found

    def results(self) -> dict[str, Any]:
        """What the last scoring has written."""
        found: dict[str, Any] = read_json(self.folder / "ensemble" / "results.json")
        return found

    def costs(self) -> dict[str, Any]:
        """What `stl cost` says of it when it is done."""
        command = [*STL, "cost", str(self.folder), "--json", *self.where()]
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=CHECKOUT)
        found: dict[str, Any] = json.loads(said.stdout)
        return found


def call(command: Sequence[str]) -> int:
    """The exit code of a command; INTERRUPTED if meanwhile something asked this process to end.

    Then the command is asked too, which saves first. Ctrl-C in a terminal has asked it already.
    """
    child = subprocess.Popen(command, cwd=CHECKOUT)
    asked = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        if number == signal.SIGTERM:
            child.send_signal(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
        return INTERRUPTED if asked else code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


Planned = dict[str, list[Training]]  # of each row of an experiment


def trainings(
    name: str,
    experiment: Experiment,
    root: Path,
    seeds: Sequence[int] | None = None,
    extra: Sequence[str] = (),
    data: Path | None = None,
    n_processes: int | None = None,
) -> Planned:
    """The runs of each row of an experiment; the conventional network is trained in the folder of the recipe."""
    config = yaml.safe_load((CHECKOUT / experiment.config).read_text())
    precision = [setting.removeprefix(PRECISION) for setting in extra if setting.startswith(PRECISION)]
    called = {
        "extra": tuple(setting for setting in extra if not setting.startswith(PRECISION)),
        "data": data,
        "n_processes": n_processes,
        "named_precision": precision[-1] if precision else None,
    }
    found = {}
    for key, variant in experiment.rows.items():
        listed = range(variant.seeds if variant and variant.seeds else experiment.seeds)
        label = name if key in (RECIPE, "baseline") else f"{name}-{key}"
        found[key] = [
            Training(f"{label}-seed{seed}", experiment, key, seed, root, config, **called)
            for seed in (listed if seeds is None else seeds)
        ]
    return found
