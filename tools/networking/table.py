"""`network.json` as a table in Markdown. Needs nothing but Python."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

COLUMNS = ((16, 1), (256, 1), (1024, 1), (16, 50), (1024, 50))  # number of nodes, and how many times as fast a worker
NAMES = {
    "spectral": "spectral, `stl fit`",
    "ddp": "DDP",
    "powersgd": "DDP, PowerSGD of rank {powersgd_rank}",
    "local-sgd": "local SGD, every {local_sgd_period} steps",
}


def markdown(record: Row) -> str:
    """What was measured, and below it how far off the model on paper was there and what efficiency it gives more nodes.

    Two numbers: nothing is exchanged while anything is computed, to as much as fits into the backward pass.
    """
    return "\n".join([*measured(record), "", *carried(record), ""])


def measured(record: Row) -> list[str]:
    head = "| | link | bytes a step and worker | seconds an epoch | efficiency | n |"
    return [head, "|---|---|---|---|---|---|", *(measured_row(row, record["work"]) for row in record["rows"])]


def measured_row(row: Row, work: Row) -> str:
    seconds = f"{row['epoch_s']:.2f} ± {row['spread']:.2f}"
    n_bytes = f"{row['bytes_per_step_per_worker']:,.0f}"
    return _line([name(row, work), row["link"], n_bytes, seconds, f"{row['efficiency']:.2f}", row["n"]])


def carried(record: Row) -> list[str]:
    head = ["", "link", "model's error, 4 nodes", *(f"{n:,} nodes{_faster(faster)}" for n, faster in COLUMNS)]
    lines = [_line(head), "|---" * len(head) + "|"]
    for check in record["checks"]:
        same = [row for row in record["modelled"] if all(row[key] == check[key] for key in ("method", "link"))]
        places = {(row["n_nodes"], row["faster"]): row for row in same}
        efficiencies = [
            _range(places[place]["efficiency"], places[place]["overlapped_efficiency"], ".2f") for place in COLUMNS
        ]
        error = _range(100 * check["overlapped_relative_error"], 100 * check["relative_error"], "+.0f") + " %"
        lines.append(_line([name(check, record["work"]), check["link"], error, *efficiencies]))
    return lines


def name(row: Row, work: Row) -> str:
    method: str = row["method"]
    return NAMES.get(method, method).format(**work)


def _faster(faster: float) -> str:
    return "" if faster == 1 else f", {faster:g} × as fast"


def _range(low: float, high: float, style: str) -> str:
    texts = [format(value, style) for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


def _line(cells: Iterable[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
