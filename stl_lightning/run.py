"""The run directory: its options, `run.json`, and the check that whoever joins a run has the same settings."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stl_lightning.errors import ConfigError, RunError, unknown
from stl_lightning.paths import RunPaths, create_once, read_json

MONITORS = ("val/acc", "val/loss")
COMPARED = ("source", "fingerprint", "image_shape", "n_classes", "val_size", "augment", "seed")


@dataclass
class RunOptions:
    """Where a run is kept and which part of it this process trains.

    Args:
        name: Name of the run: its folder under `root`, its group in W&B.
        root: Folder that holds the runs.
        branches: Branches to train; null takes those that this rank owns.
        checkpoint_every_n_steps: Write `last.ckpt` this often besides at the end of epochs; null does not.
        checkpoint_every_s: Seconds between two ends of epochs that write `last.ckpt`; 0 writes it at each.
        monitor: Validation metric whose best value selects `best.ckpt`: val/acc or val/loss.
        patience: Validations without a better `monitor` after which a branch ends; null trains to the last epoch.
        stack: Train the branches of this process as one network: auto (where that is faster), true or false.
        epoch_logits: Validation images whose logits are kept after every epoch, the first of them; 0 keeps none.
        chunk: Minibatches that are handed to Lightning as one batch, which costs it as much as one.
    """

    name: str = "default"
    root: str = "runs"
    branches: list[int] | None = None
    checkpoint_every_n_steps: int | None = None
    checkpoint_every_s: float = 10.0
    monitor: str = "val/acc"
    patience: int | None = None
    stack: Literal["auto"] | bool = "auto"
    epoch_logits: int = 1000
    chunk: int = 50

    def __post_init__(self) -> None:
        if self.monitor not in MONITORS:
            raise unknown("run.monitor", self.monitor, MONITORS)
        for name, least in {"patience": 1, "chunk": 1, "checkpoint_every_n_steps": 1, "epoch_logits": 0}.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"run.{name}: expected at least {least}, got {getattr(self, name)}")

    @property
    def paths(self) -> RunPaths:
        return RunPaths(Path(self.root).expanduser() / self.name)


@dataclass(frozen=True)
class Run:
    """A claimed run directory. `id` is random, so two runs of equal settings differ; `hash` covers the settings."""

    paths: RunPaths
    id: str
    hash: str
    settings: dict[str, Any]

    def identity(self, branch: int) -> dict[str, Any]:
        """What a checkpoint of this run says of itself."""
        return {"run": self.id, "settings": self.hash, "branch": branch}


def claim_run(paths: RunPaths, settings: dict[str, Any]) -> Run:
    """Open the run directory for these settings; the first rank to come creates `run.json`, the others compare.

    Raises: RunError if it cannot be written, or belongs to other settings (names the keys that differ).
    """
    content = {"id": secrets.token_hex(4), "hash": settings_hash(settings), "settings": settings}
    create_once(paths.run_json, json.dumps(content, indent=2) + "\n")
    run = open_run(paths)
    check_same_settings(paths, run.settings, settings)
    return run


def check_same_settings(
    paths: RunPaths,
    there: Mapping[str, Any],
    here: Mapping[str, Any],
    remedy: str = "Choose another `run.name`, or delete it",
) -> None:
    """Raises: RunError that names the keys at which the settings of a run directory differ from these."""
    differing = different_keys(there, json.loads(json.dumps(here)))  # tuples become lists, as they are when read back
    if differing:
        listed = "; ".join(f"{key} is {a!r} there and {b!r} here" for key, (a, b) in differing.items())
        raise RunError(f"{paths.folder} belongs to other settings: {listed}. {remedy}")


def check_same_images(run: Run, settings: Mapping[str, Any]) -> None:
    """Compare the images, their split and seed with those that the branches of a run were trained on.

    Raises: RunError that names the keys at which these settings differ.
    """
    there, here = ({key: of.get(key) for key in COMPARED} for of in (run.settings, settings))
    check_same_settings(
        run.paths, there, here, "Expected data.root, data.val_size, data.augment and the seed of the run"
    )


def open_run(paths: RunPaths) -> Run:
    """Raises: RunError if `paths` holds no run."""
    if not paths.run_json.exists():
        raise RunError(f"{paths.folder} is not a run directory: it holds no run.json. Train one with `stl fit`")
    content = read_json(paths.run_json)
    try:
        return Run(paths, content["id"], content["hash"], content["settings"])
    except (KeyError, TypeError):
        raise RunError(f"{paths.run_json} is not a run file: expected the keys id, hash and settings") from None


def settings_hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def different_keys(old: Any, new: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted keys at which two nested mappings differ, with both values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            found |= different_keys(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if old == new else {prefix: (old, new)}
