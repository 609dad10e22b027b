"""`stl cost RUN` and `stl cost --config C`: what the branches and the baseline cost. Imports nothing heavy at first."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stl_lightning.errors import ConfigError, RunError
from stl_lightning.exits import DONE
from stl_lightning.paths import BranchPaths, RunPaths

if TYPE_CHECKING:
    from stl_lightning.cli.config import SpectralCLI
    from stl_lightning.cost import Training
    from stl_lightning.datamodule import SpectralDataModule
    from stl_lightning.training import BranchJob


def cost_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl cost",
        allow_abbrev=False,
        usage="stl cost RUN [--json] [--key.subkey VALUE ...]\n"
        "       stl cost --config FILE.yaml [--json] [--key.subkey VALUE ...]",
        description="Parameters, bytes, multiply-adds and memory of each branch, of all branches and of the baseline: "
        "as a config plans them, or with the seconds and the bytes sent and received that a run has measured.",
        epilog="With --config, every setting of `stl run` may be given; with RUN, those that say where it runs, as "
        "--data.root does.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--config", metavar="FILE.yaml", action="append", default=[], help="the config of a run")
    return parser


def cost(args: list[str]) -> int:
    """Print what a run has cost, or a config will."""
    given, settings = cost_parser().parse_known_args(args)
    folder = settings.pop(0) if settings and not settings[0].startswith("-") else None
    settings = [*(f"--config={file}" for file in given.config), *settings]

    from stl_lightning.report.costs import print_costs

    costs = planned_costs(settings) if folder is None else run_costs(folder, settings)
    if given.json:
        print(json.dumps(costs))
    else:
        print_costs(costs)
    return DONE


def planned_costs(settings: Sequence[str]) -> dict[str, Any]:
    """What the branches and the baseline of a config cost; `settings` as on the command line. See `cost.costs`.

    Raises: ConfigError and DataError as `stl run`, which finds them before it trains.
    """
    from stl_lightning.cli.config import SpectralCLI
    from stl_lightning.cost import costs
    from stl_lightning.run import Run
    from stl_lightning.training import check_trainer_settings

    cli = SpectralCLI(list(settings), "cost")
    check_trainer_settings(dict(cli.config.trainer))
    nowhere = Run(cli.options.paths, id="", hash="", settings={})
    n_images = cli.data.n_train_images
    branches = {
        branch: _of_branch(cli.job(nowhere, branch), n_images, paths=None) for branch in range(cli.data.n_branches)
    }
    return costs(branches, _of_baseline(cli, SpectralCLI(list(settings), "cost"), n_images, paths=None))


def run_costs(run: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the branches of a run and its baseline have cost; one that has not begun, what it will. See `cost.costs`.

    `overrides` are settings as on the command line, such as "--data.root=elsewhere".
    Raises: RunError if no branch has begun.
    """
    from stl_lightning.cli.config import clis_of_run, kept_cli
    from stl_lightning.cost import costs
    from stl_lightning.run import open_run

    opened = open_run(RunPaths(Path(run)))
    clis = clis_of_run(opened, overrides)
    if not clis:
        raise RunError(f"{run}: no branch has begun; `stl cost --config FILE.yaml` counts before the training")
    first = next(iter(clis.values()))
    n_images = first.data.n_train_images
    branches = {}
    for branch in range(opened.settings["n_branches"]):
        job = clis.get(branch, first).job(opened, branch)
        branches[branch] = _of_branch(job, n_images, job.paths if branch in clis else None)
    trained = opened.paths.baseline.branch(0)
    has_baseline = trained.config.exists()
    baseline = kept_cli(opened.paths.baseline if has_baseline else opened.paths, 0 if has_baseline else min(clis))
    return costs(branches, _of_baseline(first, baseline, n_images, trained if has_baseline else None))


def _of_branch(job: "BranchJob", n_images: int, paths: BranchPaths | None) -> "Training":
    from stl_lightning.cost import Training, slice_multiply_adds

    data, spectral = job.data, job.data.spectral
    network = job.built_module().network
    assert network is not None, "it was built"
    rows = [row for k in data.reads[0] for row in spectral.rows(k)]
    read_shape, stored_as = _read_of_image(data)
    return Training(
        network,
        data.in_shape,
        data.n_classes,
        n_images,
        _epochs(job.trainer_settings, n_images, data.batch_size, paths, job.branch),
        data.batch_size,
        read_shape,
        stored_as,
        has_store=data.store is not None,
        transform_multiply_adds=slice_multiply_adds(
            spectral.matrix[rows], (spectral.image_shape[0], *data.in_shape[1:])
        ),
        precision=str(job.trainer_settings.get("precision") or "32-true"),
        paths=paths,
    )


def _read_of_image(data: "SpectralDataModule") -> tuple[tuple[int, int, int], str]:
    """Shape and type of what a branch reads of a training image: its slices, as stored, or all pixels, of 8 bits.

    Without a store its slices are taken as float32, as `stl prepare` would store them; and all pixels where the
    augmentation takes more than slices, so that no store would do.

    Raises: ConfigError if there is a store all the same.
    """
    from stl_lightning.augment import SliceAugment, can_augment_slices

    if data.store is not None:
        if data.augment is not None:
            SliceAugment(data.augment, data.spectral, range(data.n_branches))
        return data.in_shape, data.store.dtype
    if data.augment is None or can_augment_slices(data.augment, data.spectral):
        return data.in_shape, "float32"
    return data.source.image_shape, "uint8"


def _of_baseline(of_run: "SpectralCLI", cli: "SpectralCLI", n_images: int, paths: BranchPaths | None) -> "Training":
    """The network on the whole image, of a config that need not have the images at hand: a store does, too."""
    from stl_lightning.cost import Training

    config = cli.as_baseline().config
    built, source = cli.parser.instantiate(config), of_run.data.source
    network = built.model.build(source.image_shape, source.n_classes, config.seed_everything, [0]).network
    batch_size = config.data.batch_size
    return Training(
        network,
        source.image_shape,
        source.n_classes,
        n_images,
        _epochs(dict(config.trainer), n_images, batch_size, paths, 0),
        batch_size,
        read_shape=source.image_shape,
        stored_as="uint8",  # as image files have it
        precision=str(config.trainer.precision or "32-true"),
        paths=paths,
    )


def _epochs(settings: dict[str, Any], n_images: int, batch_size: int, paths: BranchPaths | None, branch: int) -> float:
    """How often every training image is read: as the steps say that were made, or are the limit."""
    from stl_lightning.status import read_status
    from stl_lightning.training import planned_steps, steps_an_epoch

    n_steps = steps_an_epoch(settings, n_images, batch_size)
    if paths is not None:
        return read_status(paths, branch).step / n_steps
    planned = planned_steps(settings, n_steps)
    if planned == math.inf:
        raise ConfigError("trainer.max_epochs: expected a number of epochs (or trainer.max_steps), got none to count")
    return planned / n_steps
