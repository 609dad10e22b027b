"""`stl fit`, `stl run` and `stl baseline`: train branches."""

import sys
from collections.abc import Sequence

from stl_lightning.cli.config import SpectralCLI
from stl_lightning.cli.ensemble import combine
from stl_lightning.errors import ConfigError
from stl_lightning.ranks import RankInfo
from stl_lightning.run import check_baseline, claim_run, open_run
from stl_lightning.status import read_status
from stl_lightning.training import BranchJob, Outcome, check_branch, train_branches


def fit(args: list[str]) -> int:
    """Train the branches this rank owns."""
    cli = SpectralCLI(args, "fit", "Train the branches that this rank owns, without any communication.")
    branches = cli.owned_branches()
    run = cli.claim()
    return exit_code(train_all([cli.job(run, branch) for branch in branches]))


def run(args: list[str]) -> int:
    """Train all branches in this process, then make the ensemble."""
    cli = SpectralCLI(args, "run", "Train all branches on this machine, then make the ensemble.")
    if RankInfo.detect().launcher != "none":
        raise ConfigError("`stl run` is for one process; under a launcher use `stl fit`, and `stl ensemble` afterwards")
    branches = cli.owned_branches()
    claimed = cli.claim()
    n_failed = train_all([cli.job(claimed, branch) for branch in branches])
    if n_failed < len(branches):
        combine(claimed, cli.where_it_runs())
    return exit_code(n_failed)


def baseline(args: list[str]) -> int:
    """Train the conventional network on the whole image, into the folder `baseline` of the run."""
    cli = SpectralCLI(args, "baseline", "Train the conventional network on the whole image.")
    if cli.config.data.store is not None:
        print(f"the baseline reads the images in {cli.config.data.root}: a store holds slices", flush=True)
    cli = cli.as_baseline()
    cli.check()
    paths = cli.options.paths
    if paths.run_json.exists():
        check_baseline(open_run(paths), cli.data.agreement())
    claimed = claim_run(paths.baseline, cli.data.agreement())
    return exit_code(train_all([cli.job(claimed, 0, "baseline")]))


def train_all(jobs: Sequence[BranchJob]) -> int:
    """Train the branches, whatever becomes of each; returns how many failed."""
    for job in jobs:
        check_branch(job)
    return train_branches(jobs, report)


def report(job: BranchJob, outcome: Outcome) -> None:
    """Say how a branch ended."""
    status = read_status(job.paths, job.branch)
    if outcome == "failed":
        print(f"{job.job_type} {job.branch}: FAILED: {status.error}", file=sys.stderr, flush=True)
        return
    what = "is finished already" if outcome == "skipped" else "finished"
    loss = "" if status.loss is None else f", validation loss {status.loss:.4f}"
    print(f"{job.job_type} {job.branch}: {what}, {status.epoch} epochs{loss}", flush=True)


def exit_code(n_failed: int) -> int:
    """1 if a branch failed; but 0 under torchrun, which would end the other ranks: `status.json` keeps the failure."""
    return int(n_failed > 0 and RankInfo.detect().launcher != "torchrun")
