"""All cases in turns, several times, and what is kept of that."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.compare import SPREAD
from benchmarks.machine import machine, versions

from networking import model
from networking.images import write_images
from networking.measure import CASES, QUICK_CASES, Repetition, in_turns
from networking.nodes import LINKS, check_tools
from networking.rows import DEFINITION, rows
from networking.work import N_WORKERS, Record, Work


def study(data_root: Path, n_repetitions: int, quick: bool, cores: float | None) -> Record:
    """Measure, and carry what was measured to more nodes.

    Raises: Unavailable without namespaces, DataError without images, MeasurementError if a training fails.
    """
    check_tools()
    here, began_s = machine(), time.monotonic()
    torch.set_num_threads(1)  # of the workers too, which are forks; a thread pool here would be missing there
    with tempfile.TemporaryDirectory() as folder:
        images = str(Path(folder) / "images.npz")
        work = Work.quick(images) if quick else Work(images)
        write_images(work, data_root)
        repetitions = in_turns(QUICK_CASES if quick else CASES, work, Path(folder), n_repetitions, cores)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "spread": SPREAD,
        "machine": here,
        "versions": versions(),
        "quick": quick,
        "cores_per_worker": cores,
        "wall_s": time.monotonic() - began_s,
        "definition": DEFINITION,
        "links": {name: link.shaping for name, link in LINKS.items()},
    } | results(repetitions, work)


def results(repetitions: Sequence[Repetition], work: Work) -> Record:
    """Rows, and the model with what it rests on."""
    found = rows(repetitions)
    of_ddp = [(case.link, record) for each in repetitions for case, record in each.items() if case.method.name == "ddp"]
    numbers: dict[str, Any] = asdict(work) | {"network_bytes": of_ddp[0][1]["network_bytes"]}
    del numbers["images"]
    links = {case.link for case in repetitions[0] if LINKS[case.link].shaping}
    networks = {link: network([record for name, record in of_ddp if name == link]) for link in sorted(links)}
    measured = {"work": numbers, "rows": found, "networks": {name: asdict(each) for name, each in networks.items()}}
    return measured | model.carried(found, networks, numbers)


def network(records: Sequence[Record]) -> model.Network:
    """A link, as DDP's workers saw it when they had nothing else to do."""
    whole_s, tiny_s = (
        statistics.median(record[name] for record in records) for name in ("all_reduce_s", "tiny_all_reduce_s")
    )
    return model.Network.from_all_reduce(records[0]["network_bytes"], whole_s, tiny_s, N_WORKERS)
