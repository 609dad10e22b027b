"""Pooling, temperature and the scores of predictions."""

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from stl_lightning.ensemble.metrics import METRICS, accuracy, brier, disagreement, ece, nll
from stl_lightning.ensemble.pooling import (
    SPACES,
    T_MAX,
    T_MIN,
    cautious_temperature,
    combine,
    fit_temperature,
    pool,
    temper,
)
from stl_lightning.errors import ConfigError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def drawn(probs: Tensor) -> Tensor:
    """Labels from probabilities, by a generator that shares nothing with `normal`."""
    return torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(99)).squeeze(-1)


def in_every_form(weights: Tensor, k: int) -> list[Tensor]:
    """One weight a member, written with one, two and three axes."""
    maps = weights[:, None, None] * torch.eye(k, k + 1, dtype=weights.dtype)
    return [weights, weights[:, None].expand(-1, k), maps]


WEIGHTS = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
class TestEverySpace:
    def test_identical_members_return_that_member(self, space: str) -> None:
        logits = 3 * normal(20, 4)
        for weights in in_every_form(WEIGHTS, 4):
            pooled = pool(logits.expand(3, 20, 4), weights, space)
            torch.testing.assert_close(pooled, logits.log_softmax(-1))

    def test_the_three_forms_of_weights_agree(self, space: str) -> None:
        pooled = [pool(normal(3, 20, 4), weights, space) for weights in in_every_form(WEIGHTS, 4)]
        torch.testing.assert_close(pooled[1], pooled[0])
        torch.testing.assert_close(pooled[2], pooled[0])

    def test_probabilities_sum_to_one(self, space: str) -> None:
        weights = normal(3, 4).abs()
        total = pool(normal(3, 20, 4), weights, space).exp().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total))

    def test_encoding_a_decoded_sum_is_stable(self, space: str) -> None:
        row = SPACES[space]
        once = row.decode(row.encode(normal(20, 4)))
        torch.testing.assert_close(once, normal(20, 4).log_softmax(-1))
        torch.testing.assert_close(row.decode(row.encode(once)), once)

    def test_half_precision_is_pooled_in_single(self, space: str) -> None:
        pooled = pool((20 * normal(3, 20, 4)).bfloat16(), WEIGHTS, space)
        assert pooled.dtype == torch.float32
        assert pooled.isfinite().all()


def test_an_unknown_space_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.space.*'loggits'.*log_prob, logits, prob"):
        pool(normal(3, 20, 4), WEIGHTS, "loggits")


def test_prob_is_the_arithmetic_and_log_prob_the_geometric_mean() -> None:
    logits = normal(3, 20, 4)
    probs = logits.softmax(-1)
    arithmetic = (WEIGHTS[:, None, None] * probs).sum(0)
    geometric = (probs ** WEIGHTS[:, None, None]).prod(0)
    torch.testing.assert_close(pool(logits, WEIGHTS, "prob").exp(), arithmetic)
    geometric = geometric / geometric.sum(-1, keepdim=True)
    torch.testing.assert_close(pool(logits, WEIGHTS, "log_prob").exp(), geometric)
    torch.testing.assert_close(pool(logits, WEIGHTS, "logits").exp(), geometric)


@pytest.mark.parametrize("n_axes", [1, 2, 3])
def test_log_prob_ignores_what_is_added_to_all_logits_of_a_sample(n_axes: int) -> None:
    logits, shift = normal(3, 20, 4), normal(3, 20, 1)
    weights = normal(*(3, 4, 5)[:n_axes])
    torch.testing.assert_close(pool(logits + shift, weights, "log_prob"), pool(logits, weights, "log_prob"))


def test_affine_maps_are_applied_member_by_member() -> None:
    outputs, maps = normal(3, 20, 4), normal(3, 4, 5, seed=1)
    ones = torch.ones(20, 1, dtype=torch.float64)
    expected = sum(torch.cat([x, ones], -1) @ m.T for x, m in zip(outputs, maps, strict=True))
    torch.testing.assert_close(combine(outputs, maps), expected)


