"""What one training gave, a row for the JSON of its experiment: accuracies in percent, costs, what was chosen."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reproducing.experiments import PARTS
from reproducing.files import read_json
from reproducing.train import Training

SIZES = ("n_parameters", "multiply_adds", "bytes_read_epoch")
OF_PRECISION = ("weight_bytes", "activation_bytes")  # which may be another with each seed
Row = dict[str, Any]


def row_of(training: Training) -> Row:
    """Of a training that has come to its end. Reads its files, and asks `stl cost`."""
    run = training.folder
    results, costs = training.results(), training.costs()
    of = {"branch": costs["branches"][0]} | {part: costs[part] for part in PARTS[1:]}
    if training.only_baseline:
        of = {"baseline": of["baseline"]}
    row: Row = {
        "trained": training.trained(),
        **training.origin(),
        "precision": costs["precision"],
        "elapsed_s": elapsed_s(run / "branches"),
        "costs": {part: {key: sizes[key] for key in SIZES} for part, sizes in of.items()},
        **{key: {part: sizes[key] for part, sizes in of.items()} for key in OF_PRECISION},
    }
    if training.only_baseline:
        row["baseline"] = in_percent(results["ensemble"]["accuracy"])
        if training.key == "baseline":
            row["stacked"] = in_percent(training.stacked()["ensemble"]["accuracy"])
        return row
    return {
        **row,
        "slices_per_branch": slices_per_branch(run),
        "mean": in_percent(results["mean"]),
        "highest": in_percent(results["highest"]),
        "ensemble": in_percent(results["ensemble"]["accuracy"]),
        "nll": results["ensemble"]["nll"],
        "ece": results["ensemble"]["ece"],
        "chosen": f"{results['weighting']} on {results['space']}",
        "weightings": by_name(results["weightings"], "weighting"),
        "lost": {
            "leave_one_out": by_name(results["lost"]["leave_one_out"], "branch"),
            "worst": by_name(results["lost"]["worst"], "k"),
        },
        "by_members": by_name(results["by_members"], "n"),
        "bytes_sent": costs["all_branches"]["bytes_sent"],
        "n_processes": n_processes(run),
    }


def in_percent(share: float) -> float:
    return 100 * share


def by_name(rows: Iterable[Row], name: str) -> Row:
    """Test accuracy in percent and calibration error of each row, by what it is called."""
    return {
        str(row[name]): {"accuracy": in_percent(row["test"]["accuracy"]), "ece": row["test"]["ece"]} for row in rows
    }


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
