"""What else the outputs of the members tell: other weightings, fewer members, members that are lost.

Everything is fitted on validation outputs; the test set is only scored. Rows are plain enough for JSON.
Letters: b members, n samples, k classes.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from stl_lightning.ensemble.fit import FittedEnsemble, refit
from stl_lightning.ensemble.members import Outputs, scores
from stl_lightning.ensemble.weighting import WEIGHTINGS

Row = dict[str, Any]


def weighting_rows(ensembles: Iterable[FittedEnsemble], val: Outputs, test: Outputs) -> list[Row]:
    """The same members under each of these weightings, with outputs (b n k).

    The validation scores are those of the images that the weights were fitted to.
    """
    return [
        {
            "weighting": ensemble.weighting,
            "space": ensemble.space,
            "temperature": ensemble.temperature,
            "val": _scores(ensemble, val),
            "test": _scores(ensemble, test),
        }
        for ensemble in ensembles
    ]


def lost_rows(ensemble: FittedEnsemble, test: Outputs) -> dict[str, list[Row]]:
    """What is left when members are lost after the fit: each one alone, and the k that weigh most.

    The others share the weights of the lost, as `FittedEnsemble.subset` says.
    """
    members, weights = ensemble.members, ensemble.member_weights()
    heaviest = sorted(members, key=lambda member: -weights[members.index(member)])
    each = members if len(members) > 1 else ()
    return {
        "leave_one_out": [{"branch": member, "test": _without(ensemble, [member], test)} for member in each],
        "worst": [
            {"k": k, "branches": heaviest[:k], "test": _without(ensemble, heaviest[:k], test)}
            for k in range(1, len(members))
        ],
    }


def by_members_rows(ensemble: FittedEnsemble, val: Outputs, test: Outputs) -> list[Row]:
    """The n members of the highest validation accuracy (of equal ones the first), n = 1..b, fitted anew.

    By the weighting of the ensemble, if it gives one number a member; otherwise by `simplex`, which others are shrunk
    to, because affine maps for every n would take as long as all the rest. Each row says which.
    """
    weighting = ensemble.weighting if WEIGHTINGS[ensemble.weighting].axes == 1 else "simplex"
    of_each = [scores(Outputs(logits, val.labels))["accuracy"] for logits in val.logits]
    best_first = sorted(range(len(of_each)), key=lambda i: -of_each[i])
    rows = []
    for n in range(1, len(best_first) + 1):
        kept = sorted(best_first[:n])
        members = [ensemble.members[i] for i in kept]
        fitted = refit(val.logits[kept], val.labels, members, weighting, ensemble.space)
        row = {"n": n, "branches": members, "weighting": weighting, "space": ensemble.space}
        rows.append(row | {"test": _scores(fitted, Outputs(test.logits[kept], test.labels))})
    return rows


def _without(ensemble: FittedEnsemble, lost: Sequence[int], outputs: Outputs) -> dict[str, float]:
    kept = [i for i, member in enumerate(ensemble.members) if member not in lost]
    rest = ensemble.subset([ensemble.members[i] for i in kept])
    return _scores(rest, Outputs(outputs.logits[kept], outputs.labels))


def _scores(ensemble: FittedEnsemble, outputs: Outputs) -> dict[str, float]:
    return scores(Outputs(ensemble.log_probs(outputs.logits), outputs.labels))
