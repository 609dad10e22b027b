"""`stl launch` and `stl resubmit RUN`. Import nothing heavy until arguments are parsed."""

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stl_lightning.errors import ConfigError, RunError
from stl_lightning.exits import DONE
from stl_lightning.launch import again
from stl_lightning.launch.compose import check_method, find_templates, limit_of_options, site_options
from stl_lightning.launch.judge import RunState
from stl_lightning.launch.record import LOCAL, METHODS, RETRIES, Launch, launching, read_launches
from stl_lightning.launch.slurm import ask_queue, find_sbatch
from stl_lightning.launch.state import read_run_state
from stl_lightning.launch.submit import as_commands, become_launcher, begin_here, queue_up
from stl_lightning.machine import n_cores
from stl_lightning.paths import RunPaths, StorePaths

if TYPE_CHECKING:
    from stl_lightning.cli.config import SpectralCLI


def launch_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "launch --config FILE.yaml",
        "Submit the branches of a config to SLURM, and the ensemble after them; with --local, train them on this "
        "machine. If data.store is set and not there yet, it is prepared first.",
    )
    parser.add_argument("--config", required=True, action="append", metavar="FILE.yaml", help="the config of the run")
    parser.add_argument("--no-ensemble", action="store_true", help="train the branches only")
    return parser


def resubmit_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "resubmit RUN",
        "Launch those branches of a run again that are missing, failed, lost or interrupted, as a sparse array or on "
        "this machine, as the launch before was; then the ensemble. Options replace those of the launch before.",
    )
    parser.add_argument("run", help="run directory, such as runs/digits")
    return parser


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"stl {command.partition(' ')[0]}",
        usage=f"stl {command} [options] [--key.subkey VALUE ...]",
        description=description,
        epilog="Settings of the config may be given too, as for `stl fit`.",
        allow_abbrev=False,
    )
    before = ", or as the launch before" if command.startswith("resubmit") else ""
    parser.add_argument("--method", help=f"{', '.join(METHODS)} (default: array, a branch a task)")
    parser.add_argument("--nodes", type=int, metavar="N", help="nodes that srun or torchrun divide the branches over")
    text = f"how often a branch that failed is tried again (default: {RETRIES}{before})"
    parser.add_argument("--retries", type=int, metavar="N", help=text)
    text = 'options of your site for sbatch, such as "--partition=gpu --gpus-per-task=1 --time=2:00:00"'
    parser.add_argument("--sbatch", action="append", metavar="OPTIONS", help=text)
    text = "train on this machine without SLURM, in N processes (default: one a core)"
    parser.add_argument("--local", type=int, nargs="?", const=n_cores(), metavar="N", help=text)
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    return parser


def launch(args: list[str]) -> int:
    """Submit all branches of a config, or train them on this machine."""
    given, settings = _parsed(launch_parser(), args)
    planned = _with_options(Launch(METHODS[0], given.config[0], settings, has_ensemble=not given.no_ensemble), given)
    cli = _checked_cli(planned)
    planned.branches = list(range(planned.n_branches))
    paths = cli.options.paths
    with _only_one(paths, given.dry_run):
        state = read_run_state(paths) if paths.run_json.exists() or paths.launch.exists() else None
        if state is not None:
            again.refuse_if_at_work(state)
            if not planned.is_local:
                again.refuse_if_unknown(state)
            if not _leave_out_finished(planned, state):
                return DONE
        _begin(planned, paths, state, given.dry_run)
    return _finish(planned, paths, state, given.dry_run)


def resubmit(args: list[str]) -> int:
    """Submit those branches of a run again that have not finished and that nothing will train."""
    given, settings = _parsed(resubmit_parser(), args)
    paths = RunPaths(Path(given.run))
    state = read_run_state(paths)
    if not state.launches:
        read_launches(paths)  # says what is wrong with a file that is there
        raise RunError(f"{paths.folder} was not started by `stl launch`, which keeps the config: call `stl launch`")
    planned = _with_options(_as_before(state.launches[-1], settings, given), given)
    _say([_meant_for_others(state.launches[-1], planned)])
    if planned.folder != os.getcwd():
        paths = RunPaths(paths.folder.absolute())
    if not _choose(planned, state):
        return DONE
    _check_place(_checked_cli(planned), planned, paths)
    with _only_one(paths, given.dry_run):
        state = read_run_state(paths)
        if not _choose(planned, state):  # another one was faster
            return DONE
        _begin(planned, paths, state, given.dry_run)
    return _finish(planned, paths, state, given.dry_run)


