"""From trained branches to the row of the table: fit the weights on validation logits, score the test set once."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stl_lightning.ensemble import metrics
from stl_lightning.ensemble.fit import FittedEnsemble, fit_ensemble
from stl_lightning.ensemble.members import Outputs, branch_outputs
from stl_lightning.ensemble.model import save_fitted
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.errors import CheckpointError, RunError
from stl_lightning.paths import write_json
from stl_lightning.run import Run
from stl_lightning.training import BranchJob


@dataclass(frozen=True)
class Evaluation:
    """What `results.json` holds, and the fitted ensemble it describes."""

    results: dict[str, Any]
    ensemble: FittedEnsemble


def evaluate(
    run: Run, jobs: Sequence[BranchJob], options: EnsembleOptions, baseline: BranchJob | None = None
) -> Evaluation:
    """Combine the branches that can be read; write `ensemble/results.json`.

    Weights, space and temperature are fitted on the validation split; "highest" is the branch that is best there.
    Raises: RunError if no branch can be read.
    """
    members, unreadable = _readable(jobs)
    n_branches = run.settings["n_branches"]
    present = [job.branch for job in members]
    missing = [branch for branch in range(n_branches) if branch not in present]
    if not members:
        reasons = "; ".join(unreadable.values()) or "none has finished"
        raise RunError(f"{run.paths.folder}: no branch can be combined ({reasons}). Train them with `stl fit`")
    val, test = (_stack([branch_outputs(job, split) for job in members]) for split in ("val", "test"))
    ensemble = fit_ensemble(
        val.logits, val.labels, tuple(present), options.weighting, options.space, options.n_folds, run.settings["seed"]
    )
    rows = [_branch_row(job, val, test, i, ensemble) for i, job in enumerate(members)]
    highest = max(rows, key=lambda row: row["val"]["accuracy"])
    results = {
        "run": run.id,
        "settings": run.settings,
        "n_test": len(test.labels),
        "members": present,
        "missing": missing,
        "unreadable": unreadable,
        "mean": _mean([row["test"]["accuracy"] for row in rows]),
        "highest": highest["test"]["accuracy"],
        "highest_branch": highest["branch"],
        "ensemble": scores(ensemble.log_probs(test.logits), test.labels),
        "ensemble_val": scores(ensemble.log_probs(val.logits), val.labels),
        "baseline": _baseline_row(baseline) if baseline else None,
        "weighting": ensemble.weighting,
        "space": ensemble.space,
        "temperature": ensemble.temperature,
        "cross_validation": ensemble.cv,
        "disagreement": metrics.disagreement(test.logits).tolist(),
        "branches": rows,
    }
    save_fitted(ensemble, run.paths.fitted)
    write_json(run.paths.results, results)
    return Evaluation(results, ensemble)


def scores(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy and expected calibration error as shares, negative log-likelihood in nats, Brier score."""
    named = (metrics.accuracy, metrics.nll, metrics.ece, metrics.brier)
    return {score.__name__: float(score(log_probs, labels)) for score in named}


def _readable(jobs: Sequence[BranchJob]) -> tuple[list[BranchJob], dict[int, str]]:
    members, unreadable = [], {}
    for job in jobs:
        try:
            branch_outputs(job, "val")
        except CheckpointError as error:
            unreadable[job.branch] = str(error)
        else:
            members.append(job)
    return members, unreadable


def _stack(outputs: Sequence[Outputs]) -> Outputs:
    """Logits (b n k) of members on the same images."""
    labels = outputs[0].labels
    for member in outputs[1:]:
        if not torch.equal(member.labels, labels):
            raise RunError("the branches' logits are of different images; delete the folders branches/*/logits")
    return Outputs(torch.stack([member.logits for member in outputs]), labels)


def _branch_row(job: BranchJob, val: Outputs, test: Outputs, i: int, ensemble: FittedEnsemble) -> dict[str, Any]:
    return {
        "branch": job.branch,
        "slices": list(job.data.slices),
        "frequency": list(job.data.spectral.frequencies[job.branch]),
        "n_parameters": _n_parameters(job),
        "val": scores(val.logits[i].log_softmax(1), val.labels),
        "test": scores(test.logits[i].log_softmax(1), test.labels),
        "weight": ensemble.member_weights()[i],
    }


def _baseline_row(job: BranchJob) -> dict[str, Any]:
    outputs = branch_outputs(job, "test")
    return scores(outputs.logits.log_softmax(1), outputs.labels) | {"n_parameters": _n_parameters(job)}


def _n_parameters(job: BranchJob) -> int:
    network = job.module.build(job.data.in_shape, job.data.n_classes, job.data.seed, job.branch)
    return sum(parameter.numel() for parameter in network.parameters())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
