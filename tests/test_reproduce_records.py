"""The JSON of `tools/reproduce`: put together from seeds and taken apart again, and the tables that follow from it."""

import json
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat, takewhile
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reproducing import curve, readme
from reproducing.experiments import EXPERIMENTS, Experiment, aligned, reads, shorter
from reproducing.records import (
    DERIVED,
    SHARED,
    check_rows,
    combine,
    gather,
    keep,
    pick,
    read_rows,
    record_of,
    rows_of,
    spread,
    take_apart,
    without,
)
from reproducing.train import Planned, Training, trainings
from test_reproduce import CHECKOUT, RECORDS, RESULTS


def test_the_spread_of_seeds() -> None:
    assert spread([1.0, 3.0]) == {"mean": 2.0, "std": pytest.approx(2**0.5, abs=1e-5), "n": 2, "values": [1.0, 3.0]}
    assert spread([1.0, None]) == {"mean": 1.0, "std": None, "n": 1, "values": [1.0, None]}
    assert readme.percent(spread([97.5])) == "97.50"
    assert readme.percent(spread([97.0, 98.0])) == "97.50 ± 0.71"
    assert readme.percent(spread([])) == "-"


@given(
    st.lists(
        st.fixed_dictionaries(
            {"ensemble": st.floats(0, 100), "chosen": st.text(), "baseline": st.none() | st.floats(0, 100)},
            optional={"topk": st.fixed_dictionaries({"ece": st.floats(0, 1)})},
        ),
        min_size=1,
        max_size=4,
    )
)
def test_the_rows_of_seeds_can_be_taken_out_again(rows: list[dict[str, Any]]) -> None:
    """What one seed has and another has not comes back as None."""
    gathered = gather(rows)
    for i, row in enumerate(rows):
        missing = {"topk": {"ece": None}} if any("topk" in other for other in rows) else {}
        assert pick(gathered, i) == missing | row


def test_what_seeds_have_in_common_must_be_the_same() -> None:
    rows = {seed: {"trained": {"config": "a"}, "costs": {"n": 3}, "mean": float(seed)} for seed in (2, 0)}
    assert take_apart(combine(rows)) == rows
    rows[0]["costs"] = {"n": 4}
    with pytest.raises(ValueError, match=r"costs of seeds \[0\] differs from that of seed 2"):
        combine(rows)


@pytest.mark.parametrize("name", RECORDS)
def test_the_json_is_that_of_its_seeds(name: str) -> None:
    """Taken apart into single seeds and put together, it is the same: mean and spread are those of the values."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rows = rows_of(record)
    assert record_of(name, EXPERIMENTS[name], rows, record["settings"]) == record


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_recorded_is_of_the_settings_of_today(name: str) -> None:
    _, others = read_rows(RESULTS / f"{name}.json", trainings(name, EXPERIMENTS[name], Path("/nowhere")))
    assert not others


@pytest.mark.parametrize("name", RECORDS)
def test_a_row_of_the_table_is_that_of_its_json(name: str) -> None:
    """Read here by hand, not by the code that writes the table; mean and spread from the values of the seeds."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    begin = f"| {record['title']}: measured | "
    (line,) = [line for line in (CHECKOUT / "README.md").read_text().splitlines() if line.startswith(begin)]
    n, reads, *cells, work, _parameters = line.removeprefix(begin).split(" | ")
    assert n == str(len(record["seeds"]))
    assert f"B = {reads.removeprefix(str(record['slices_per_branch']) + ' of ')}, " in record["title"] + ", "
    costs = record["costs"]
    of_all, of_baseline = (costs[part]["multiply_adds"] for part in ("all_branches", "baseline"))
    assert float(work) == pytest.approx(of_baseline / of_all, abs=0.005)
    for column, cell in zip(("mean", "highest", "ensemble", "baseline"), cells, strict=True):
        of = record[column]["values"]
        expected = "-" if not of else f"{fmean(of):.2f} ± {stdev(of):.2f}" if len(of) > 1 else f"{of[0]:.2f}"
        assert cell == expected + ("" if len(of) in (0, int(n)) else f" (n = {len(of)})")


def block(name: str) -> list[str]:
    """The lines of a table of the README that is written from the JSON files."""
    readme_text = (CHECKOUT / "README.md").read_text()
    return readme_text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0].splitlines()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def shown(values: list[Any]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.2f}" + (f" ± {stdev(known):.2f}" if len(known) > 1 else "")


