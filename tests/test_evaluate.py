"""From branch checkpoints to results.json: caches, safety, and the ensemble as a module."""

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from test_training import make_job, train_branch

from stl_lightning.ensemble import metrics
from stl_lightning.ensemble.evaluate import evaluate
from stl_lightning.ensemble.members import branch_outputs, scores
from stl_lightning.ensemble.model import build_ensemble, load_fitted
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.ensemble.weighting import WEIGHTINGS
from stl_lightning.errors import RunError
from stl_lightning.paths import BranchPaths, read_json, write_json
from stl_lightning.report.table import print_results
from stl_lightning.training import BranchJob


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[BranchJob]:
    root = tmp_path_factory.mktemp("run")
    jobs = [make_job(root, branch) for branch in range(4)]
    assert [train_branch(job) for job in jobs] == ["finished"] * 4
    return jobs


def test_logits_are_computed_once_and_again_when_the_weights_change(jobs: list[BranchJob]) -> None:
    job = jobs[0]
    cache = job.paths.logits("val")
    first = branch_outputs(job, "val")
    written = cache.stat().st_mtime_ns
    again = branch_outputs(job, "val")
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(first.logits, again.logits)

    original = job.paths.best.read_bytes()
    checkpoint = torch.load(job.paths.best, weights_only=True)
    for name in checkpoint["state_dict"]:
        if name.endswith("weight"):
            checkpoint["state_dict"][name] *= 0
    torch.save(checkpoint, job.paths.best)
    assert not torch.equal(branch_outputs(job, "val").logits, first.logits)
    job.paths.best.write_bytes(original)
    assert torch.equal(branch_outputs(job, "val").logits, first.logits)


def test_a_damaged_cache_is_computed_again(jobs: list[BranchJob]) -> None:
    expected = branch_outputs(jobs[1], "val").logits
    cache = jobs[1].paths.logits("val")
    cache.write_bytes(cache.read_bytes()[:50])
    assert torch.equal(branch_outputs(jobs[1], "val").logits, expected)


def test_evaluation_leaves_a_model_alone_that_was_built_from_the_same_jobs(jobs: list[BranchJob]) -> None:
    evaluate(jobs[0].run, jobs, EnsembleOptions("uniform", "log_prob"))
    model = build_ensemble(jobs, load_fitted(jobs[0].run.paths.fitted))
    images = jobs[0].data.source.load("test").pixels[:50]
    before = model(images)
    evaluate(jobs[0].run, jobs, EnsembleOptions("uniform", "log_prob"))
    assert torch.equal(model(images), before)


def nan_weights(paths: BranchPaths) -> None:
    checkpoint = torch.load(paths.best, weights_only=True)
    for name in checkpoint["state_dict"]:
        if name.startswith("network") and name.endswith("weight"):
            checkpoint["state_dict"][name] *= float("nan")
    torch.save(checkpoint, paths.best)


def unfinished(paths: BranchPaths) -> None:
    write_json(paths.status, read_json(paths.status) | {"state": "running", "epoch": 1})


