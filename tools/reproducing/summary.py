"""What one training gave, a row for the JSON of its experiment: accuracies in percent, costs, what was chosen."""

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions

from reproducing.experiments import PARTS
from reproducing.files import read_json
from reproducing.train import CHECKOUT, Training

SIZES = ("n_parameters", "weight_bytes", "multiply_adds", "bytes_read_epoch")
Row = dict[str, Any]


def row_of(training: Training) -> Row:
    """Of a training that has come to its end. Reads its files, and asks `stl cost`."""
    run = training.folder
    results, costs = training.results(), training.costs()
    of = {"branch": costs["branches"][0]} | {part: costs[part] for part in PARTS[1:] if costs[part]}
    if training.only_baseline:
        of = {"baseline": of["baseline"]}
    row: Row = {
        "trained": training.trained(),
        "machine": where_trained(),
        "precision": costs["precision"],
        "commit": commit(),
        "elapsed_s": elapsed_s(run / "branches"),
        "costs": {part: {key: sizes[key] for key in SIZES} for part, sizes in of.items()},
        "activation_bytes": {part: sizes["activation_bytes"] for part, sizes in of.items()},
    }
    if training.only_baseline:
        row["baseline"] = percent(results["ensemble"]["accuracy"])
        if training.key == "baseline":
            row["stacked"] = percent(training.stacked()["ensemble"]["accuracy"])
        return row
    return {
        **row,
        "slices_per_branch": slices_per_branch(run),
        "mean": percent(results["mean"]),
        "highest": percent(results["highest"]),
        "ensemble": percent(results["ensemble"]["accuracy"]),
        "nll": results["ensemble"]["nll"],
        "ece": results["ensemble"]["ece"],
        "chosen": f"{results['weighting']} on {results['space']}",
        "weightings": table(results["weightings"], "weighting"),
        "lost": {
            "leave_one_out": table(results["lost"]["leave_one_out"], "branch"),
            "worst": table(results["lost"]["worst"], "k"),
        },
        "by_members": table(results["by_members"], "n"),
        "bytes_sent": costs["all_branches"]["bytes_sent"],
        "n_processes": n_processes(run),
    }


def percent(share: float) -> float:
    return 100 * share


def table(rows: Iterable[Row], name: str) -> Row:
    """Test accuracy in percent and calibration error of each row, by what it is called."""
    return {str(row[name]): {"accuracy": percent(row["test"]["accuracy"]), "ece": row["test"]["ece"]} for row in rows}


def elapsed_s(branches: Path) -> float | None:
    """From the start of the first branch to the end of the last; None if any was interrupted, or is not there."""
    found = [read_json(path) for path in branches.glob("*/status.json")]
    if not found or any(status["attempt"] > 1 or status["state"] != "finished" for status in found):
        return None
    ended, started = (choose(status[key] for status in found) for choose, key in ((max, "heartbeat"), (min, "started")))
    return round(ended - started, 1)


def n_processes(run: Path) -> int:
    """That trained the branches side by side: those of `stl launch --local`, or one."""
    launches = run / "launch.json"
    return int(read_json(launches)[-1]["n_workers"]) if launches.exists() else 1


def slices_per_branch(run: Path) -> int:
    settings = read_json(run / "run.json")["settings"]
    return len(settings["common_slices"] or []) or int(settings["slices_per_branch"])


def commit(checkout: Path = CHECKOUT) -> str | None:
    """That is checked out when the row is recorded, and `-dirty` if a file has changed since but results and README.

    None where git does not know the checkout.
    """

    def git(*args: str) -> str | None:
        try:
            found = subprocess.run(["git", "-C", str(checkout), *args], capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(checkout.resolve()) or not (head := git("rev-parse", "HEAD")):
        return None
    changed = git("status", "--porcelain", "--", ".", ":!tools/results", ":!README.md")
    return head[:12] + ("" if changed == "" else "-dirty")


def where_trained() -> str:
    here, of = machine(), versions()
    hardware = here["gpu"] or f"{here['cores']} cores of {here['cpu']}"
    return f"{hardware}, Python {of['python']}, torch {of['torch']}"