@pytest.mark.parametrize("name", RECORDS)
def test_the_rows_beside_a_recipe_are_those_of_its_json(name: str) -> None:
    """As above, for each control: accuracies, error of calibration, multiply-adds and bytes, in their columns."""
    record, lines = RECORDS[name], block("variants")
    head, _, *rest = lines[lines.index(f"**{record['title']}**") + 2 :]
    of_lines = [dict(zip(cells(head), cells(line), strict=True)) for line in takewhile(bool, rest)]
    found = {told["row"].strip("`"): told for told in of_lines if told["row"]}
    assert found.keys() == {"recipe", *record["variants"]}
    for key, row in {"recipe": record, **record["variants"]}.items():
        told = found[key]
        part, reader = ("all_branches", "branch") if "ensemble" in row else ("baseline", "baseline")
        assert told["multiply-adds of all"] == f"{row['costs'][part]['multiply_adds']:,}"
        assert told["training bytes a branch and epoch"] == f"{row['costs'][reader]['bytes_read_epoch']:,}"
        columns = (
            {"Mean": "mean", "Highest": "highest", "Ens.": "ensemble"} if "ensemble" in row else {"Ens.": "baseline"}
        )
        for column, name_in_json in columns.items():
            assert told[column].partition(" (n")[0] == shown(row[name_in_json]["values"])
        if "ensemble" in row:
            assert told["ECE"] == f"{fmean(v for v in row['ece']['values'] if v is not None):.4f}"
            simplex = row["weightings"]["simplex"]["accuracy"]["values"]
            assert told["Ens., simplex"].partition(" (n")[0] == shown(simplex)


@pytest.mark.parametrize("name", RECORDS)
def test_weightings_and_lost_branches_are_those_of_the_json(name: str) -> None:
    record = RECORDS[name]
    head, _, *lines = block("weightings")
    for weighting, *accuracies in (cells(line) for line in lines if line):
        told = accuracies[cells(head).index(record["title"]) - 1]
        values = record["weightings"][weighting]["accuracy"]["values"]
        assert told == ("" if None in values else shown(values))
    found = [cells(line) for line in block("lost") if line]
    begin = [row[0] for row in found].index(record["title"])
    rows = [found[begin], *takewhile(lambda row: not row[0], found[begin + 1 :])]
    of_one = [fmean(row["accuracy"]["values"]) for row in record["lost"]["leave_one_out"].values()]
    assert [row[1:3] for row in rows[:2]] == [
        ["none", shown(record["ensemble"]["values"])], ["any one", f"{min(of_one):.2f} to {max(of_one):.2f}"]
    ]  # fmt: skip
    for _, lost, accuracy, ece in rows[2:]:
        left = record["lost"]["worst"][lost.split()[1]]
        assert (accuracy, ece) == (shown(left["accuracy"]["values"]), f"{fmean(left['ece']['values']):.4f}")


def test_the_standard_error_is_that_of_a_binomial() -> None:
    assert readme.standard_error(90.0, 400) == pytest.approx(
        100 * (torch.distributions.Binomial(400, torch.tensor(0.9)).stddev / 400).item()
    )


def in_precision(*precisions: str) -> dict[str, Any]:
    """A row of the digits with a seed in each."""
    row = pick(without(RECORDS["digits"], (*DERIVED, *SHARED, "seeds")), 0)
    shared = {key: RECORDS["digits"][key] for key in SHARED}
    return combine({seed: row | shared | {"precision": name} for seed, name in enumerate(precisions)})


@pytest.mark.parametrize(
    ("recipe", "other", "told"),
    [
        (["bf16-mixed"], ["bf16-mixed"], "A"),
        (["bf16-mixed"], ["32-true"], "A, 32-true"),
        (["bf16-mixed", "32-true"], ["32-true"], "A, 32-true"),
        (["bf16-mixed"], ["bf16-mixed", "32-true", "32-true"], "A, bf16-mixed (1), 32-true (2)"),
        (["bf16-mixed", "32-true"], ["bf16-mixed", "32-true"], "A, bf16-mixed (1), 32-true (1)"),
    ],
)
def test_a_row_in_another_precision_says_so(recipe: list[str], other: list[str], told: str) -> None:
    variants = {"a": {"title": "A"} | in_precision(*other)}
    said = readme.variants({"digits": RECORDS["digits"] | in_precision(*recipe) | {"variants": variants}})
    assert f"| {told} | `a` | {len(other)} |" in said


def test_controls_are_told_with_one_number_a_branch_and_the_recipe_among_them() -> None:
    """Of the column `simplex`, by how many seeds had it; of a variant that is the recipe in fewer epochs, its name."""
    row = pick(without(RECORDS["digits"], (*DERIVED, *SHARED, "seeds")), 0)
    row |= {key: RECORDS["digits"][key] for key in SHARED} | {"precision": "32-true"}
    without_weightings = without(row, ("weightings",))
    row["weightings"]["simplex"]["accuracy"] = 43.21
    variants = {"identity": {"title": "A"} | combine({0: row, 1: without_weightings, 2: row})}
    variants["reads-1"] = {"title": "1 slice a branch"} | combine({0: row})
    variants["reads-2"] = {"title": "2 slices a branch"} | combine({0: row | {"weightings": {}}})
    said = readme.variants({"digits": RECORDS["digits"] | {"variants": variants}})
    assert "| 43.21 ± 0.00 (n = 2) |" in said
    assert "| the recipe in fewer epochs: 1 slice a branch | `reads-1` | 1 |" in said
    assert "| 2 slices a branch | `reads-2` | 1 |" in said