LOSSES = {
    "deleted": (lambda paths: paths.best.unlink(), "no checkpoint"),
    "damaged": (lambda paths: paths.best.write_bytes(b"damaged"), "best.ckpt"),
    "not finite": (nan_weights, "not finite"),
    "unfinished": (unfinished, "it has not finished: running, epoch 1"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_member_that_is_lost_is_left_out_and_named(loss: str, jobs: list[BranchJob]) -> None:
    paths = jobs[2].paths
    kept = {path: path.read_bytes() for path in (paths.best, paths.status)}
    lose, reason = LOSSES[loss]
    lose(paths)
    try:
        results = evaluate(jobs[0].run, jobs, EnsembleOptions("simplex", "log_prob"))
    finally:
        for path, content in kept.items():
            path.write_bytes(content)
    assert results["members"] == [0, 1, 3]
    assert results["missing"] == [2]
    assert reason in results["left_out"][2]
    assert sum(row["weight"] for row in results["branches"]) == pytest.approx(1)


def test_a_baseline_that_has_not_finished_is_a_remark(jobs: list[BranchJob], tmp_path: Path) -> None:
    results = evaluate(jobs[0].run, jobs, EnsembleOptions("uniform", "prob"), baseline=make_job(tmp_path))
    assert "not finished" in results["baseline"]["left_out"]
    print_results(results)


def test_results_are_those_of_the_cached_logits(jobs: list[BranchJob]) -> None:
    """results.json is recomputed here from the logits on disk."""
    run = jobs[0].run
    evaluate(run, jobs, EnsembleOptions("simplex", "log_prob"))
    results = json.loads(run.paths.results.read_text())
    logits, accuracies = [], []
    for job in jobs:
        with safe_open(job.paths.logits("test"), framework="pt") as file:
            logits.append(file.get_tensor("logits"))
            labels = file.get_tensor("labels")
        accuracies.append((logits[-1].argmax(1) == labels).float().mean().item())
    weights = torch.tensor([row["weight"] for row in results["branches"]])
    pooled = torch.einsum("b,bnk->nk", weights.double(), torch.stack(logits).double().log_softmax(-1))
    assert results["mean"] == pytest.approx(sum(accuracies) / 4)
    assert results["ensemble"]["accuracy"] == pytest.approx((pooled.argmax(1) == labels).float().mean().item())
    log_probs = (pooled / results["temperature"]).log_softmax(1)
    assert results["ensemble"]["nll"] == pytest.approx(metrics.nll(log_probs, labels).item(), abs=1e-6)
    best_on_validation = max(results["branches"], key=lambda row: row["val"]["accuracy"])
    assert results["highest"] == best_on_validation["test"]["accuracy"]
    assert results["members"] == [0, 1, 2, 3]


@pytest.mark.parametrize("weighting", ["uniform", "per_class", "stacking"])
def test_the_ensemble_as_a_module_predicts_the_same(jobs: list[BranchJob], weighting: str) -> None:
    run = jobs[0].run
    evaluate(run, jobs, EnsembleOptions(weighting, "log_prob"))
    model = build_ensemble(jobs, load_fitted(run.paths.fitted))
    images = jobs[0].data.source.load("test")
    log_probs = model(images.pixels)
    results = json.loads(run.paths.results.read_text())
    assert metrics.nll(log_probs, images.labels).item() == pytest.approx(results["ensemble"]["nll"], abs=1e-4)
    assert metrics.accuracy(log_probs, images.labels).item() == pytest.approx(results["ensemble"]["accuracy"])
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(len(images), dtype=log_probs.dtype))


def accuracy_of(rows: list[dict]) -> list[float]:
    return [row["test"]["accuracy"] for row in rows]


def lost(results: dict) -> list[dict]:
    return results["lost"]["leave_one_out"] + results["lost"]["worst"]


def without_test(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "test"} for row in rows]


def test_every_weighting_that_was_tried_has_a_row(jobs: list[BranchJob]) -> None:
    results = evaluate(jobs[0].run, jobs, EnsembleOptions(n_folds=2))  # folds so large that none is given up
    rows = {row["weighting"]: row for row in results["weightings"]}
    assert list(rows) == list(WEIGHTINGS)
    chosen = rows[results["weighting"]]
    assert (chosen["test"], chosen["val"]) == (results["ensemble"], results["ensemble_val"])
    for name in ("uniform", "topk"):
        asked = evaluate(jobs[0].run, jobs, EnsembleOptions(name, rows[name]["space"], n_folds=2))
        assert asked["weightings"] == [rows[name]]


@pytest.mark.parametrize("space", ["log_prob", "prob"])
def test_lost_members_and_few_members(space: str, jobs: list[BranchJob]) -> None:
    """Equal weights: a mean over those that are left, recomputed here."""
    results = evaluate(jobs[0].run, jobs, EnsembleOptions("uniform", space))
    outputs = [branch_outputs(job, "test") for job in jobs]
    labels = outputs[0].labels

    def mean_of(members: list[int]) -> float:
        log_probs = torch.stack([outputs[i].logits.double().log_softmax(-1) for i in members])
        pooled = log_probs.mean(0) if space == "log_prob" else log_probs.exp().mean(0)
        return (pooled.argmax(1) == labels).double().mean().item()

    alone, worst = results["lost"]["leave_one_out"], results["lost"]["worst"]
    rest = [[i for i in range(4) if i != row["branch"]] for row in alone]
    assert [row["branch"] for row in alone] == [0, 1, 2, 3]
    assert accuracy_of(alone) == pytest.approx([mean_of(members) for members in rest])
    assert [(row["k"], row["branches"]) for row in worst] == [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])]  # a tie
    assert accuracy_of(worst) == pytest.approx([mean_of([1, 2, 3]), mean_of([2, 3]), mean_of([3])])
    few = results["by_members"]
    of_branches = {row["branch"]: row["val"]["accuracy"] for row in results["branches"]}
    ranked = sorted(of_branches, key=lambda branch: -of_branches[branch])
    assert results["highest_branch"] == ranked[0]
    assert [set(row["branches"]) for row in few] == [set(ranked[:n]) for n in range(1, 5)]
    assert {(row["weighting"], row["space"]) for row in few} == {("uniform", space)}
    assert accuracy_of(few) == pytest.approx([mean_of(ranked[:n]) for n in range(1, 5)])


