"""From trained branches to the row of the table: fit the weights on validation logits, score the test set once."""

from collections.abc import Sequence
from typing import Any

import torch

from stl_lightning.ensemble import metrics
from stl_lightning.ensemble.fit import FittedEnsemble, fit_ensemble
from stl_lightning.ensemble.members import Outputs, branch_outputs
from stl_lightning.ensemble.model import save_fitted
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.errors import CheckpointError, RunError
from stl_lightning.paths import write_json
from stl_lightning.run import Run
from stl_lightning.status import Status, read_status
from stl_lightning.traffic import total_bytes
from stl_lightning.training import BranchJob


def evaluate(
    run: Run, jobs: Sequence[BranchJob], options: EnsembleOptions, baseline: BranchJob | None = None
) -> dict[str, Any]:
    """Combine the branches that have finished; write `ensemble/results.json` and return what is in it.

    Weights, space and temperature are fitted on the validation split; "highest" is the branch that is best there.
    Raises: RunError if no branch can be combined.
    """
    usable, left_out = _finished(jobs)
    if not usable:
        reasons = "; ".join(left_out.values()) or "none has begun"
        raise RunError(f"{run.paths.folder}: no branch can be combined ({reasons}). Train them with `stl fit`")
    members = [job for job, _ in usable]
    present = [job.branch for job in members]
    val = _stack([outputs for _, outputs in usable])
    test = _stack([branch_outputs(job, "test") for job in members])
    ensemble = fit_ensemble(
        val.logits, val.labels, present, options.weighting, options.space, options.n_folds, run.settings["seed"]
    )
    rows = [_branch_row(job, val, test, i, ensemble) for i, job in enumerate(members)]
    highest = max(rows, key=lambda row: row["val"]["accuracy"])
    results = {
        "run": run.id,
        "settings": run.settings,
        "n_test": len(test.labels),
        "members": present,
        "missing": [branch for branch in range(run.settings["n_branches"]) if branch not in present],
        "left_out": left_out,
        "mean": sum(row["test"]["accuracy"] for row in rows) / len(rows),
        "highest": highest["test"]["accuracy"],
        "highest_branch": highest["branch"],
        "ensemble": scores(Outputs(ensemble.log_probs(test.logits), test.labels)),
        "ensemble_val": scores(Outputs(ensemble.log_probs(val.logits), val.labels)),
        "baseline": _baseline_row(baseline) if baseline else None,
        "weighting": ensemble.weighting,
        "space": ensemble.space,
        "temperature": ensemble.temperature,
        "cross_validation": ensemble.cv,
        "disagreement": metrics.disagreement(test.logits).tolist(),
        "traffic": total_bytes([_status(job).traffic.get("windows", {}) for job in members]),
        "branches": rows,
    }
    save_fitted(ensemble, run.paths.fitted)
    write_json(run.paths.results, results)
    return results


def scores(outputs: Outputs) -> dict[str, float]:
    """Every row of `METRICS`: accuracy and calibration error as shares, negative log-likelihood in nats."""
    log_probs = outputs.logits.log_softmax(-1)
    return {name: float(score(log_probs, outputs.labels)) for name, score in metrics.METRICS.items()}


def _status(job: BranchJob) -> Status:
    return read_status(job.paths, job.branch)


def _finished(jobs: Sequence[BranchJob]) -> tuple[list[tuple[BranchJob, Outputs]], dict[int, str]]:
    """The branches that have finished with their validation outputs, and why each of the others is left out."""
    usable, left_out = [], {}
    for job in jobs:
        status = _status(job)
        if status.state == "pending" and status.attempt:
            left_out[job.branch] = f"there is no checkpoint {job.paths.best}; train the branch with `stl fit`"
            continue
        if status.state != "finished":
            left_out[job.branch] = f"it has not finished: {status.state}, epoch {status.epoch}"
            continue
        try:
            usable.append((job, branch_outputs(job, "val")))
        except CheckpointError as error:
            left_out[job.branch] = str(error)
    return usable, left_out


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
        "slices": list(job.data.reads[0]),
        "frequency": list(job.data.spectral.frequencies[job.branch]),
        "n_parameters": _n_parameters(job),
        "val": scores(Outputs(val.logits[i], val.labels)),
        "test": scores(Outputs(test.logits[i], test.labels)),
        "weight": ensemble.member_weights()[i],
    }


def _baseline_row(job: BranchJob) -> dict[str, Any]:
    usable, left_out = _finished([job])
    if not usable:
        return {"left_out": left_out[job.branch]}
    return scores(branch_outputs(job, "test")) | {"n_parameters": _n_parameters(job)}


def _n_parameters(job: BranchJob) -> int:
    return sum(parameter.numel() for parameter in job.built_module().parameters())
