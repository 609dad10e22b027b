"""`stl report RUN`: draw the figures of a run. Imports nothing heavy until the arguments are parsed."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stl_lightning.errors import ConfigError, RunError
from stl_lightning.exits import DONE
from stl_lightning.paths import RunPaths

if TYPE_CHECKING:
    from torch import Tensor

    from stl_lightning.datamodule import SpectralDataModule
    from stl_lightning.report.material import Sample

ENERGY_IMAGES = 200  # validation images that the energy of a slice is the mean of


def report_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl report",
        usage="stl report RUN [--image N] [--key.subkey VALUE ...]",
        description="Draw the figures of a run that `stl ensemble` has evaluated into RUN/report, as PNG and as SVG, "
        "and print its tables.",
        epilog="Settings of the run's config that say where it runs may be given too: --data.root, --data.store.",
    )
    parser.add_argument("run", help="run directory, such as runs/digits")
    parser.add_argument(
        "--image", type=int, default=0, metavar="N", help="number of the validation image that is shown"
    )
    return parser


def report(args: list[str]) -> int:
    """Draw and write every figure that a run has the data for."""
    given, overrides = report_parser().parse_known_args(args)

    from stl_lightning.paths import read_json
    from stl_lightning.report.figures import require_matplotlib, write_figures
    from stl_lightning.report.material import read_material
    from stl_lightning.report.table import print_results

    require_matplotlib()
    paths = RunPaths(Path(given.run))
    if not paths.results.exists():
        raise RunError(
            f"{paths.folder}: expected ensemble/results.json, found none: `stl ensemble {given.run}` writes it"
        )
    results = read_json(paths.results)
    if not isinstance(results, dict) or "branches" not in results:
        raise RunError(f"{paths.results}: expected what `stl ensemble` writes; repeat `stl ensemble {given.run}`")
    print_results(results)
    folder = paths.report
    reasons = write_figures(read_material(paths, take_sample(paths, given.image, overrides)), folder)
    for name, reason in reasons.items():
        print(f"written: {folder / name}.png, .svg" if reason is None else f"{name} is left out: {reason}")
    return DONE


def take_sample(paths: RunPaths, image: int = 0, overrides: Sequence[str] = ()) -> "Sample":
    """An image of a run's validation split and its slices, as the branches saw them.

    Raises: ConfigError if there is no such image; DataError and StoreError if images or slices are not at hand.
    """
    import torch

    from stl_lightning.checkpoint import load_checkpoint
    from stl_lightning.cli.config import kept_cli
    from stl_lightning.datamodule import split_indices
    from stl_lightning.paths import read_json
    from stl_lightning.report.material import Sample
    from stl_lightning.run import check_same_images, open_run

    run, branch = open_run(paths), read_json(paths.results)["members"][0]
    job = kept_cli(paths, branch, overrides).job(run, branch)
    data = job.data
    check_same_images(run, data.agreement())
    data.restore(load_checkpoint(job.paths.best, run.identity(branch))["SpectralDataModule"])  # the matrix of a KLT
    labels, fetch = _training_slices(data)
    _, val = split_indices(len(labels), data.val_size, data.seed)
    if not 0 <= image < len(val):
        raise ConfigError(f"--image: expected 0 to {len(val) - 1}, the validation images; received {image}")
    slices = fetch(torch.cat([val[image : image + 1], val[:ENERGY_IMAGES]]))
    energies = torch.stack([of_slice[1:].double().square().sum() for of_slice in slices])
    return Sample(
        data.spectral.inverse([of_slice[:1] for of_slice in slices])[0],
        data.source.class_names[int(labels[val[image]])],
        [of_slice[0] for of_slice in slices],
        data.spectral.frequencies,
        (energies / energies.sum()).tolist(),
    )


def _training_slices(data: "SpectralDataModule") -> tuple["Tensor", Callable[["Tensor"], list["Tensor"]]]:
    """The labels (n,) of the images that validation images are cut off, and what gives all slices of some of them."""
    from stl_lightning.images import as_float

    spectral, store = data.spectral, data.store
    if store is None:
        images = data.source.load("train")
        return images.labels, lambda indices: spectral(as_float(images.fetch(indices)))
    ks = range(spectral.n_slices)
    store.require(ks)
    return store.labels("train"), lambda indices: [store.slice("train", k).gather(indices) for k in ks]