def test_members_lost_by_weight_and_all_members(jobs: list[BranchJob], capfd: pytest.CaptureFixture[str]) -> None:
    results = evaluate(jobs[0].run, jobs, EnsembleOptions("simplex", "log_prob"))
    weights = {row["branch"]: row["weight"] for row in results["branches"]}
    heaviest = sorted(weights, key=lambda branch: -weights[branch])
    assert [row["branches"] for row in results["lost"]["worst"]] == [heaviest[:k] for k in (1, 2, 3)]
    last = results["by_members"][-1]
    assert last["test"]["accuracy"] == results["ensemble"]["accuracy"]
    print_results(results)
    assert "has several weights a branch" not in capfd.readouterr().out
    by_class = evaluate(jobs[0].run, jobs, EnsembleOptions("per_class"))
    assert by_class["by_members"][-1]["weighting"] == "simplex"
    print_results(by_class)
    assert "members: the n best are weighted by simplex; per_class has several" in capfd.readouterr().out


def test_one_member_has_nothing_to_lose(jobs: list[BranchJob], capfd: pytest.CaptureFixture[str]) -> None:
    results = evaluate(jobs[0].run, jobs[1:2], EnsembleOptions())
    assert results["lost"] == {"leave_one_out": [], "worst": []}
    assert [row["weighting"] for row in results["weightings"]] == ["uniform"]
    print_results(results)
    assert "heaviest" not in capfd.readouterr().out


def test_tables_are_printed_also_of_results_without_them(
    jobs: list[BranchJob], capfd: pytest.CaptureFixture[str]
) -> None:
    results = evaluate(jobs[0].run, jobs, EnsembleOptions(space="log_prob"))
    print_results(results, Console(width=80, file=sys.stdout))
    printed = capfd.readouterr().out
    assert "…" not in printed
    assert all(name in printed for name in WEIGHTINGS)
    assert printed.count(" * ") == 1
    for row in results["by_members"] + lost(results):
        assert f"{100 * row['test']['accuracy']:.2f}" in printed
    for key in ("weightings", "lost", "by_members", "flips"):
        del results[key]
    print_results(results)
    assert "heaviest" not in capfd.readouterr().out


def test_flips_are_means_of_logits_that_the_model_gives_too(jobs: list[BranchJob], tmp_path: Path) -> None:
    run = jobs[0].run
    evaluate(run, jobs, EnsembleOptions("uniform", "log_prob"))
    plain = build_ensemble(jobs, load_fitted(run.paths.fitted))
    images = jobs[0].data.source.load("test")
    results = evaluate(run, jobs, EnsembleOptions("uniform", "log_prob", flips=True))
    expected = (plain.member_logits(images.pixels) + plain.member_logits(images.pixels.flip(-1))) / 2
    received = torch.stack([branch_outputs(job, "test", flips=True).logits for job in jobs])
    torch.testing.assert_close(received, expected, atol=1e-4, rtol=1e-4)
    log_probs = build_ensemble(jobs, load_fitted(run.paths.fitted))(images.pixels)
    assert metrics.nll(log_probs, images.labels).item() == pytest.approx(results["ensemble"]["nll"], abs=1e-4)
    assert results["flips"]
    assert results["branches"][0]["val"] == scores(branch_outputs(jobs[0], "val", flips=True))


def test_the_cache_knows_flips(jobs: list[BranchJob]) -> None:
    cache = jobs[0].paths.logits("val")
    plain, flipped = (branch_outputs(jobs[0], "val", flips) for flips in (False, True))
    assert not torch.equal(plain.logits, flipped.logits)
    written = cache.stat().st_mtime_ns
    assert torch.equal(branch_outputs(jobs[0], "val", flips=True).logits, flipped.logits)
    assert cache.stat().st_mtime_ns == written
    assert torch.equal(branch_outputs(jobs[0], "val").logits, plain.logits)


def test_test_labels_change_nothing_but_the_scores(jobs: list[BranchJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, temperature and the branch called highest are chosen without the test set."""
    run = jobs[0].run
    honest = evaluate(run, jobs, EnsembleOptions())

    def shuffled(job: BranchJob, split: str, flips: bool):
        outputs = branch_outputs(job, split, flips)
        return type(outputs)(outputs.logits, outputs.labels.flip(0)) if split == "test" else outputs

    monkeypatch.setattr("stl_lightning.ensemble.evaluate.branch_outputs", shuffled)
    misled = evaluate(run, jobs, EnsembleOptions())
    for key in ("weighting", "space", "temperature", "highest_branch", "cross_validation"):
        assert honest[key] == misled[key]
    assert [row["weight"] for row in honest["branches"]] == [row["weight"] for row in misled["branches"]]
    for table in (lambda results: results["weightings"], lambda results: results["by_members"], lost):
        assert without_test(table(honest)) == without_test(table(misled))
        assert table(honest) != table(misled)
    assert honest["ensemble"]["accuracy"] > misled["ensemble"]["accuracy"] + 0.3


def test_branches_that_have_not_finished_are_named(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    with pytest.raises(RunError, match=r"\(branch 0: .*`stl status .*` says what they are doing"):
        evaluate(job.run, [job], EnsembleOptions())


def test_no_branch_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none has begun"):
        evaluate(make_job(tmp_path).run, [], EnsembleOptions())
