"""`stl ensemble RUN`: combine the branches of a run. Imports nothing heavy until the arguments are parsed."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stl_lightning.errors import RunError
from stl_lightning.paths import RunPaths

if TYPE_CHECKING:
    from stl_lightning.ensemble.model import SpectralEnsemble
    from stl_lightning.run import Run
    from stl_lightning.training import BranchJob


def ensemble_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl ensemble",
        usage="stl ensemble RUN [--weighting NAME] [--space NAME] [--n_folds N] [--flips] [--key.subkey VALUE ...]",
        description="Combine the finished branches of a run and score them on the test set.",
        epilog="Settings of the run's config that say where it runs may be given too: --data.root, --data.num_workers, "
        "--trainer.accelerator, --tracking.wandb, ...",
    )
    parser.add_argument("run", help="run directory, such as runs/digits")
    parser.add_argument("--weighting", help="how members are weighted (default: as the run's config says)")
    parser.add_argument("--space", help="logits, log_prob, prob or auto (default: likewise)")
    parser.add_argument("--n_folds", type=int, help="folds of the search behind auto (default: likewise)")
    help_text = "average logits over mirror images too (default: likewise)"
    parser.add_argument("--flips", action=argparse.BooleanOptionalAction, help=help_text)
    return parser


def ensemble(args: list[str]) -> int:
    """Combine the branches of a run that have finished, and name the others."""
    given, overrides = ensemble_parser().parse_known_args(args)

    from stl_lightning.run import open_run

    run = open_run(RunPaths(Path(given.run)))
    asked = {name: getattr(given, name) for name in ("weighting", "space", "n_folds", "flips")}
    overrides += [f"--ensemble.{name}={value}" for name, value in asked.items() if value is not None]
    combine(run, overrides)
    return 0


def load_ensemble(run: str | Path, overrides: Sequence[str] = ()) -> "SpectralEnsemble":
    """The trained ensemble of a run that `stl ensemble` or `stl run` has evaluated, as one module.

    `overrides` are settings as on the command line, such as "--data.root=elsewhere".
    Raises: RunError, CheckpointError or ConfigError if something of it cannot be read, or an override is unknown.
    """
    from stl_lightning.cli.config import jobs_of_run
    from stl_lightning.ensemble.model import build_ensemble, load_fitted
    from stl_lightning.run import open_run

    opened = open_run(RunPaths(Path(run)))
    return build_ensemble(jobs_of_run(opened, overrides), load_fitted(opened.paths.fitted))


def combine(run: "Run", overrides: Sequence[str] = ()) -> None:
    """Evaluate the ensemble of a run, print it and, if the run is tracked, log it."""
    from stl_lightning.cli.config import clis_of_run
    from stl_lightning.ensemble.evaluate import evaluate
    from stl_lightning.report.table import print_results
    from stl_lightning.run import check_same_images
    from stl_lightning.tracking import log_ensemble

    clis = clis_of_run(run, overrides)
    if not clis:
        raise RunError(f"{run.paths.folder}: no branch has begun; train them with `stl fit`")
    for cli in clis.values():
        check_same_images(run, cli.data.agreement())
    first = next(iter(clis.values()))
    jobs = [cli.job(run, branch) for branch, cli in clis.items()]
    results = evaluate(run, jobs, first.ensemble_options, _baseline(run, overrides))
    print_results(results)
    print(f"written: {run.paths.results}")
    log_ensemble(first.tracking, run, first.options.name, results)


def _baseline(run: "Run", overrides: Sequence[str]) -> "BranchJob | None":
    from stl_lightning.cli.config import jobs_of_run
    from stl_lightning.run import check_same_images, open_run

    if not run.paths.baseline.run_json.exists():
        return None
    baseline = open_run(run.paths.baseline)
    check_same_images(run, baseline.settings)
    of_images = [override for override in overrides if not override.startswith("--data.store")]
    job = next(iter(jobs_of_run(baseline, of_images)), None)
    if job is not None:
        check_same_images(baseline, job.data.agreement())
    return job
