"""From the runs of an experiment to its JSON: accuracies in percent over the seeds, costs, what was chosen."""

import json
import os
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reproducing.experiments import Experiment
from reproducing.train import Training

COLUMNS = ("mean", "highest", "ensemble", "baseline")
SIZES = ("n_parameters", "weight_bytes", "multiply_adds", "activation_bytes", "bytes_read_epoch", "bytes_sent")
DIGITS = 5  # of a number in the JSON, behind the point
Row = dict[str, Any]


def summarise(experiment: Experiment, done: Mapping[str, Sequence[Training]], command: str) -> Row:
    """The JSON of an experiment, from those of its runs that are done. Pure but for reading their files."""
    main = done[""]
    results = [read_results(training.folder) for training in main]
    variants = {key: trainings for key, trainings in done.items() if key and trainings}
    return {
        "title": experiment.title,
        "command": command,
        "settings": list(main[0].extra),
        "slices_per_branch": slices_per_branch(main[0].folder),
        **columns(results),
        "goal": experiment.goal,
        "poster_on": experiment.poster_on,
        "poster": dict(zip(COLUMNS, experiment.poster, strict=True)) if experiment.poster else None,
        "seeds": [training.seed for training in main],
        "chosen": [f"{r['weighting']} on {r['space']}" for r in results],
        "weightings": over_seeds(results, lambda r: {row["weighting"]: row for row in r["weightings"]}),
        "lost": {
            "leave_one_out": over_seeds(results, lambda r: {row["branch"]: row for row in r["lost"]["leave_one_out"]}),
            "worst": over_seeds(results, lambda r: {row["k"]: row for row in r["lost"]["worst"]}),
        },
        "by_members": over_seeds(results, lambda r: {row["n"]: row for row in r["by_members"]}),
        **costs(main),
        "machine": f"{os.cpu_count()} cores of {processor()}, Python {platform.python_version()}",
        "variants": {key: variant(experiment, key, trainings) for key, trainings in variants.items()},
    }


def variant(experiment: Experiment, key: str, trainings: Sequence[Training]) -> Row:
    described = experiment.variants[key]
    row: Row = {"title": described.title, "settings": list(described.settings)}
    row["seeds"] = [training.seed for training in trainings]
    if described.only_baseline:
        scored = [json.loads((t.folder / "baseline" / "ensemble" / "results.json").read_text()) for t in trainings]
        return row | {"baseline": spread([100 * r["ensemble"]["accuracy"] for r in scored])}
    return row | columns([read_results(t.folder) for t in trainings]) | costs(trainings)


def costs(trainings: Sequence[Training]) -> Row:
    """Sizes, which all seeds share, of one branch, of all together and of the baseline; the time each seed took."""
    found = [training.costs() for training in trainings]
    parts = {"branch": [of["branches"][0] for of in found]}
    parts |= {name: [of[name] for of in found if of[name]] for name in ("all_branches", "baseline")}
    sizes = {name: {key: rows[0][key] for key in SIZES} for name, rows in parts.items() if rows}
    folders = {"all_branches": "branches", "baseline": "baseline/branches"}
    elapsed = {name: [elapsed_s(t.folder / folder) for t in trainings] for name, folder in folders.items()}
    return {
        "costs": sizes,
        "elapsed_s": {name: sorted(s for s in of if s is not None) for name, of in elapsed.items()},
        "n_processes": sorted({n_processes(t.folder) for t in trainings}),
    }


def elapsed_s(branches: Path) -> float | None:
    """From the start of the first branch to the end of the last; None if any was interrupted, or is not there."""
    found = [json.loads(path.read_text()) for path in branches.glob("*/status.json")]
    if not found or any(status["attempt"] > 1 or status["state"] != "finished" for status in found):
        return None
    ended, started = (choose(status[key] for status in found) for choose, key in ((max, "heartbeat"), (min, "started")))
    return round(ended - started, 1)


def n_processes(run: Path) -> int:
    """That trained the branches side by side: those of `stl launch --local`, or one."""
    launches = run / "launch.json"
    return int(json.loads(launches.read_text())[-1]["n_workers"]) if launches.exists() else 1


def read_results(run: Path) -> Row:
    found: Row = json.loads((run / "ensemble" / "results.json").read_text())
    return found


def slices_per_branch(run: Path) -> int:
    settings = json.loads((run / "run.json").read_text())["settings"]
    return len(settings["common_slices"] or []) or int(settings["slices_per_branch"])


def columns(results: Sequence[Row]) -> Row:
    """The table's columns in percent, and how well the probabilities are calibrated."""
    accuracies: Row = {
        "mean": [r["mean"] for r in results],
        "highest": [r["highest"] for r in results],
        "ensemble": [r["ensemble"]["accuracy"] for r in results],
        "baseline": [r["baseline"]["accuracy"] for r in results if "accuracy" in (r["baseline"] or {})],
    }
    rows = {name: spread([100 * value for value in values]) for name, values in accuracies.items()}
    return rows | {score: spread([r["ensemble"][score] for r in results]) for score in ("nll", "ece")}


def over_seeds(results: Sequence[Row], rows_of: Callable[[Row], Mapping[Any, Row]]) -> list[Row]:
    """Test accuracy in percent and calibration error of each row that all seeds have, over the seeds."""
    of_seeds = [rows_of(r) for r in results]
    keys = [key for key in of_seeds[0] if all(key in rows for rows in of_seeds)]
    return [
        {
            "name": key,
            "accuracy": spread([100 * rows[key]["test"]["accuracy"] for rows in of_seeds]),
            "ece": spread([rows[key]["test"]["ece"] for rows in of_seeds]),
        }
        for key in keys
    ]


def spread(values: Sequence[float]) -> Row:
    """Mean, standard deviation (0 for one value) and number."""
    if not values:
        return {"n": 0}
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), DIGITS), "std": round(std, DIGITS), "n": len(values)}


def processor() -> str:
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text()) if cpus.exists() else None
    return found[1] if found else platform.processor()
