"""What measurements say: a table of one, and the regressions from an older to a newer one."""

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

SAME = ("subject", "name", "against", "device", "unit")  # rows that agree in these are of the same thing


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(part) for part in SAME)


def line(row: Row) -> str:
    """One row, readable on one line."""
    device = f" [{row['device']}]" if "device" in row else ""
    what = f"{row['subject']}{device}: {row.get('name', '')} / {row.get('against', '')}"
    for reason in ("skipped", "error"):
        if reason in row:
            return f"{what}: {reason}: {row[reason]}"
    goal = f"  {'met' if row['met'] else 'MISSED'}: {row['goal']}" if row["met"] is not None else ""
    return (
        f"{what}: {row['ratio']:.3g} ± {row['spread_ratio']:.1g}  "
        f"({row['median']:.4g} / {row['median_against']:.4g} {row['unit']}, n = {row['n']}){goal}"
    )


def changes(old: Iterable[Row], new: Iterable[Row]) -> list[tuple[Row, Row, float]]:
    """The rows measured in both, as (old, new, gain): 1.1 means that the ratio became 10 % better."""
    before = {key(row): row for row in old if "ratio" in row}
    found = [(before[key(row)], row) for row in new if "ratio" in row and key(row) in before]
    return [(a, b, gain(a["ratio"], b["ratio"], b["better"])) for a, b in found]


def gain(old: float, new: float, better: str) -> float:
    return new / old if better == "higher" else old / new


def compared(old: Iterable[Row], new: Iterable[Row], tolerance: float) -> tuple[str, list[Row]]:
    """A table of the ratios old and new, and the rows that became worse by more than `tolerance` (a share)."""
    found = changes(old, new)
    worse = [row for _, row, gained in found if gained < 1 - tolerance]
    lines = [f"{'old':>8} {'new':>8} {'gain':>7}  row"]
    for a, b, gained in found:
        mark = "  WORSE" if gained < 1 - tolerance else ""
        where = f"[{b['device']}] " if "device" in b else ""
        what = f"{where}{b['subject']}: {b['name']} / {b['against']}{mark}"
        lines.append(f"{a['ratio']:8.3g} {b['ratio']:8.3g} {100 * (gained - 1):+6.0f}%  {what}")
    return "\n".join(lines), worse