class TestTemperature:
    @pytest.mark.parametrize("planted", [0.3, 1.0, 2.5])
    def test_a_planted_scaling_is_recovered(self, planted: float) -> None:
        logits = 3 * normal(20_000, 5)
        labels = drawn((logits / planted).softmax(-1))
        assert fit_temperature(logits.log_softmax(-1), labels) == pytest.approx(planted, rel=0.03)

    @pytest.mark.parametrize("scale", [0.05, 1.0, 40.0])
    def test_equals_scipy(self, scale: float) -> None:
        log_probs = (scale * normal(300, 5)).log_softmax(-1)
        labels = drawn((2 * log_probs / scale).softmax(-1))
        reference = minimize_scalar(
            lambda s: nll(temper(log_probs, 1 / s), labels).item(),
            bounds=(1e-2, 1e2),
            options={"xatol": 1e-9},
        )
        assert fit_temperature(log_probs, labels) == pytest.approx(1 / reference.x, rel=1e-4)

    def test_follows_the_scale_of_the_predictions(self) -> None:
        logits = normal(300, 5)
        labels = drawn(logits.softmax(-1))
        once = fit_temperature(logits.log_softmax(-1), labels)
        assert fit_temperature((3 * logits).log_softmax(-1), labels) == pytest.approx(3 * once, rel=1e-6)

    def test_stays_inside_its_limits(self) -> None:
        labels = torch.arange(30) % 3
        right = torch.nn.functional.one_hot(labels, 3).double()
        assert T_MIN <= fit_temperature(right.log_softmax(-1), labels) < 2 * T_MIN
        assert T_MAX / 2 < fit_temperature((-right).log_softmax(-1), labels) <= T_MAX

    def test_of_nothing_but_right_predictions_is_cautious(self) -> None:
        """The more samples, the surer; one error among them, and it is the temperature of the lowest NLL."""
        labels = torch.arange(300) % 3
        right = torch.nn.functional.one_hot(labels, 3).double().log_softmax(-1)
        few, many = (cautious_temperature(right[:n], labels[:n]) for n in (30, 300))
        assert 2 * T_MIN < many < few < 1
        # The optimum by hand: the mean probability of the label is 1 - smoothing * 2 / 3.
        assert temper(right, many)[0].exp()[labels[0]].item() == pytest.approx(1 - 2 / 3 / 301, abs=1e-6)
        labels[0] = 1
        assert cautious_temperature(right, labels) == fit_temperature(right, labels)

    def test_keeps_the_most_probable_class(self) -> None:
        log_probs = normal(50, 4).log_softmax(-1)
        assert torch.equal(temper(log_probs, 3.7).argmax(-1), log_probs.argmax(-1))


class TestMetrics:
    @pytest.mark.parametrize("seed", range(3))
    def test_ece_is_the_mean_gap_of_fifteen_bins(self, seed: int) -> None:
        log_probs = (3 * normal(500, 6, seed=seed)).log_softmax(-1)
        labels = drawn(log_probs.exp() ** 0.5)
        confidence, predicted = log_probs.exp().max(-1)
        gaps = []
        for low in range(15):
            inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
            if inside.any():
                gap = (predicted == labels)[inside].double().mean() - confidence[inside].mean()
                gaps.append(inside.double().mean() * gap.abs())
        torch.testing.assert_close(ece(log_probs, labels), sum(gaps))

    def test_ece_is_that_of_torchmetrics(self) -> None:
        from torchmetrics.functional.classification import multiclass_calibration_error

        log_probs = (3 * normal(500, 6)).log_softmax(-1).float()
        labels = drawn(log_probs.double().exp() ** 0.5)
        expected = multiclass_calibration_error(log_probs.exp(), labels, num_classes=6, n_bins=15, norm="l1")
        torch.testing.assert_close(ece(log_probs, labels), expected)

    def test_ece_keeps_the_last_bins_apart(self) -> None:
        confidence = torch.tensor([0.9, 0.9, 0.95, 0.95], dtype=torch.float64)
        log_probs = torch.stack([confidence, 1 - confidence], -1).log()
        labels = torch.tensor([0, 0, 0, 1])  # gaps 0.1 and -0.45
        assert ece(log_probs, labels).item() == pytest.approx(0.275)

    def test_a_calibrated_prediction_has_no_calibration_error(self) -> None:
        log_probs = (2 * normal(40_000, 5)).log_softmax(-1)
        labels = drawn(log_probs.exp())
        assert ece(log_probs, labels) < 0.01
        assert ece(temper(log_probs, 0.25), labels) > 0.1

    def test_certain_and_wrong_is_the_worst_of_every_score(self) -> None:
        labels = torch.tensor([0, 1, 2])
        right = torch.nn.functional.one_hot(labels, 3).double().mul(50).log_softmax(-1)
        wrong = right[[1, 2, 0]]
        scores = {name: (metric(right, labels), metric(wrong, labels)) for name, metric in METRICS.items()}
        expected = {"accuracy": (1, 0), "nll": (0, 50), "ece": (0, 1), "brier": (0, 2)}
        assert scores == {name: pytest.approx(pair, abs=1e-9) for name, pair in expected.items()}

    def test_against_plain_definitions(self) -> None:
        log_probs = normal(100, 4).log_softmax(-1)
        labels = drawn(log_probs.exp())
        one_hot = torch.nn.functional.one_hot(labels, 4)
        torch.testing.assert_close(brier(log_probs, labels), (log_probs.exp() - one_hot).square().sum(-1).mean())
        torch.testing.assert_close(nll(log_probs, labels), torch.nn.functional.nll_loss(log_probs, labels))
        hits = sum(int(row.argmax()) == int(label) for row, label in zip(log_probs, labels, strict=True))
        assert accuracy(log_probs, labels) == hits / 100

    def test_disagreement_counts_different_votes(self) -> None:
        votes = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1], [1, 2, 0, 2]])
        logits = torch.nn.functional.one_hot(votes, 3).float()
        expected = torch.tensor([[0, 0.25, 1], [0.25, 0, 1], [1, 1, 0]], dtype=torch.float64)
        assert torch.equal(disagreement(logits), expected)
