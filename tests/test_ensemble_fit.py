"""The fit as a whole: what `auto` chooses, what is refused, and what is left when members are lost."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from stl_lightning.ensemble.fit import FittedEnsemble, fit_ensemble, refit, search
from stl_lightning.ensemble.metrics import nll
from stl_lightning.ensemble.pooling import SPACES, calibrated_nll, fit_temperature, pool
from stl_lightning.ensemble.weighting import WEIGHTINGS
from stl_lightning.errors import ConfigError, DataError

MEMBERS = (7, 2, 5, 11)


def outputs(n: int = 300, skill: tuple[float, ...] = (0.3, 1, 2, 3), seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=g)
    noise = torch.randn(len(skill), n, 3, generator=g) + 0.5 * torch.randn(n, 3, generator=g)
    return torch.tensor(skill)[:, None, None] * torch.nn.functional.one_hot(labels, 3) + noise, labels


def fit(weighting: str = "simplex", space: str = "log_prob", n_folds: int = 2) -> FittedEnsemble:
    return fit_ensemble(*outputs(), MEMBERS, weighting, space, n_folds)


fitted = cache(fit)


class TestAuto:
    @pytest.mark.parametrize("skill", [(0.3, 1, 2, 3), (1, 1, 1, 1)])
    def test_does_not_lose_to_uniform_on_held_out_data(self, skill: tuple[float, ...]) -> None:
        logits, labels = outputs(3200, skill)
        few, rest = logits[:, :200], logits[:, 200:]
        chosen, uniform = (
            nll(fit_ensemble(few, labels[:200], MEMBERS, name, n_folds=3).log_probs(rest), labels[200:])
            for name in ("auto", "uniform")
        )
        assert chosen < uniform + 0.01
        assert chosen < uniform - 0.03 or skill == (1, 1, 1, 1)

    def test_prefers_the_first_row_among_equals(self) -> None:
        logits, labels = outputs()
        copies = logits[3:].expand(4, -1, -1)
        chosen = fit_ensemble(copies, labels, MEMBERS, n_folds=2)
        assert (chosen.weighting, chosen.space) == ("uniform", "log_prob")

    def test_prefers_the_first_row_within_one_standard_error(self) -> None:
        chosen = fit_ensemble(*outputs(skill=(1, 1, 1, 1), seed=3), MEMBERS, n_folds=2)
        assert min(chosen.cv, key=lambda score: score["nll"]) != chosen.cv[0]
        assert (chosen.weighting, chosen.space) == ("uniform", "log_prob")

    def test_scores_every_row_in_the_order_of_the_table(self) -> None:
        tried = [score["weighting"] for score in fitted("auto", "log_prob").cv]
        assert tried == list(WEIGHTINGS)

    @pytest.mark.parametrize("space", SPACES)
    def test_searches_only_what_is_open(self, space: str) -> None:
        assert {score["space"] for score in fitted("auto", space).cv} == {space}
        assert {score["weighting"] for score in fitted("topk", "auto").cv} == {"topk"}

    def test_leaves_weightings_alone_that_are_too_large(self) -> None:
        g = torch.Generator().manual_seed(0)
        logits, labels = torch.randn(2, 40, 400, generator=g), torch.randint(0, 400, (40,), generator=g)
        tried = {score["weighting"] for score in fit_ensemble(logits, labels, (0, 1), n_folds=2).cv}
        assert tried == set(WEIGHTINGS) - {"stacking"}

    def test_a_hopeless_candidate_is_given_up_and_says_so(self) -> None:
        logits, labels = outputs(600, skill=(-2, -2, -2, 6))
        tried = fit_ensemble(logits, labels, MEMBERS, space="log_prob", n_folds=3).cv
        scores = {score["weighting"]: score["n_samples"] for score in tried}
        assert (scores["uniform"], scores["simplex"]) == (200, 600)

    def test_a_search_also_fits_what_it_does_not_choose(self) -> None:
        found = search(*outputs(600, skill=(-2, -2, -2, 6)), MEMBERS, n_folds=3)
        every = found.of_each_weighting()
        assert list(every) == list(WEIGHTINGS)
        assert (every[found.chosen[0]].weighting, every[found.chosen[0]].space) == found.chosen
        tried = {(score["weighting"], score["space"]): score for score in found.fitted().cv}
        for name, ensemble in every.items():
            taken, *others = sorted(
                (score for (weighting, _), score in tried.items() if weighting == name),
                key=lambda score: score["space"] != ensemble.space,
            )
            best = all((other["n_samples"], -other["nll"]) <= (taken["n_samples"], -taken["nll"]) for other in others)
            assert best or (name, ensemble.space) == found.chosen
            if taken["n_samples"] == 600:
                alone = fit_ensemble(found.logits, found.labels, MEMBERS, name, ensemble.space, n_folds=3)
                assert torch.equal(ensemble.weights, alone.weights)
                assert ensemble.temperature == alone.temperature

    def test_a_single_member_has_weight_one(self) -> None:
        logits, labels = outputs()
        alone = fit_ensemble(logits[3:, :, [1, 2, 0]], labels, (11,))  # maps would set its classes right
        assert [(score["weighting"], score["space"]) for score in alone.cv] == [("uniform", "log_prob")]
        assert (alone.weights.tolist(), alone.members) == ([1.0], (11,))


@pytest.mark.parametrize("name", WEIGHTINGS)
class TestEveryWeighting:
    def test_is_deterministic(self, name: str) -> None:
        first, second = fit(name), fitted(name)
        assert torch.equal(first.weights, second.weights)
        assert (first.temperature, first.cv) == (second.temperature, second.cv)

    def test_refitted_without_folds_it_has_the_same_weights(self, name: str) -> None:
        again = refit(*outputs(), MEMBERS, name, "log_prob")
        assert torch.equal(again.weights, fitted(name).weights)
        assert again.temperature == pytest.approx(fitted(name).temperature, rel=0.25)

    def test_scores_survive_json(self, name: str) -> None:
        (score,) = json.loads(json.dumps(fitted(name).cv))
        assert (score["weighting"], score["n_samples"]) == (name, 300)
        assert 0 < score["nll"] < 1.1
        assert 0.5 < score["accuracy"] < 1

    def test_a_subset_keeps_the_sum_of_the_weights(self, name: str) -> None:
        whole = fitted(name)
        part = whole.subset((11, 2))
        assert part.members == (2, 11)
        torch.testing.assert_close(part.weights.sum(0), whole.weights.sum(0))
        assert part.log_probs(outputs()[0][[1, 3]]).isfinite().all()

    def test_the_subset_of_all_is_the_ensemble(self, name: str) -> None:
        whole = fitted(name)
        torch.testing.assert_close(whole.subset(MEMBERS).weights, whole.weights)

    def test_a_subset_of_identical_members_predicts_the_same(self, name: str) -> None:
        logits, labels = outputs()
        copies = logits[3:].expand(4, -1, -1)
        whole = fit_ensemble(copies, labels, MEMBERS, name, "log_prob", n_folds=2)
        torch.testing.assert_close(whole.subset((5, 7)).log_probs(copies[:2]), whole.log_probs(copies))

    def test_one_number_a_member_for_tables(self, name: str) -> None:
        numbers = fitted(name).member_weights()
        assert len(numbers) == 4
        assert numbers[3] == max(numbers)  # the most skilled


@pytest.mark.parametrize("space", ["log_prob", "prob"])
def test_scores_and_temperature_are_those_of_held_out_halves(space: str) -> None:
    logits, labels = outputs()
    logits = logits.double()
    ensemble = fit("simplex", space)
    halves = torch.randperm(300, generator=torch.Generator().manual_seed(0)).chunk(2)
    predictions = torch.empty(300, 3, dtype=torch.float64)
    for held, rest in (halves, halves[::-1]):
        weights = WEIGHTINGS["simplex"](logits[:, rest], labels[rest], space)
        predictions[held] = pool(logits[:, held], weights, space)
    assert ensemble.temperature == pytest.approx(fit_temperature(predictions, labels))
    assert ensemble.cv[0]["nll"] == pytest.approx(calibrated_nll(predictions, labels))
    assert torch.equal(ensemble.weights, WEIGHTINGS["simplex"](logits, labels, space))


def test_losing_all_weight_leaves_equal_shares() -> None:
    logits, labels = outputs(skill=(-3, -3, 1, 2))
    whole = fit_ensemble(logits, labels, MEMBERS, "simplex", "log_prob")
    assert whole.subset((7, 2)).weights.tolist() == [0.5, 0.5]


def test_the_temperature_calibrates_overconfident_members() -> None:
    logits, labels = outputs(4000)
    train, test = logits[:, :2000], logits[:, 2000:]
    fits = [fit_ensemble(scale * train, labels[:2000], MEMBERS, "uniform", "logits") for scale in (1, 5)]
    assert fits[1].temperature == pytest.approx(5 * fits[0].temperature, rel=1e-4)
    torch.testing.assert_close(fits[1].log_probs(5 * test), fits[0].log_probs(test), atol=1e-4, rtol=0)


def test_many_weights_on_few_samples_do_not_make_it_overconfident() -> None:
    logits, labels = outputs(2100, skill=(0.7,) * 12)
    train, test = logits[:, :100], logits[:, 100:]
    few = fit_ensemble(train, labels[:100], range(12), "stacking", "log_prob")
    flattered = fit_temperature(pool(train, few.weights, "log_prob"), labels[:100])
    overconfident = replace(few, temperature=flattered)
    assert flattered < few.temperature
    assert nll(few.log_probs(test), labels[100:]) < nll(overconfident.log_probs(test), labels[100:])


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weighting": "best"}, r"ensemble\.weighting: .*'best'.*auto.*simplex"),
            ({"space": "probs"}, r"ensemble\.space: .*'probs'.*log_prob"),
            ({"weighting": "stacking", "space": "prob"}, r"ensemble\.space: .*'stacking'.*log_prob.*'prob'"),
            ({"n_folds": 1}, r"ensemble\.n_folds: expected 2 to 300.*received 1"),
            ({"n_folds": 301}, r"ensemble\.n_folds: expected 2 to 300.*received 301"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            fit(**settings)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_member_that_is_not_finite_is_named(self, value: float) -> None:
        logits, labels = outputs()
        logits[2, 17, 1] = value
        with pytest.raises(DataError, match=r"member\(s\) \[5\]"):
            fit_ensemble(logits, labels, MEMBERS)

    @pytest.mark.parametrize("label", [-1, 3])
    def test_labels_out_of_range(self, label: int) -> None:
        logits, labels = outputs()
        labels[4] = label
        with pytest.raises(DataError, match=f"expected 0 to 2 .*received.* {label}|received {label} to"):
            fit_ensemble(logits, labels, MEMBERS)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x, y, m: (x[0], y, m), "expected floats"),
            (lambda x, y, m: (x.long(), y, m), "expected floats.*int64"),
            (lambda x, y, m: (x, y[1:], m), r"\(4, 299\).*\(4, 300, 3\)"),
            (lambda x, y, m: (x, y, m[1:]), r"\(3, 300\).*\(4, 300, 3\)"),
            (lambda x, y, m: (x, y, (1, 1, 2, 3)), "different numbers"),
            (lambda x, y, m: (x[:0], y, ()), "at least one"),
            (lambda x, y, m: (x, y.float(), m), "expected int64"),
        ],
    )
    def test_shapes_and_types(self, change: Callable[..., Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            fit_ensemble(*change(*outputs(), MEMBERS))

    def test_logits_of_other_members(self) -> None:
        with pytest.raises(DataError, match=r"\(7, 2, 5, 11\), received 3"):
            fitted().log_probs(outputs()[0][:3])

    @pytest.mark.parametrize("members", [(), (2, 3)])
    def test_a_subset_of_strangers(self, members: tuple[int, ...]) -> None:
        with pytest.raises(DataError, match="expected some of"):
            fitted().subset(members)


class TestManyValues:
    """A data set of many classes: bounded memory, same predictions."""

    def test_predictions_do_not_depend_on_the_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, _ = outputs()
        whole = fitted().log_probs(logits)
        monkeypatch.setattr("stl_lightning.ensemble.fit.MAX_VALUES", 100)
        torch.testing.assert_close(fitted().log_probs(logits), whole)

    def test_the_first_samples_are_fitted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        logits, labels = outputs()
        few = fit_ensemble(logits[:, :150], labels[:150], MEMBERS, "simplex", "log_prob", 2)
        monkeypatch.setattr("stl_lightning.ensemble.fit.MAX_VALUES", 150 * 4 * 3)
        assert torch.equal(fit_ensemble(logits, labels, MEMBERS, "simplex", "log_prob", 2).weights, few.weights)