def test_seeds_of_two_precisions_are_not_compared() -> None:
    found = {"baseline": spread([1.0, 1.0]), "precision": spread(["32-true", "32-true"]), "elapsed_s": spread([9.0])}
    found |= {"machine": spread(["here"])}
    record = RECORDS["digits"] | in_precision("bf16-mixed", "32-true") | {"goal": 97.0}
    record["variants"] = {"baseline": found | {"seeds": [0, 1]}}
    lead = record["ensemble"]["values"][1] - 1.0
    assert readme.goal(record).endswith(f"(+{lead:.2f})")
    assert "| bf16-mixed (1), 32-true (1); the baseline 32-true |" in readme.results({"digits": record})
    record["variants"] = {"baseline": found | {"seeds": [0, 7]}}
    assert "baseline" not in readme.goal(record)


@pytest.mark.parametrize("column", ["precision", "chosen", "weight_bytes"])
def test_rows_of_an_older_version_are_refused_before_any_training(column: str, tmp_path: Path) -> None:
    planned, file = _planned(), tmp_path / "digits.json"
    _keep(file, "recipe", 0, 90.0)
    record = json.loads(file.read_text())
    del record[column]
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="recipe, seed 0: other columns, of an older version"):
        check_rows(file, planned, replace=False)


READS = Experiment("Somewhere", "digits", "configs/digits.yaml", 1, variants=reads(1, 1, 4))


SHORT = Experiment(
    "Somewhere",
    "digits",
    "configs/digits.yaml",
    1,
    variants=reads(1, 1, 2, note=", 7 epochs") | aligned(1, 2, 1, 4) | shorter(1, (), ""),
)


def test_the_curve_is_of_trainings_of_one_length() -> None:
    """The recipe and its baseline are in it unless a variant, and so a shorter training, has its number of slices."""
    record: dict[str, Any] = {"slices_per_branch": 2, "name": "recipe", "variants": {"reads-4": {"name": "4"}}}
    record["variants"] |= {"baseline": {"baseline": "long"}, "random": {}}
    assert {r: row["name"] for r, row in curve.points(record, READS).items()} == {2: "recipe", 4: "4"}
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {4: "4"}
    assert curve.conventional(record, READS) == "long"
    assert curve.conventional(record, SHORT) == {"n": 0}
    record["variants"] |= {
        "aligned-1": {"name": "own"},
        "reads-2": {"name": "2"},
        "baseline-short": {"baseline": "short"},
    }
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {2: "2", 4: "4"}
    assert curve.conventional(record, SHORT) == "short"
    record["variants"] |= {"aligned-4": {"name": "few bytes"}}
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {1: "own", 4: "few bytes"}
    record["variants"] |= {"reads-1": {"name": "1"}, "reads-3": {"name": "3"}}
    assert {r: row["name"] for r, row in curve.points(record, SHORT).items()} == {1: "1", 2: "2", 3: "3", 4: "4"}


def test_the_curve_is_drawn_from_the_json(tmp_path: Path) -> None:
    row = {name: spread([90.0 + i]) for i, name in enumerate(("mean", "highest", "ensemble"))}
    row["costs"] = {"branch": {"bytes_read_epoch": 2e6}, "all_branches": {"multiply_adds": 3_000_000}}
    record = {"title": "Somewhere", "slices_per_branch": 1, **row, "variants": {}}
    curve.draw(record, SHORT, tmp_path / "new" / "slices")
    assert not list(tmp_path.iterdir())  # of one point there is no curve
    more = {name: spread([95.0 + i, 96.0 + i]) for i, name in enumerate(("mean", "highest", "ensemble"))}
    record["variants"] = {"reads-1": row, "reads-2": row | more, "baseline-short": {"baseline": spread([93.0])}}
    curve.draw(record, SHORT, tmp_path / "new" / "slices")
    assert {path.suffix for path in (tmp_path / "new").iterdir()} == {".png", ".svg"}
    assert "Somewhere, 7 epochs" in (tmp_path / "new" / "slices.svg").read_text()
    figure = curve.make(record, SHORT)
    assert figure is not None
    (axis,) = figure.axes
    errors = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    bars = {bar.get_label(): list(bar.lines[0].get_ydata()) for bar in axis.containers}
    assert bars == {"mean branch": [10, 4.5], "highest branch": [9, 3.5], "ensemble": [8, 2.5]}
    assert errors["conventional network"] == [7, 7]
    assert [label.get_text() for label in axis.get_xticklabels()] == [f"{r}\n2 MB\n3.0 M" for r in (1, 2)]
    record["variants"] |= {"aligned-1": row, "aligned-4": row | more}
    figure = curve.make(record, SHORT)
    assert figure is not None
    assert figure.axes[0].get_title(loc="left") == "Somewhere, crops by whole blocks"


