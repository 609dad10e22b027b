"""From branch checkpoints to results.json: caches, safety, and the ensemble as a module."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from test_training import make_job, train_branch

from stl_lightning.ensemble import metrics
from stl_lightning.ensemble.evaluate import evaluate
from stl_lightning.ensemble.members import branch_outputs
from stl_lightning.ensemble.model import build_ensemble, load_fitted
from stl_lightning.ensemble.options import EnsembleOptions
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


def test_test_labels_change_nothing_but_the_scores(jobs: list[BranchJob], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, temperature and the branch called highest are chosen without the test set."""
    run = jobs[0].run
    honest = evaluate(run, jobs, EnsembleOptions())

    def shuffled(job: BranchJob, split: str):
        outputs = branch_outputs(job, split)
        return type(outputs)(outputs.logits, outputs.labels.flip(0)) if split == "test" else outputs

    monkeypatch.setattr("stl_lightning.ensemble.evaluate.branch_outputs", shuffled)
    misled = evaluate(run, jobs, EnsembleOptions())
    for key in ("weighting", "space", "temperature", "highest_branch", "cross_validation"):
        assert honest[key] == misled[key]
    assert [row["weight"] for row in honest["branches"]] == [row["weight"] for row in misled["branches"]]
    assert honest["ensemble"]["accuracy"] > misled["ensemble"]["accuracy"] + 0.3


def test_no_branch_at_all(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="stl fit"):
        evaluate(make_job(tmp_path).run, [], EnsembleOptions())
