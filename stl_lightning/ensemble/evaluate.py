"""From trained branches to the row of the table: fit the weights on validation logits, score the test set once."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from stl_lightning.ensemble import metrics
from stl_lightning.ensemble.fit import FittedEnsemble, search
from stl_lightning.ensemble.members import Outputs, branch_outputs, scores
from stl_lightning.ensemble.model import save_fitted
from stl_lightning.ensemble.options import EnsembleOptions
from stl_lightning.ensemble.tables import by_members_rows, lost_rows, weighting_rows
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
    The rows of `weightings` are those that were tried: all with `auto`, otherwise the one that was asked for.
    Raises: RunError if no branch can be combined.
    """
    usable, left_out = _finished(jobs, options.flips)
    if not usable:
        reasons = "; ".join(f"branch {branch}: {reason}" for branch, reason in left_out.items()) or "none has begun"
        cure = f"`stl status {shlex.quote(str(run.paths.folder))}` says what they are doing"
        raise RunError(f"{run.paths.folder}: no branch can be combined ({reasons}). {cure}")
    members = [job for job, _, _ in usable]
    present = [job.branch for job in members]
    val, test = _stack([outputs for _, outputs, _ in usable]), _stack([outputs for _, _, outputs in usable])
    found = search(
        val.logits, val.labels, present, options.weighting, options.space, options.n_folds, run.settings["seed"]
    )
    fitted = found.of_each_weighting()
    ensemble = replace(fitted[found.chosen[0]], flips=options.flips)
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
        "baseline": _baseline_row(baseline, options.flips) if baseline else None,
        "weighting": ensemble.weighting,
        "space": ensemble.space,
        "temperature": ensemble.temperature,
        "flips": options.flips,
        "cross_validation": ensemble.cv,
        "disagreement": metrics.disagreement(test.logits).tolist(),
        "traffic": total_bytes([_status(job).traffic.get("windows", {}) for job in members]),
        "branches": rows,
        "weightings": weighting_rows(fitted.values(), val, test),
        "lost": lost_rows(ensemble, test),
        "by_members": by_members_rows(ensemble, val, test),
    }
    save_fitted(ensemble, run.paths.fitted)
    write_json(run.paths.results, results)
    return results


def _status(job: BranchJob) -> Status:
    return read_status(job.paths, job.branch)


def _finished(
    jobs: Sequence[BranchJob], flips: bool
) -> tuple[list[tuple[BranchJob, Outputs, Outputs]], dict[int, str]]:
    """The finished branches with their validation and test outputs, and why each of the others is left out."""
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
            usable.append((job, branch_outputs(job, "val", flips), branch_outputs(job, "test", flips)))
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
        "frequency": list(job.data.spectral.frequencies[job.data.reads[0][0]]),
        "n_parameters": _n_parameters(job),
        "val": scores(Outputs(val.logits[i], val.labels)),
        "test": scores(Outputs(test.logits[i], test.labels)),
        "weight": ensemble.member_weights()[i],
    }


def _baseline_row(job: BranchJob, flips: bool) -> dict[str, Any]:
    usable, left_out = _finished([job], flips)
    if not usable:
        return {"left_out": left_out[job.branch]}
    ((_, _, test),) = usable
    return scores(test) | {"n_parameters": _n_parameters(job)}


def _n_parameters(job: BranchJob) -> int:
    return sum(parameter.numel() for parameter in job.built_module().parameters())