def test_the_seeds_of_a_row_are_counted_where_they_differ() -> None:
    record = RECORDS["digits"] | {"goal": 97.0, "baseline": spread([95.0])}
    assert "| 3 | " in readme.results({"digits": record})
    assert "| 95.00 (n = 1) |" in readme.results({"digits": record})
    ours = dict(zip(record["seeds"], record["ensemble"]["values"], strict=True))
    found = {"precision": spread(["32-true"]), "machine": spread(["here"])}
    record["variants"] = {"baseline": found | {"seeds": [2], "baseline": spread([ours[2] - 1])}}
    assert readme.goal(record) == "97.0: met; above the baseline of equal multiply-adds: met (+1.00)"
    record["variants"] = {"baseline": found | {"seeds": [7], "baseline": spread([99.0])}}
    assert readme.goal(record) == "97.0: met"
    found["elapsed_s"] = spread([9.0])
    for seeds, told in (([0, 1, 2], "| 99.00 ± 1.00 |"), ([0, 1, 7], "| 99.00 ± 1.00 (seeds 0, 1, 7) |")):
        of_baseline = spread([98.0, 99.0, 100.0])
        variants = {"baseline": found | in_precision(*["32-true"] * 3) | {"seeds": seeds, "baseline": of_baseline}}
        assert told in readme.results({"digits": record | {"baseline": of_baseline, "variants": variants}})


def test_seeds_of_several_calls_come_together(tmp_path: Path) -> None:
    file = tmp_path / "new" / "digits.json"
    rows = (("identity", 1, 6.0), ("recipe", 1, 20.0), ("recipe", 0, 10.0), ("baseline", 1, 7.0), ("recipe", 1, 30.0))
    for key, seed, value in rows:
        _keep(file, key, seed, value)
    record = json.loads(file.read_text())
    assert (record["seeds"], record["ensemble"]["mean"], record["ensemble"]["values"]) == ([0, 1], 20.0, [10.0, 30.0])
    assert record["variants"]["identity"]["ensemble"]["values"] == [6.0]
    assert record["baseline"] == record["variants"]["baseline"]["baseline"] == spread([7.0])


def test_rows_that_are_added_at_once_are_all_kept(tmp_path: Path) -> None:
    """By threads, which the lock of a file keeps apart as it does processes."""
    file, seeds = tmp_path / "digits.json", range(24)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_keep, repeat(file), repeat("recipe"), seeds, map(float, seeds)))
    assert json.loads(file.read_text())["ensemble"]["values"] == [float(seed) for seed in seeds]


def test_what_was_trained_otherwise_is_named_and_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "digits.json"
    _keep(file, "recipe", 0, 10.0)
    assert read_rows(file, _planned()) == ({"recipe": {0: _row(_planned()["recipe"][0], 10.0)}}, [])
    before, other = file.read_bytes(), _planned("--trainer.max_epochs=1")
    training = other["recipe"][1]
    with pytest.raises(SystemExit, match="recipe, seed 0: other settings\nexpected --out"):
        keep(file, training, _row(training, 1.0), other)
    assert file.read_bytes() == before
    check_rows(file, other, replace=True)
    keep(file, training, _row(training, 1.0), other, replace=True)
    assert capsys.readouterr().err == f"{file} drops recipe, seed 0: other settings\n"
    assert json.loads(file.read_text())["seeds"] == [1]


def test_a_row_that_no_experiment_has_is_named(tmp_path: Path) -> None:
    file = tmp_path / "digits.json"
    _keep(file, "identity", 0, 10.0)
    fewer = {key: runs for key, runs in _planned().items() if key != "identity"}
    assert read_rows(file, fewer) == ({"recipe": {}}, ["identity: no row of the experiment any more"])


def _planned(*settings: str) -> Planned:
    return trainings("digits", EXPERIMENTS["digits"], Path("/nowhere"), range(24), settings)


def _row(training: Training, value: float) -> dict[str, Any]:
    accuracy = {"baseline": value} if training.only_baseline else {"ensemble": value, "chosen": "uniform on prob"}
    return {"trained": training.trained(), "precision": "32-true", "weight_bytes": {"baseline": 4}, **accuracy}


def _keep(file: Path, key: str, seed: int, value: float) -> None:
    planned = _planned()
    keep(file, planned[key][seed], _row(planned[key][seed], value), planned)
