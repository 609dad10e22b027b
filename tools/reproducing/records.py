"""The JSON of an experiment: a row for the recipe and each of its variants, put together from those of single seeds.

A number of a row is kept as its mean, its spread and the value of every seed. So a row can be taken apart again, and
seeds that were trained on different days, or on different machines, come together in one file.
"""

import fcntl
import json
import os
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reproducing.experiments import COLUMNS, Experiment
from reproducing.train import Planned, Training

DIGITS = 5  # of a number, behind the point
SHARED = ("trained", "slices_per_branch", "costs")  # what the seeds of a row have in common
DERIVED = ("title", "command", "settings", "goal", "poster_on", "poster", "baseline", "variants")  # not of its seeds

Row = dict[str, Any]
Rows = dict[str, dict[int, Row]]  # each row of an experiment, by seed


def gather(rows: Sequence[Any]) -> Row:
    """Each number of the rows of several seeds as a `spread`; None where a seed has none. The inverse is `pick`."""
    known = [row for row in rows if row is not None]
    if not known or not isinstance(known[0], Mapping):
        return spread(rows)
    keys = dict.fromkeys(key for row in known for key in row)  # in order
    return {key: gather([None if row is None else row.get(key) for row in rows]) for key in keys}


def pick(row: Row, i: int) -> Any:
    """The row of the i-th seed. The inverse of `gather`."""
    return row["values"][i] if "values" in row else {key: pick(part, i) for key, part in row.items()}


def spread(values: Sequence[Any]) -> Row:
    """Mean and deviation (0 for one value) of those that are there, their number, and all; of texts, no mean."""
    known = [value for value in values if value is not None]
    found: Row = {"n": len(known), "values": list(values)}
    if not known or isinstance(known[0], str):
        return found
    std = statistics.stdev(known) if len(known) > 1 else 0.0
    return {"mean": round(statistics.fmean(known), DIGITS), "std": round(std, DIGITS), **found}


def combine(seeds: Mapping[int, Row]) -> Row:
    """The row of an experiment's JSON. The inverse is `take_apart`."""
    order = sorted(seeds)
    shared = {key: seeds[order[-1]][key] for key in SHARED if key in seeds[order[-1]]}
    own = [without(seeds[seed], SHARED) for seed in order]
    return {**shared, "seeds": order, **gather(own)}


def take_apart(row: Row) -> dict[int, Row]:
    """The rows of the single seeds. The inverse of `combine`."""
    shared = {key: row[key] for key in SHARED if key in row}
    own = without(row, (*SHARED, "seeds"))
    return {seed: shared | pick(own, i) for i, seed in enumerate(row["seeds"])}


def record_of(name: str, experiment: Experiment, rows: Rows, settings: Sequence[str]) -> Row:
    """The JSON of an experiment."""
    variants = {
        key: {"title": of.title} | combine(rows[key])
        for key, of in experiment.rows.items()
        if of is not None and rows.get(key)
    }
    return {
        "title": experiment.title,
        "command": f"tools/reproduce {name}",
        "settings": list(settings),
        "goal": experiment.goal,
        "poster_on": experiment.poster_on,
        "poster": dict(zip(COLUMNS, experiment.poster, strict=True)) if experiment.poster else None,
        "baseline": variants["baseline"]["baseline"] if "baseline" in variants else spread([]),
        **combine(rows[""]),
        "variants": variants,
    }


def rows_of(record: Row, experiment: Experiment) -> Rows:
    """What a JSON has of the rows that the experiment still has. The inverse of `record_of`."""
    variants = {key: without(row, ("title",)) for key, row in record["variants"].items() if key in experiment.rows}
    return {key: take_apart(row) for key, row in {"": without(record, DERIVED), **variants}.items()}


def without(row: Row, keys: Sequence[str]) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def as_text(record: Row) -> str:
    """JSON with a line for each number."""
    of_number = re.compile(r'{[^{}]*"values": \[[^]]*\]\s*}')
    return of_number.sub(lambda found: " ".join(found[0].split()), json.dumps(record, indent=2)) + "\n"


def read_rows(file: Path, experiment: Experiment, planned: Planned) -> Rows:
    """What was recorded with the settings and the config of today; says what was recorded with others."""
    if not file.exists():
        return {}
    rows = rows_of(json.loads(file.read_text()), experiment)
    for key, seeds in rows.items():
        of_today = planned[key][0].trained()
        for seed in [seed for seed, row in seeds.items() if row["trained"] != of_today]:
            was = seeds.pop(seed)["trained"]
            what = " and ".join(f"other {part}" for part in of_today if was[part] != of_today[part])
            label = f"{file.stem}, {key}" if key else file.stem
            print(f"{label}, seed {seed}: was recorded with {what}; it does not count", file=sys.stderr)
    return rows


def keep(file: Path, training: Training, row: Row, planned: Planned) -> None:
    """Add what one training gave to the JSON; other processes may do so at the same time."""
    with locked(file.parent):
        rows = read_rows(file, training.experiment, planned)
        rows.setdefault(training.key, {})[training.seed] = row
        if not rows.get(""):
            print(f"{file.stem}: {training.name} is recorded when the recipe itself has been trained", file=sys.stderr)
            return
        temporary = file.with_name(f".{file.name}.part")
        temporary.write_text(as_text(record_of(file.stem, training.experiment, rows, training.extra)))
        temporary.replace(file)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time changes the files of a folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
