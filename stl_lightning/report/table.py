"""The row of the paper's Table 1 and the rows of the branches, from `results.json`."""

from typing import Any

from rich.box import HEAVY_HEAD, MARKDOWN
from rich.console import Console
from rich.table import Table

PIPE_COLUMNS = 200  # a file has no width that numbers should be cut to


def wide_console() -> Console:
    """Of the terminal; where the output is none, so wide that no table is cut."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def print_results(results: dict[str, Any], console: Console | None = None) -> None:
    """Print the tables; as plain Markdown when the output is not a terminal."""
    console = console or wide_console()
    for table in (branch_table(results), weighting_table(results), members_table(results), summary_table(results)):
        if not table.row_count:
            continue
        table.box = HEAVY_HEAD if console.is_terminal else MARKDOWN
        console.print(table)
    for line in _remarks(results):
        console.print(line, highlight=False, soft_wrap=True)


def _remarks(results: dict[str, Any]) -> list[str]:
    lines = [
        f"weights: {results['weighting']} on {results['space']}, fitted on the validation split; "
        f"temperature {results['temperature']:.3f}; {results['n_test']} test images"
    ]
    if results.get("flips"):
        lines.append("logits are means over each image and its mirror image, also those of the baseline")
    sent, received = (results["traffic"][name] for name in ("bytes_sent", "bytes_received"))
    counted = "not counted" if sent is None or received is None else f"{sent:,} and {received:,}"
    lines.append(f"bytes sent and received while training: {counted}")
    if any(row["weighting"] != results["weighting"] for row in results.get("by_members", [])):
        of_several = f"{results['weighting']} has several weights a branch"
        lines.append(f"members: the n best are weighted by {results['by_members'][0]['weighting']}; {of_several}")
    lines += [f"branch {branch} is left out: {reason}" for branch, reason in results["left_out"].items()]
    if "left_out" in (results["baseline"] or {}):
        lines.append(f"the baseline is left out: {results['baseline']['left_out']}")
    if results["missing"]:
        lines.append(f"PARTIAL ENSEMBLE: branches missing: {', '.join(map(str, results['missing']))}")
    return lines


def summary_table(results: dict[str, Any]) -> Table:
    """Mean, Highest, Ens. and Baseline accuracy in percent, as in Table 1, and the ensemble's calibration."""
    ensemble, baseline = results["ensemble"], results["baseline"]
    table = Table(title="test set")
    for column in ("Mean", "Highest", "Ens.", "Baseline", "NLL", "ECE"):
        table.add_column(column, justify="right")
    table.add_row(
        percent(results["mean"]),
        percent(results["highest"]),
        percent(ensemble["accuracy"]),
        percent(baseline["accuracy"]) if baseline and "accuracy" in baseline else "-",
        f"{ensemble['nll']:.4f}",
        f"{ensemble['ece']:.4f}",
    )
    return table


def branch_table(results: dict[str, Any]) -> Table:
    """A row a branch: what it reads, how good it is alone, what it weighs in the sum, and what is left without it."""
    table = Table(title="branches")
    for column in ("branch", "(u, v)", "parameters", "val acc", "test acc", "test NLL", "weight", "without"):
        table.add_column(column, justify="right", no_wrap=column in ("parameters", "without"))
    without = {row["branch"]: row["test"]["accuracy"] for row in results.get("lost", {}).get("leave_one_out", [])}
    for row in results["branches"]:
        u, v = row["frequency"]
        table.add_row(
            str(row["branch"]),
            f"({u}, {v})",
            f"{row['n_parameters']:,}",
            percent(row["val"]["accuracy"]),
            percent(row["test"]["accuracy"]),
            f"{row['test']['nll']:.4f}",
            "-" if row["weight"] is None else f"{row['weight']:.3f}",
            percent(without[row["branch"]]) if without else "-",
        )
    return table


def weighting_table(results: dict[str, Any]) -> Table:
    """A row for each weighting that was tried, fitted on the validation split; a star marks the one that was taken.

    The NLL of the cross-validation decided; one that was given up after some folds has none that compares. Accuracy on
    the images of the fit would flatter many weights.
    """
    table = Table(title="weightings")
    for column in ("weighting", "space", "temp.", "cv NLL", "test acc", "test NLL", "test ECE"):
        table.add_column(column, justify="left" if column in ("weighting", "space") else "right")
    most = max((score["n_samples"] for score in results["cross_validation"]), default=0)
    whole = [score for score in results["cross_validation"] if score["n_samples"] == most]
    cv_nll = {(score["weighting"], score["space"]): f"{score['nll']:.4f}" for score in whole}
    for row in results.get("weightings", []):
        table.add_row(
            row["weighting"] + (" *" if row["weighting"] == results["weighting"] else ""),
            row["space"],
            f"{row['temperature']:.3f}",
            cv_nll.get((row["weighting"], row["space"]), "given up"),
            percent(row["test"]["accuracy"]),
            f"{row['test']['nll']:.4f}",
            f"{row['test']['ece']:.4f}",
        )
    return table


def members_table(results: dict[str, Any]) -> Table:
    """Test accuracy by number: of the n best members, fitted anew, and of the ensemble that loses its n heaviest."""
    rows, worst = results.get("by_members", []), results.get("lost", {}).get("worst", [])
    table = Table(title="members")
    for column in ("n", "n best, " + (rows[0]["weighting"] if rows else ""), "without the n heaviest"):
        table.add_column(column, justify="right")
    if len(rows) < 2:  # one member alone, or results that were written before there were such rows
        return table
    without = [percent(row["test"]["accuracy"]) for row in worst]
    for row, lost in zip(rows, [*without, "-"], strict=True):
        table.add_row(str(row["n"]), percent(row["test"]["accuracy"]), lost)
    return table


def percent(share: float) -> str:
    return f"{100 * share:.2f}"
