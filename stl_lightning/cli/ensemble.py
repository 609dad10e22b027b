"""`stl ensemble RUN`: combine the branches of a run. Imports nothing heavy until the arguments are parsed."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.paths import RunPaths

if TYPE_CHECKING:
    from stl_lightning.ensemble.model import SpectralEnsemble
    from stl_lightning.run import Run


def ensemble_parser() -> ArgumentParser:
    description = "Combine the finished branches of a run and score them on the test set."
    parser = ArgumentParser(prog="stl ensemble", description=description)
    parser.add_argument("run", type=str, help="run directory, such as runs/digits")
    parser.add_argument("--weighting", type=str | None, help="how members are weighted (default: as the run's config)")
    parser.add_argument("--space", type=str | None, help="logits, log_prob, prob or auto (default: likewise)")
    parser.add_argument("--n_folds", type=int | None, help="folds of the search behind auto (default: likewise)")
    return parser


def ensemble(args: list[str]) -> int:
    """Combine the branches of a run that can be read, and name those that cannot."""
    given = ensemble_parser().parse_args(args)

    from stl_lightning.cli.config import kept_cli
    from stl_lightning.run import open_run

    run = open_run(RunPaths(Path(given.run)))
    cli = kept_cli(run.paths, "ensemble")
    asked = {name: getattr(given, name) for name in ("weighting", "space", "n_folds")}
    options = replace(cli.ensemble_options, **{name: value for name, value in asked.items() if value is not None})
    combine(run, options)
    return 0


def load_ensemble(run: str | Path) -> "SpectralEnsemble":
    """The trained ensemble of a run that `stl ensemble` or `stl run` has evaluated, as one module.

    Raises: RunError or CheckpointError if something of it cannot be read.
    """
    from stl_lightning.cli.config import jobs_of_run
    from stl_lightning.ensemble.model import build_ensemble, load_fitted
    from stl_lightning.run import open_run

    opened = open_run(RunPaths(Path(run)))
    return build_ensemble(jobs_of_run(opened), load_fitted(opened.paths.fitted))


def combine(run: "Run", options: EnsembleOptions) -> None:
    """Evaluate the ensemble of a run, print it and, if the run is tracked, log it."""
    from stl_lightning.cli.config import jobs_of_run, kept_cli
    from stl_lightning.ensemble.evaluate import evaluate
    from stl_lightning.report.table import print_results
    from stl_lightning.run import open_run
    from stl_lightning.tracking import log_ensemble

    baseline = jobs_of_run(open_run(run.paths.baseline)) if run.paths.baseline.run_json.exists() else [None]
    evaluation = evaluate(run, jobs_of_run(run), options, baseline[0])
    print_results(evaluation.results)
    print(f"written: {run.paths.results}")
    cli = kept_cli(run.paths, "ensemble")
    log_ensemble(cli.tracking, run, cli.options.name, evaluation.results)
