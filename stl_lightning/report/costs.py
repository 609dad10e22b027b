"""The table of costs: a column for branches of equal cost, for all branches, for the baseline, and their ratios."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

from stl_lightning.ranges import as_ranges
from stl_lightning.report.table import wide_console

TRAINING_FACTOR = 3  # backward, a layer makes two products for its one: for its input and for its weights
NEARLY = 1.005  # shown as 1.00: as much as the baseline
MEASURED = ("wall_s", "bytes_sent", "bytes_received")


def scaled(value: float) -> str:
    """Three digits and a prefix: 17.7 k."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:#.3g}".rstrip(".") + f" {prefix}"
    return f"{value:.0f}"


def in_bytes(value: float) -> str:
    return f"{scaled(value)}B" if value >= 999.5 else f"{value:.0f} B"


def counted(number: int) -> str:
    return f"{number:,}" if number < 10_000_000 else scaled(number)


def in_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s"


def times(ratio: float) -> str:
    return f"{ratio:.2f}" if 0.1 <= ratio < 1000 else f"{ratio:.2g}"


# key of `cost.costs` -> what it is, and how its numbers are shown
ROWS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "n_parameters": ("parameters", counted),
    "weight_bytes": ("weights", in_bytes),
    "multiply_adds": ("multiply-adds", scaled),
    "activation_bytes": ("activations", in_bytes),
    "bytes_read_epoch": ("data an epoch", in_bytes),
    "bytes_read": ("data in all", in_bytes),
    "wall_s": ("training time", in_seconds),
    "bytes_sent": ("sent", in_bytes),
    "bytes_received": ("received", in_bytes),
}


def print_costs(costs: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table and what its numbers mean; as plain Markdown when the output is not a terminal."""
    console = console or wide_console()
    table = cost_table(costs)
    table.box = HEAVY_HEAD if console.is_terminal else MARKDOWN
    console.print(table)
    for line in remarks(costs):
        console.print(line, highlight=False, soft_wrap=True)


def cost_table(costs: Mapping[str, Any]) -> Table:
    """Rows of which nothing was measured are left out."""
    columns = _alike(costs["branches"]) | {"all": [costs["all_branches"]], "baseline": [costs["baseline"]]}
    table = Table(title="costs")
    table.add_column("")
    for name in (*columns, "one : base", "all : base"):
        table.add_column(name, justify="right")
    for key, (what, show) in ROWS.items():
        cells = [_range([row[key] for row in rows], show) for rows in columns.values()]
        ratios = [_range([costs["ratios"][name][key]], times) for name in ("branch", "all_branches")]
        if set(cells) != {"-"}:
            table.add_row(what, *cells, *ratios)
    return table


def _alike(branches: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of branches by name, those together that differ in what was measured only."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in branches:
        groups.setdefault(tuple(row[key] for key in ROWS if key not in MEASURED), []).append(row)
    return {_name([row["branch"] for row in rows]): rows for rows in groups.values()}


def _name(branches: Sequence[int]) -> str:
    return f"branch {branches[0]}" if len(branches) == 1 else f"{as_ranges(branches)}, each"


def _range(values: Sequence[Any], show: Callable[[Any], str]) -> str:
    shown = [show(value) for value in sorted(value for value in values if value is not None)]
    if not shown:
        return "-"
    return shown[0] if shown[0] == shown[-1] else f"{shown[0]} to {shown[-1]}"


def remarks(costs: Mapping[str, Any]) -> list[str]:
    """What stands below the table: first, and plainly, where all branches together cost more than the baseline."""
    key = "transform_multiply_adds"
    one, in_all = max(row[key] for row in costs["branches"]), costs["all_branches"][key]
    lines = [
        _above(costs["ratios"]["all_branches"]),
        f"multiply-adds: of the forward pass of one image, in matrix products and convolutions; training takes "
        f"{TRAINING_FACTOR} times as many. The transform adds {scaled(one)} for what a branch reads, {scaled(in_all)} "
        "for all branches",
        f"activations: what a training batch of {costs['batch_size']} ({costs['precision']}) keeps for the backward "
        "pass; all: if all branches train at the same time",
        f"data: {_read(costs['stored_as'], costs['has_store'])}; one : base: the costliest branch",
    ]
    if costs["all_branches"]["wall_s"] is not None:
        lines.append(
            "training time, sent, received: branches that one process trained together each show its numbers; all: "
            "these counted once"
        )
    return lines


def _read(stored_as: str, has_store: bool) -> str:
    if stored_as == "uint8":
        return (
            "a branch reads all pixels, of 8 bits, as the baseline does: for data.augment its slices are not enough, "
            "so no slice store would do (`stl fit` with data.store says why)"
        )
    where = "a slice store" if has_store else "the slice store that `stl prepare` would write"
    without = "" if has_store else "; without data.store, as here, a process makes its slices of all pixels"
    return f"a branch reads its slices, as {stored_as} from {where}, the baseline pixels of 8 bits{without}"


def _above(ratios: Mapping[str, float | None]) -> str:
    above = [
        f"{what} ({times(ratio)} times)" for key, (what, _) in ROWS.items() if (ratio := ratios[key] or 0) > NEARLY
    ]
    return f"ALL BRANCHES TOGETHER TAKE MORE THAN THE BASELINE in: {', '.join(above) or 'nothing of these'}"
