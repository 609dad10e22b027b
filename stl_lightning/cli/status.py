"""`stl status RUN` and `stl cancel RUN`. Imports nothing heavy: the answer is there at once."""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stl_lightning.exits import DONE
from stl_lightning.launch.cancel import cancel_run
from stl_lightning.launch.judge import BranchReport, RunState
from stl_lightning.launch.state import read_run_state
from stl_lightning.paths import RunPaths

HEADINGS = ("branch", "state", "epoch", "loss", "host", "job", "heartbeat", "time left")
WATCH_S = 5.0


def status_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl status",
        description="What each branch of a run is doing. Exits with 0 if the run is complete, 3 if it is not, and 1 if "
        "something failed or was lost.",
    )
    parser.add_argument("run", help="run directory, such as runs/digits")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=WATCH_S, metavar="SECONDS", help="again and again, until nothing runs"
    )
    return parser


def status(args: list[str]) -> int:
    """Print what each branch of a run is doing; the exit code says it for all of them."""
    given = status_parser().parse_args(args)
    state = read_run_state(RunPaths(Path(given.run)))
    _show(state, given.json, clears=False)
    try:
        while given.watch is not None and state.is_in_work:
            time.sleep(max(given.watch, 0.1))
            state = read_run_state(state.paths)
            _show(state, given.json, clears=sys.stdout.isatty())
    except KeyboardInterrupt:
        pass  # who watches has seen enough
    return state.exit_code


def cancel_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl cancel",
        description="Cancel the jobs of a run that are in the queue, or end its processes on this machine. Branches "
        "that train save first; `stl resubmit RUN` goes on.",
    )
    parser.add_argument("run", help="run directory, such as runs/digits")
    return parser


def cancel(args: list[str]) -> int:
    """End what works on a run, and say what that was."""
    given = cancel_parser().parse_args(args)
    ended = cancel_run(RunPaths(Path(given.run)))
    print("\n".join(ended) or f"{given.run}: nothing of it is queued or running")
    return DONE


def _show(state: RunState, as_json: bool, clears: bool) -> None:
    if clears:
        print("\x1b[2J\x1b[H", end="")
    print(json.dumps(as_record(state)) if as_json else as_table(state), flush=True)


def as_record(state: RunState) -> dict[str, Any]:
    """What `--json` prints: one object, a row for each branch."""
    return {
        "run": str(state.paths.folder),
        "exit_code": state.exit_code,
        "counts": state.counts,
        "ensemble": state.ensemble,
        "branches": [_record(report) for report in state.branches],
        "notes": list(state.notes),
    }


def _record(report: BranchReport) -> dict[str, Any]:
    of_file = asdict(report.status) if report.status else {"branch": report.branch}
    judged = {"state": report.state, "job": report.job, "heartbeat_age_s": report.age_s}
    left = {"left_s": report.left_s, "job_left_s": report.job_left_s}
    return of_file | judged | left | {"problem": report.problem}


def as_table(state: RunState) -> str:
    """The branches in columns, the summary in one line, then what went wrong with whom."""
    lines = _aligned([HEADINGS, *(_cells(report) for report in state.branches)])
    lines.append(_summary(state))
    for report in state.branches:
        if report.problem:
            lines.append(f"branch {report.branch}: {report.problem.strip().rpartition(chr(10))[2]}")
    return "\n".join([*lines, *state.notes])


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _cells(report: BranchReport) -> tuple[str, ...]:
    status = report.status
    if status is None or status.attempt == 0:
        return (str(report.branch), report.state, "", "", "", report.job or "", "", "")
    epoch = f"{status.epoch}" if status.n_epochs is None else f"{status.epoch} of {status.n_epochs}"
    loss = "" if status.loss is None else f"{status.loss:.4f}" if status.loss < 1e4 else f"{status.loss:.1e}"
    age = "" if report.age_s is None or report.state == "finished" else f"{as_time(report.age_s)} ago"
    left = [] if report.left_s is None else [as_time(report.left_s)]
    left += [] if report.job_left_s is None else [f"(job: {as_time(report.job_left_s)})"]
    job = report.job or ""
    return (str(report.branch), report.state, epoch, loss, status.host, job, age, " ".join(left))


def _summary(state: RunState) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in state.counts.items())
    return f"{state.paths.folder}: {len(state.branches)} branches: {counts}; ensemble: {state.ensemble}{_cure(state)}"


def _cure(state: RunState) -> str:
    """What the user may do now, of a run at which nothing is at work."""
    folder = shlex.quote(str(state.paths.folder))
    if state.is_in_work or state.those("unreadable"):
        return ""
    if not state.exit_code:
        return f"; `stl ensemble {folder}` makes it" if state.lacks_ensemble else ""
    if state.launches:
        return f"; `stl resubmit {folder}` continues it"
    left_out = ", or `stl fit` with its config for branches that were left out" if state.those("pending") else ""
    return f"; to continue, repeat the command that started it{left_out}"


def as_time(seconds: float) -> str:
    """5s, 2m10s, 3h05m, 2d04h."""
    whole = round(seconds)
    for unit, smaller, size in (("d", "h", 86400), ("h", "m", 3600), ("m", "s", 60)):
        if whole >= size:
            part = whole % size * {"h": 24, "m": 60, "s": 60}[smaller] // size
            return f"{whole // size}{unit}{part:02d}{smaller}"
    return f"{whole}s"