def _parsed(parser: argparse.ArgumentParser, args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`--sbatch=OPTIONS` in place of two words: argparse would take OPTIONS, which begin with dashes, for its own."""
    joined: list[str] = []
    for arg in args:
        if joined and joined[-1] == "--sbatch":
            joined[-1] = f"--sbatch={arg}"
        else:
            joined.append(arg)
    given, settings = parser.parse_known_args(joined)
    if any(setting.partition("=")[0] == "--config" for setting in settings) or len(getattr(given, "config", [""])) != 1:
        raise ConfigError("--config: expected one file, which the templates take; merge several into one")
    return given, settings


def _as_before(last: Launch, settings: Sequence[str], given: argparse.Namespace) -> Launch:
    """A launch as the one before, with the new settings; what was srun or torchrun becomes a sparse array."""
    is_slurm = given.method or given.sbatch or not last.is_local
    return Launch(
        METHODS[0] if is_slurm else LOCAL,
        last.config,
        [*last.settings, *settings],
        retries=last.retries,
        sbatch=last.sbatch,
        has_ensemble=last.has_ensemble,
        n_workers=last.n_workers,
        folder=last.folder,
    )


def _meant_for_others(last: Launch, planned: Launch) -> str | None:
    """A note on options per node: they were meant for nodes with many ranks, and a task of an array is one."""
    per_node = [word for word in planned.sbatch if "-per-node" in word or "-per-socket" in word]
    if not per_node or planned.method != "array" or planned.method == last.method or planned.sbatch != last.sbatch:
        return None
    return (
        f"--sbatch: {' '.join(per_node)} was given for --method {last.method}, and holds for each task of the array "
        "now; another --sbatch replaces it"
    )


def _with_options(planned: Launch, given: argparse.Namespace) -> Launch:
    """What the options say, as far as it can be checked before the config is read."""
    if given.local is not None:
        for name in ("method", "nodes", "sbatch"):
            if getattr(given, name) is not None:
                raise ConfigError(f"--{name}: expected to be left out with --local, which submits nothing")
        planned = replace(planned, method=LOCAL, n_workers=given.local)
    elif not planned.is_local:
        planned = replace(planned, method=given.method or planned.method, nodes=given.nodes)
        check_method(planned.method, planned.nodes)
        if not given.dry_run:
            find_sbatch()
        find_templates(Path(planned.folder))
    if given.retries is not None and given.retries < 0:
        raise ConfigError(f"--retries: expected 0 or more, got {given.retries}")
    retries = planned.retries if given.retries is None else given.retries
    sbatch = planned.sbatch if given.sbatch is None else site_options(given.sbatch)
    return replace(planned, retries=retries, sbatch=sbatch)


def _checked_cli(planned: Launch) -> "SpectralCLI":
    """The config, after everything that can be found wrong with it here; completes the launch by what it says.

    Raises: ConfigError, DataError, RunError.
    """
    if not Path(planned.folder).is_dir():
        raise RunError(f"the folder it was launched from is gone: {planned.folder}; call `stl launch` from another")
    with contextlib.chdir(planned.folder):
        from stl_lightning.cli.config import SpectralCLI
        from stl_lightning.run import Run, check_same_settings, open_run
        from stl_lightning.training import check_branch

        cli = SpectralCLI([f"--config={planned.config}", *planned.settings], "launch")
        for name in ("run.branches", "data.branch"):
            if cli.config[name] is not None:
                what = f"expected to be left out, since a launch trains all branches; got {cli.config[name]}"
                raise ConfigError(f"{name}: {what}")
        planned.prepares = _takes_away_missing_store(cli)
        if not planned.is_local and cli.config.trainer.accelerator in ("gpu", "cuda"):
            cli.config.trainer.accelerator = "auto"  # this host submits, and may have none
        cli.check()
        _check_augment(cli, planned.prepares)
        paths = cli.options.paths
        run = Run(paths, "", "", {})
        if paths.run_json.exists():
            run = open_run(paths)
            check_same_settings(paths, run.settings, cli.data.agreement())
        check_branch(cli.job(run, 0))
    planned.n_branches = cli.data.n_branches
    _check_size(planned)
    return cli


def _takes_away_missing_store(cli: "SpectralCLI") -> bool:
    """Whether the store is still to be made. The rest of the config is then checked against the images."""
    folder = cli.config.data.store
    if folder is None or StorePaths(Path(folder).expanduser()).manifest.exists():
        return False
    cli.config.data.store = None
    return True


def _check_augment(cli: "SpectralCLI", prepares: bool) -> None:
    """Raises: ConfigError for an augmentation or flips that images take, and the slices of the store to come do not."""
    if prepares and cli.data.augment is not None:
        from stl_lightning.augment import SliceAugment

        SliceAugment(cli.data.augment, cli.data.spectral, range(cli.data.n_branches))
    if prepares and cli.ensemble_options.flips:
        from stl_lightning.augment import SliceMirror

        SliceMirror(cli.data.spectral, cli.data.reads)


def _check_size(planned: Launch) -> None:
    if not planned.is_local:
        check_method(planned.method, planned.nodes, planned.n_branches)
    elif planned.n_workers is None or planned.n_workers < 1:
        raise ConfigError(f"--local: expected 1 to {planned.n_branches} processes, got {planned.n_workers}")
    else:
        planned.n_workers = min(planned.n_workers, planned.n_branches)


def _check_place(cli: "SpectralCLI", planned: Launch, paths: RunPaths) -> None:
    """Raises: RunError if the config, as it was launched, writes to another run."""
    theirs, ours = Path(planned.folder) / cli.options.paths.folder, paths.folder
    if theirs.resolve() != ours.resolve():
        cure = f"give --run.root={ours.absolute().parent} --run.name={ours.absolute().name}"
        raise RunError(f"{ours} was launched as {theirs}; if it was moved, {cure}")


def _choose(planned: Launch, state: RunState) -> bool:
    """Take the branches that are to be launched again; whether anything is to do. Says what is not done, and why."""
    again.refuse_if_launcher_lives(state)
    if not planned.is_local:
        again.refuse_if_unknown(state)
    planned.branches = again.to_resubmit(state)
    what = "looks lost, but SLURM says that it runs; `stl cancel` ends it"
    _say(f"branch {report.branch}: job {report.active[-1].id} {what}" for report in again.held_back(state))
    if planned.branches and planned.method in ("srun", "torchrun"):
        again.refuse_if_at_work(state)
    return _is_anything_to_do(planned, state, state.wants_ensemble)


def _leave_out_finished(planned: Launch, state: RunState) -> bool:
    """Of a run that was launched before, take the branches that have not finished; whether anything is to do."""
    finished = {report.branch for report in state.those("finished")}
    planned.branches = [branch for branch in planned.branches if branch not in finished]
    return _is_anything_to_do(planned, state, planned.has_ensemble)


def _is_anything_to_do(planned: Launch, state: RunState, wants_ensemble: bool) -> bool:
    """Whether branches are to be trained or the ensemble to be made; says so if not."""
    if planned.branches and planned.method in ("srun", "torchrun"):
        planned.branches = list(range(len(state.branches)))  # ranks divide all; those that have finished end at once
    if planned.branches or (wants_ensemble and state.lacks_ensemble):
        return True
    counts = ", ".join(f"{count} {name}" for name, count in state.counts.items())
    print(f"nothing to do: {counts}; ensemble: {state.ensemble}")
    return False


@contextlib.contextmanager
def _only_one(paths: RunPaths, dry_run: bool) -> Iterator[None]:
    with contextlib.nullcontext() if dry_run else launching(paths):
        yield


def _begin(planned: Launch, paths: RunPaths, state: RunState | None, dry_run: bool) -> None:
    at_work = again.still_queued(state) if state else []
    if state is not None:
        _say(state.notes)
        _say([again.too_short(limit_of_options(planned.sbatch), state)])
    if dry_run:
        print(as_commands(planned, paths, at_work))
    elif planned.is_local:
        begin_here(planned, paths)
    else:
        queue_up(planned, paths, at_work)


def _finish(planned: Launch, paths: RunPaths, state: RunState | None, dry_run: bool) -> int:
    if dry_run:
        return DONE
    follow = f"stl status {shlex.quote(str(paths.folder))}"
    if planned.is_local:
        print(f"{planned.n_workers} processes; {follow}")
        become_launcher(paths)
    for role, job in planned.jobs.items():
        print(f"{role}: job {job}")
    if state is not None and limit_of_options(planned.sbatch) is None:  # it is that of the partition
        limits = [job.limit_s for job in ask_queue(planned.jobs.values()).jobs.values() if job.limit_s]
        _say([again.too_short(min(limits, default=None), state)])
    print(follow)
    return DONE


def _say(lines: Iterable[str | None]) -> None:
    for line in filter(None, lines):
        print(line, file=sys.stderr, flush=True)
