"""The README's tables of what was reproduced, from the JSON files of `tools/reproduce`. Nothing in them is typed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from reproducing.experiments import COLUMNS, EXPERIMENTS, N_TEST, PARTS, RECIPE
from reproducing.files import read_record

Row = Mapping[str, Any]


def read_records(folder: Path) -> dict[str, Row]:
    """Those experiments whose recipe has been carried out, in the order of the table."""
    files = {name: folder / f"{name}.json" for name in EXPERIMENTS}
    found = {name: read_record(file) for name, file in files.items() if file.exists()}
    return {name: record for name, record in found.items() if record["seeds"]}


def results(records: Mapping[str, Row]) -> str:
    """The rows of Table 1 beside the poster's, and how each was made."""
    rows = []
    for record in records.values():
        if record["poster"]:
            cells = [f"{record['poster'][column]:.2f}" for column in COLUMNS]
            rows.append([f"the poster: {record['poster_on']}", "", "", *cells, "", ""])
        sizes = record["costs"]
        of = [f"{sizes[part]['n_parameters']:,}" for part in PARTS]
        work = f"{sizes['baseline']['multiply_adds'] / sizes['all_branches']['multiply_adds']:.2f}"
        n = record["ensemble"]["n"]
        cells = [percent_of(n, record[column]) for column in COLUMNS[:-1]] + [baseline_of(record)]
        reads = f"{record['slices_per_branch']} of {n_branches(record)}"
        rows.append([f"{record['title']}: measured", str(n), reads, *cells, work, " / ".join(of)])
    head = ["", "n", "slices a branch reads", "Mean", "Highest", "Ens.", "Baseline"]
    head += ["multiply-adds of the baseline, those of all branches being 1", "parameters: a branch / all / baseline"]
    first = (
        "Test accuracy in percent, mean ± standard deviation over n seeds, every choice on the validation split. Mean: "
        "of the single branches. Highest: of the branch that is best on the validation split. Ens.: of their weighted "
        "sum. Baseline: of the conventional network on the whole image."
    )
    rows_of_all = [row for record in records.values() for row in (record, *record["variants"].values())]
    machines = dict.fromkeys(text for row in rows_of_all for text in row["machine"]["values"] if text)
    last = (
        f"Trained on {'; '.join(machines)}; machines shared with other work, where the same took up to several times "
        "as long: these times compare nothing."
    )
    made = [how_made(name, record) for name, record in records.items()]
    return "\n".join([first, "", *table(head, rows), "", *table(MADE, made), "", last, ""])


def baseline_of(record: Row) -> str:
    """The accuracy of the conventional network, with its seeds where they are not those of the ensemble."""
    seeds = record["variants"].get("baseline", record)["seeds"]
    others = len(seeds) == len(record["seeds"]) and seeds != record["seeds"]
    shown = percent_of(len(record["seeds"]), record["baseline"])
    return shown + (f" (seeds {', '.join(map(str, seeds))})" if others else "")


def n_branches(record: Row) -> int:
    return len(record["lost"]["leave_one_out"])


MADE = (
    *("", "command", "seeds", "precision", "all branches in", "the baseline in", "weights chosen"),
    *("standard error of Ens.", "NLL", "ECE", "goal"),
)


