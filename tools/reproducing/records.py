"""The JSON of an experiment: its rows, each put together from those of single seeds.

A number of a row is kept as its mean, its spread and the value of every seed. So a row can be taken apart again, and
seeds that were trained on different days, or on different machines, come together in one file.
"""

import json
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from reproducing.experiments import COLUMNS, RECIPE, Experiment
from reproducing.files import read_record, write
from reproducing.train import Planned, Training

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
    """Mean and deviation (None for one value) of those that are there, their number, and all; of texts, no mean."""
    known = [value for value in values if value is not None]
    found: Row = {"n": len(known), "values": list(values)}
    if not known or isinstance(known[0], str):
        return found
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, **found}


def combine(seeds: Mapping[int, Row]) -> Row:
    """The row of an experiment's JSON. The inverse is `take_apart`.

    Raises: ValueError if the seeds differ in what they are to have in common.
    """
    order = sorted(seeds)
    rows = [seeds[seed] for seed in order]
    shared = {key: value for row in rows for key, value in row.items() if key in SHARED}
    for key, value in shared.items():
        differing = [seed for seed, row in zip(order, rows, strict=True) if row.get(key) != value]
        if differing:
            raise ValueError(f"{key} of seeds {differing} differs from that of seed {order[-1]}: {value}")
    return {**shared, "seeds": order, **(gather([without(row, SHARED) for row in rows]) if rows else {})}


def take_apart(row: Row) -> dict[int, Row]:
    """The rows of the single seeds. The inverse of `combine`."""
    shared = {key: row[key] for key in SHARED if key in row}
    own = without(row, (*SHARED, "seeds"))
    return {seed: shared | pick(own, i) for i, seed in enumerate(row["seeds"])}


def without(row: Row, keys: Sequence[str]) -> Row:
    return {key: value for key, value in row.items() if key not in keys}


def record_of(name: str, experiment: Experiment, rows: Rows, settings: Sequence[str]) -> Row:
    """The JSON of an experiment. The inverse is `rows_of`."""
    variants = {
        key: {"title": variant.title + variant.note} | combine(rows[key])
        for key, variant in experiment.rows.items()
        if variant is not None and rows.get(key)
    }
    return {
        "title": experiment.title,
        "command": f"tools/reproduce {name}",
        "settings": list(settings),
        "goal": experiment.goal,
        "poster_on": experiment.poster_on,
        "poster": dict(zip(COLUMNS, experiment.poster, strict=True)) if experiment.poster else None,
        "baseline": variants["baseline"]["baseline"] if "baseline" in variants else spread([]),
        **combine(rows.get(RECIPE, {})),
        "variants": variants,
    }


def rows_of(record: Row) -> Rows:
    """The rows of a JSON. The inverse of `record_of`."""
    variants = {key: take_apart(without(row, ("title",))) for key, row in record["variants"].items()}
    return {RECIPE: take_apart(without(record, DERIVED)), **variants}


def as_text(record: Row) -> str:
    """JSON with a line for each number."""
    of_number = re.compile(r'{[^{}]*"values": \[[^]]*\]\s*}')
    return of_number.sub(lambda found: " ".join(found[0].split()), json.dumps(record, indent=2)) + "\n"


def read_rows(file: Path, planned: Planned) -> tuple[Rows, list[str]]:
    """What was recorded as it would be trained today; and for each row that was not, in words, what differs."""
    rows = rows_of(read_record(file)) if file.exists() else {}
    others = [f"{key}: no row of the experiment any more" for key in rows if key not in planned]
    rows = {key: seeds for key, seeds in rows.items() if key in planned}
    for key, seeds in rows.items():
        of_today = planned[key][0].trained()
        for seed, row in list(seeds.items()):
            differing = [k for k in of_today if row["trained"][k] != of_today[k]]
            if differing or not is_whole(row):
                del seeds[seed]
                others.append(f"{key}, seed {seed}: other {' and '.join(differing) or 'columns, of an older version'}")
    return rows, others


def is_whole(row: Row) -> bool:
    """Whether it has the columns that a row has today, and not only those of an older version."""
    columns = ("precision", "weight_bytes", *(("chosen",) if "ensemble" in row else ()))
    return all(row.get(key) for key in columns)


def check_rows(file: Path, planned: Planned, replace: bool) -> tuple[Rows, list[str]]:
    """What `read_rows` returns, if nothing was recorded otherwise than it would be today, or it may be replaced.

    Raises: SystemExit that names what else was recorded.
    """
    rows, others = read_rows(file, planned)
    if others and not replace:
        listed = "\n  ".join(others)
        sys.exit(
            f"{file} has rows that were trained in another way than they would be now:\n  {listed}\n"
            "expected --out to name another folder and --runs one for its trainings, or --replace to drop them"
        )
    return rows, others


def keep(file: Path, training: Training, row: Row, planned: Planned, replace: bool = False) -> None:
    """Add what one training gave to the JSON; other processes may do so at the same time.

    Raises: SystemExit as `check_rows`, before anything is written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        rows, dropped = check_rows(file, planned, replace)
        for other in dropped:
            print(f"{file} drops {other}", file=sys.stderr)
        rows.setdefault(training.key, {})[training.seed] = row
        try:
            record = record_of(file.stem, training.experiment, rows, training.extra)
        except ValueError as error:
            sys.exit(f"{file}: {training.key}, {error}; with another --out it is recorded without training it again")
        write(file, as_text(record))
