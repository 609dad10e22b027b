"""`stl fit`, `stl run` and `stl baseline`: train branches."""

import sys
from collections.abc import Sequence

from stl_lightning import leaving
from stl_lightning.cli.config import SpectralCLI
from stl_lightning.cli.ensemble import combine
from stl_lightning.errors import ConfigError, say
from stl_lightning.exits import DONE, FAILED
from stl_lightning.ranks import RankInfo
from stl_lightning.run import check_same_images, claim_run, open_run
from stl_lightning.status import read_status
from stl_lightning.strategy import pick_device
from stl_lightning.supervisor import is_given_up, is_supervised, tell_supervisor
from stl_lightning.training import BranchJob, Outcome, check_branches, train_branches, warn_of_emulation


def fit_rank(args: list[str]) -> int:
    """Train the branches this rank owns, but those that failed too often under a supervisor."""
    what = "Train the branches that this rank owns, without any communication. --retries N: in a process of their own, "
    cli = SpectralCLI(args, "fit", what + "which is started again up to N times for each branch that fails.")
    owned = cli.owned_branches()
    run = cli.claim()
    branches = [branch for branch in owned if not is_given_up(run.paths.branch(branch), branch)]
    tell_supervisor(run.paths, branches)
    n_failed = len(owned) - len(branches) + train_all([cli.job(run, branch) for branch in branches])
    return exit_code(n_failed)


def run(args: list[str]) -> int:
    """Train all branches in this process, then make the ensemble."""
    cli = SpectralCLI(args, "run", "Train all branches on this machine, then make the ensemble.")
    if RankInfo.detect().launcher != "none":
        raise ConfigError("`stl run` is for one process; under a launcher use `stl fit`, and `stl ensemble` afterwards")
    branches = cli.owned_branches()
    claimed = cli.claim()
    n_failed = train_all([cli.job(claimed, branch) for branch in branches])
    if n_failed < len(branches):
        with leaving.at_once():
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
        check_same_images(open_run(paths), cli.data.agreement())
    claimed = claim_run(paths.baseline, cli.data.agreement())
    code = exit_code(train_all([cli.job(claimed, 0, "baseline")]))
    if paths.results.exists():
        print(f"`stl ensemble {paths.folder}` adds the baseline to the tables of that run", flush=True)
    return code


def train_all(jobs: Sequence[BranchJob]) -> int:
    """Train the branches, whatever becomes of each; returns how many failed."""
    check_branches(jobs)
    if jobs:
        settings = jobs[0].trainer_settings
        warn_of_emulation(settings.get("precision"), pick_device(settings.get("accelerator") or "auto", 0))
    return train_branches(jobs, report)


def report(job: BranchJob, outcome: Outcome) -> None:
    """Say how a branch ended."""
    status = read_status(job.paths, job.branch)
    if outcome == "failed":
        say(f"{job.job_type} {job.branch}: FAILED: {status.error}")
        return
    what = "is finished already" if outcome == "skipped" else "finished"
    loss = "" if status.loss is None else f", last validation loss {status.loss:.4f}"
    say(f"{job.job_type} {job.branch}: {what}, {status.epoch} epochs{loss}", sys.stdout)


def exit_code(n_failed: int) -> int:
    """FAILED if a branch failed; but under torchrun, which would end the other ranks, `status.json` alone tells."""
    spares_siblings = RankInfo.detect().launcher == "torchrun" and not is_supervised()
    return DONE if n_failed == 0 or spares_siblings else FAILED