def how_made(name: str, record: Row) -> list[str]:
    """How a row was made, how long it took, how sure it is, what it was to reach."""
    processes = " or ".join(map(str, sorted(set(record["n_processes"]["values"]))))
    baseline = record["variants"].get("baseline", {"elapsed_s": {"values": []}, "precision": record["precision"]})
    precision = [precisions(record)] + ([f"the baseline {precisions(baseline)}"] if differ(baseline, record) else [])
    return [
        record["title"],
        f"`{' '.join([record['command'], *record['settings']])}`",
        ", ".join(map(str, record["seeds"])),
        "; ".join(precision),
        f"{seconds(record['elapsed_s'])}, {processes} process{'' if processes == '1' else 'es'}",
        seconds(baseline["elapsed_s"]),
        ", ".join(dict.fromkeys(record["chosen"]["values"])),
        f"{standard_error(record['ensemble']['mean'], N_TEST[EXPERIMENTS[name].group]):.2f}",
        f"{record['nll']['mean']:.4f}",
        f"{record['ece']['mean']:.4f}",
        goal(record),
    ]


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy in percent on n images, in percent: what other test images would change. That of a binomial."""
    share = accuracy / 100
    return 100 * (share * (1 - share) / n) ** 0.5


def goal(record: Row) -> str:
    """Whether the ensemble has reached what it was to, and is above the conventional network; empty without a goal.

    The two are compared over the seeds that both have in one precision.
    """
    if not record["goal"]:
        return ""
    verdict = "met" if record["ensemble"]["mean"] >= record["goal"] else "missed"
    return f"{record['goal']:.1f}: {verdict}{above(record)}"


def above(record: Row) -> str:
    if "baseline" not in record["variants"]:
        return ""
    ours, theirs = by_training(record, "ensemble"), by_training(record["variants"]["baseline"], "baseline")
    common = ours.keys() & theirs.keys()
    if not common:
        return ""
    lead = fmean(ours[training] - theirs[training] for training in common)
    return f"; above the baseline of equal multiply-adds: {'met' if lead > 0 else 'missed'} ({lead:+.2f})"


def by_training(row: Row, column: str) -> dict[tuple[int, str], float]:
    """The values of a column by seed and precision."""
    return dict(zip(zip(row["seeds"], row["precision"]["values"], strict=True), row[column]["values"], strict=True))


def seconds(found: Row) -> str:
    """287 to 2,012 s; a hyphen where every training was interrupted."""
    known = [value for value in found["values"] if value is not None]
    if not known:
        return "-"
    low, high = (f"{value:,.0f}" for value in (min(known), max(known)))
    return f"{low} s" if low == high else f"{low} to {high} s"


def variants(records: Mapping[str, Row]) -> str:
    """Each experiment beside its controls: the same code, with some settings changed."""
    first = (
        "Ens. has the weighting that was chosen on the validation split, Ens., simplex one number a branch: minimum "
        "NLL there over non-negative weights of sum 1. (n = 2) beside a number: so many seeds have it. row: what "
        "`tools/reproduce --rows` calls it."
    )
    head = ["", "row", "n", "Mean", "Highest", "Ens.", "Ens., simplex", "ECE"]
    head += ["multiply-adds of all", "training bytes a branch and epoch"]
    lines = [first, ""]
    for record in records.values():
        rows = [variant_row("the recipe", RECIPE, record)] if record["seeds"] else []
        for key, row in record["variants"].items():
            precision = f", {precisions(row)}" if record["seeds"] and differ(row, record) else ""
            # Of the curve over the slices that a branch reads, the recipe where the curve is of fewer epochs.
            is_recipe = record["seeds"] and key == f"reads-{record['slices_per_branch']}"
            title = ("the recipe in fewer epochs: " if is_recipe else "") + row["title"]
            rows.append(variant_row(title + precision, key, row))
            if "stacked" in row:
                corrected = row | {"baseline": row["stacked"]}
                rows.append(variant_row(f"the same, with stacking on its outputs{precision}", "", corrected))
        lines += [f"**{record['title']}**", "", *table(head, rows), ""]
    return "\n".join(lines)


def precisions(row: Row) -> str:
    """In which its seeds were trained; of several, how many in each."""
    counts = Counter(row["precision"]["values"])
    return ", ".join(name if len(counts) == 1 else f"{name} ({n})" for name, n in counts.items())


def differ(row: Row, other: Row) -> bool:
    """Whether two rows, or the seeds of one, were not all trained in one precision."""
    return len({*row["precision"]["values"], *other["precision"]["values"]}) > 1


def variant_row(title: str, key: str, row: Row) -> list[str]:
    """Of branches, or of a network on the whole image, whose own multiply-adds and bytes are in the last columns."""
    sizes, names = row["costs"], [title, f"`{key}`" if key else ""]
    if "ensemble" not in row:
        cost = cost_cells(sizes["baseline"], sizes["baseline"])
        return [*names, str(row["baseline"]["n"]), "", "", percent(row["baseline"]), "", "", *cost]
    n = row["ensemble"]["n"]
    accuracies = [percent_of(n, row[column]) for column in ("mean", "highest", "ensemble")]
    simplex = row["weightings"].get("simplex")
    accuracies.append(percent_of(n, simplex["accuracy"]) if simplex else "")
    cost = cost_cells(sizes["all_branches"], sizes["branch"])
    return [*names, str(n), *accuracies, f"{row['ece']['mean']:.4f}", *cost]


def cost_cells(computes: Row, reads: Row) -> list[str]:
    return [f"{computes['multiply_adds']:,}", f"{reads['bytes_read_epoch']:,}"]


def weightings(records: Mapping[str, Row]) -> str:
    """Every way to weigh the members, fitted on the validation split, on the test set."""
    names = list(dict.fromkeys(name for record in records.values() for name in record["weightings"]))
    rows = [[name, *(of_all_seeds(record, name) for record in records.values())] for name in names]
    return "\n".join([*table(["", *(record["title"] for record in records.values())], rows), ""])


def of_all_seeds(record: Row, weighting: str) -> str:
    """Empty if a seed had to do without this weighting."""
    found = record["weightings"].get(weighting)
    return percent(found["accuracy"]) if found and found["accuracy"]["n"] == len(record["seeds"]) else ""


def lost(records: Mapping[str, Row]) -> str:
    """What is left of the accuracy when branches are lost: any one of them, and the k that weigh most."""
    rows = []
    for record in records.values():
        of_one = [row["accuracy"]["mean"] for row in record["lost"]["leave_one_out"].values()]
        rows.append([record["title"], "none", percent(record["ensemble"]), f"{record['ece']['mean']:.4f}"])
        rows.append(["", "any one", f"{min(of_one):.2f} to {max(of_one):.2f}", ""])
        for k, row in record["lost"]["worst"].items():
            if int(k).bit_count() == 1:  # 1, 2, 4, 8
                rows.append(["", f"the {k} heaviest", percent(row["accuracy"]), f"{row['ece']['mean']:.4f}"])
    return "\n".join([*table(["", "lost", "Ens.", "ECE"], rows), ""])


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def percent_of(n: int, found: Row) -> str:
    """As `percent`, with the number of seeds where it is not that of the row."""
    return percent(found) + ("" if found["n"] in (0, n) else f" (n = {found['n']})")


def percent(found: Row) -> str:
    """97.50 ± 0.71, in percent; a hyphen where nothing was measured."""
    if not found["n"]:
        return "-"
    return f"{found['mean']:.2f}" + (f" ± {found['std']:.2f}" if found["n"] > 1 else "")
