"""Every row of WEIGHTINGS, and the convex problems behind the last of them."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from stl_lightning.ensemble.metrics import accuracy, nll
from stl_lightning.ensemble.pooling import SPACES, calibrated_nll, pool
from stl_lightning.ensemble.ridge import AFFINE_MAPS, CLASS_WEIGHTS, Family, Shrinkage
from stl_lightning.ensemble.simplex import optimality_gap, pooled_nll
from stl_lightning.ensemble.weighting import GEOMETRIC_P, WEIGHTINGS

ROWS = [(name, space) for name, row in WEIGHTINGS.items() for space in row.spaces]
MEMBER_ROWS = [(name, space) for name, space in ROWS if WEIGHTINGS[name].axes == 1]
CANONICAL = ("log_prob", "prob")
RANKED = ("geometric", "topk")  # by rank, which copies of members shift


def outputs(b: int = 5, n: int = 200, k: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of members of rising skill that share part of their noise, and the labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, k, (n,), generator=g)
    skill = torch.linspace(0.5, 2.5, b, dtype=torch.float64)[:, None, None]
    noise = torch.randn(b, n, k, generator=g) + 0.5 * torch.randn(n, k, generator=g)
    return skill * torch.nn.functional.one_hot(labels, k) + noise, labels


def sampled(logits: Tensor, weights: Tensor, space: str) -> Tensor:
    """Labels drawn from the pooled prediction."""
    probs = pool(logits, weights, space).exp()
    return torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(99)).squeeze(-1)


def random_simplex(m: int, b: int) -> Tensor:
    draws = torch.rand(m, b, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return -draws.log() / -draws.log().sum(-1, keepdim=True)


@pytest.mark.parametrize(("name", "space"), ROWS)
class TestEveryRow:
    def test_weights_are_finite_and_shaped_as_the_row_says(self, name: str, space: str) -> None:
        logits, labels = outputs()
        weights = WEIGHTINGS[name](logits.float(), labels, space)
        assert weights.shape == ((5,), (5, 3), (5, 3, 4))[WEIGHTINGS[name].axes - 1]
        assert weights.dtype == torch.float64
        assert weights.isfinite().all()
        if WEIGHTINGS[name].axes == 1:
            torch.testing.assert_close(weights.sum().item(), 1.0)
        if WEIGHTINGS[name].axes < 3:
            assert (weights >= 0).all()

    def test_is_deterministic_and_leaves_the_global_generator_alone(self, name: str, space: str) -> None:
        logits, labels = outputs()
        torch.manual_seed(1)
        first = WEIGHTINGS[name](logits, labels, space)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(WEIGHTINGS[name](logits, labels, space), first)
        assert torch.equal(torch.get_rng_state(), before)

    def test_follows_a_permutation_of_the_members(self, name: str, space: str) -> None:
        logits, labels = outputs()
        order = torch.tensor([3, 0, 4, 2, 1])
        weights = WEIGHTINGS[name](logits, labels, space)
        permuted = WEIGHTINGS[name](logits[order], labels, space)
        torch.testing.assert_close(permuted, weights[order], atol=2e-3, rtol=0)

    def test_a_single_member_keeps_what_it_knows(self, name: str, space: str) -> None:
        logits, labels = outputs(b=1)
        weights = WEIGHTINGS[name](logits, labels, space)
        if WEIGHTINGS[name].axes == 1:
            assert weights.tolist() == [1.0]
        pooled = pool(logits, weights, space)
        assert accuracy(pooled, labels) > accuracy(logits[0], labels) - 0.03

    def test_survives_hopeless_and_perfect_members(self, name: str, space: str) -> None:
        _, labels = outputs(n=60)
        right = torch.nn.functional.one_hot(labels, 3).double()
        logits = torch.stack([40 * right, -40 * right, torch.zeros_like(right)])
        weights = WEIGHTINGS[name](logits, labels, space)
        assert weights.isfinite().all()
        if name not in ("uniform", "accuracy"):
            assert accuracy(pool(logits, weights, space), labels) == 1


@pytest.mark.parametrize(("name", "space"), [row for row in ROWS if row in MEMBER_ROWS or row[1] != "logits"])
def test_ignores_a_shift_of_the_logits(name: str, space: str) -> None:
    logits, labels = outputs()
    shift = torch.randn(5, 200, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    weights = WEIGHTINGS[name](logits, labels, space)
    torch.testing.assert_close(WEIGHTINGS[name](logits + shift, labels, space), weights, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "space"), [row for row in MEMBER_ROWS if row[0] not in RANKED])
def test_copies_of_all_members_leave_the_prediction(name: str, space: str) -> None:
    logits, labels = outputs()
    twice = torch.cat([logits, logits])
    once = pool(logits, WEIGHTINGS[name](logits, labels, space), space)
    torch.testing.assert_close(pool(twice, WEIGHTINGS[name](twice, labels, space), space), once, atol=1e-4, rtol=0)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
class TestSimplex:
    def test_meets_the_kkt_conditions(self, space: str, scale: float) -> None:
        logits, labels = outputs(b=8, seed=1)
        weights = WEIGHTINGS["simplex"](scale * logits, labels, space)
        _, gradient, _ = pooled_nll(SPACES[space], scale * logits, labels).derivatives(weights)
        multiplier = gradient[weights > 1e-3].mean()
        assert (gradient[weights > 1e-3] - multiplier).abs().max() < 1e-3
        assert (gradient[weights == 0] >= multiplier - 1e-4).all()
        assert optimality_gap(weights, gradient) < 1e-5

    def test_no_point_of_the_simplex_is_better(self, space: str, scale: float) -> None:
        logits, labels = outputs(b=8, seed=1)
        objective = pooled_nll(SPACES[space], scale * logits, labels)
        lowest = objective.values(WEIGHTINGS["simplex"](scale * logits, labels, space)[None])
        centre = torch.full((1, 8), 1 / 8, dtype=torch.float64)
        others = torch.cat([torch.eye(8, dtype=torch.float64), centre, random_simplex(200, 8)])
        assert (objective.values(others) >= lowest - 1e-5).all()

    def test_derivatives_are_those_of_the_pooled_nll(self, space: str, scale: float) -> None:
        logits, labels = outputs(n=50)
        objective = pooled_nll(SPACES[space], scale * logits, labels)
        point = random_simplex(1, 5)[0]

        def value(weights: Tensor) -> Tensor:
            return nll(pool(scale * logits, weights, space), labels)

        tangent = torch.eye(5, dtype=torch.float64) - 0.2  # only steps along the simplex are meaningful
        gradient = torch.autograd.functional.jacobian(value, point)
        hessian = torch.autograd.functional.hessian(value, point)
        torch.testing.assert_close(objective.values(point[None])[0], value(point))
        torch.testing.assert_close(objective.derivatives(point)[0], value(point))
        _, found_gradient, found_hessian = objective.derivatives(point)
        torch.testing.assert_close(tangent @ found_gradient, tangent @ gradient)
        torch.testing.assert_close(tangent @ found_hessian @ tangent, tangent @ hessian @ tangent)


@pytest.mark.filterwarnings("error")  # the solver warns where it does not converge
@pytest.mark.parametrize(("name", "space"), [row for row in ROWS if row[0] in ("simplex", "nonnegative")])
@pytest.mark.parametrize("seed", range(8))
def test_converges_on_odd_problems(name: str, space: str, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    b, n, k = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 20), (2, 200), (2, 12)))
    labels = torch.randint(0, k, (n,), generator=g)
    skill = 3 * torch.randn(b, 1, 1, generator=g)  # of either sign; some of these are separable
    logits = skill * torch.nn.functional.one_hot(labels, k) + torch.randn(b, n, k, generator=g)
    logits = torch.cat([logits, logits[:1]]) * 10 ** (seed / 2 - 1.5)
    weights = WEIGHTINGS[name](logits, labels, space)
    torch.testing.assert_close(weights.sum().item(), 1.0)
    torch.testing.assert_close(weights[0], weights[-1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("space", CANONICAL)
def test_simplex_equals_scipy(space: str) -> None:
    logits, labels = outputs()
    objective = pooled_nll(SPACES[space], logits, labels)
    reference = minimize(
        lambda w: objective.values(torch.from_numpy(w)[None]).item(),
        np.full(5, 0.2),
        jac=lambda w: objective.derivatives(torch.from_numpy(w))[1].numpy(),
        bounds=[(1e-9, 1)] * 5,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12},
    )
    weights = WEIGHTINGS["simplex"](logits, labels, space)
    torch.testing.assert_close(weights, torch.from_numpy(reference.x), atol=1e-3, rtol=0)


def test_nonnegative_equals_scipy_on_the_cone() -> None:
    logits, labels = outputs(b=6, seed=2)
    objective = pooled_nll(SPACES["log_prob"], logits, labels)
    reference = minimize(
        lambda v: objective.values(torch.from_numpy(v)[None]).item(),
        np.full(6, 1 / 6),
        jac=lambda v: objective.derivatives(torch.from_numpy(v))[1].numpy(),
        bounds=[(0, None)] * 6,
        options={"ftol": 1e-14, "gtol": 1e-9},
    )
    weights = WEIGHTINGS["nonnegative"](logits, labels, "log_prob")
    expected = torch.from_numpy(reference.x / reference.x.sum())
    torch.testing.assert_close(weights, expected, atol=1e-3, rtol=0)


def test_nonnegative_ignores_a_common_scale_of_the_logits() -> None:
    logits, labels = outputs(b=6)
    weights = WEIGHTINGS["nonnegative"](logits, labels, "logits")
    scaled = WEIGHTINGS["nonnegative"](7 * logits, labels, "logits")
    torch.testing.assert_close(scaled, weights, atol=1e-3, rtol=0)


def test_nonnegative_has_the_lowest_nll_after_temperature() -> None:
    logits, labels = outputs(b=6)
    logits = 4 * logits  # overconfident: with a sum of 1 the weights have to hedge
    found = calibrated_nll(pool(logits, WEIGHTINGS["nonnegative"](logits, labels, "logits"), "logits"), labels)
    others = [*torch.eye(6, dtype=torch.float64), WEIGHTINGS["simplex"](logits, labels, "logits")]
    others += [WEIGHTINGS["uniform"](logits, labels, "logits"), *random_simplex(20, 6)]
    assert all(calibrated_nll(pool(logits, w, "logits"), labels) >= found - 1e-6 for w in others)


@pytest.mark.parametrize(
    ("name", "space"),
    [("simplex", "log_prob"), ("simplex", "prob"), ("nonnegative", "log_prob"), ("greedy", "prob")],
)
def test_planted_weights_are_recovered(name: str, space: str) -> None:
    logits = 2 * torch.randn(4, 20_000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    planted = torch.tensor([0.5, 0.0, 0.2, 0.3], dtype=torch.float64)
    labels = sampled(logits, planted, space)
    torch.testing.assert_close(WEIGHTINGS[name](logits, labels, space), planted, atol=0.04, rtol=0)


@pytest.mark.parametrize("name", ["greedy", "simplex", "nonnegative"])
def test_a_useless_member_gets_no_weight(name: str) -> None:
    logits, labels = outputs(n=4000)
    noise = 3 * torch.randn(1, 4000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    assert WEIGHTINGS[name](torch.cat([logits, noise]), labels, "log_prob")[-1] < 0.02
    constant = torch.tensor([5.0, 0.0, 0.0], dtype=torch.float64).expand(1, 4000, 3)
    assert WEIGHTINGS[name](torch.cat([logits, constant]), labels, "log_prob")[-1] < 0.02


@pytest.mark.parametrize("name", ["simplex", "nonnegative"])
def test_copies_of_one_member_share_its_weight(name: str) -> None:
    logits, labels = outputs()
    weights = WEIGHTINGS[name](logits, labels, "log_prob")
    copied = WEIGHTINGS[name](torch.cat([logits, logits[4:], logits[4:]]), labels, "log_prob")
    torch.testing.assert_close(copied[4:], weights[4:].expand(3) / 3, atol=1e-3, rtol=0)


@pytest.mark.parametrize("space", CANONICAL)
def test_greedy_comes_close_to_simplex(space: str) -> None:
    logits, labels = outputs(b=8)
    objective = pooled_nll(SPACES[space], logits, labels)
    rows = torch.stack([WEIGHTINGS[name](logits, labels, space) for name in ("simplex", "greedy", "uniform")])
    simplex, greedy, uniform = objective.values(rows)
    assert simplex - 1e-6 <= greedy <= simplex + 0.02 * (uniform - simplex)


def test_accuracy_weights_are_the_lead_over_guessing() -> None:
    labels = torch.tensor([0, 1, 0, 1])
    answers = [[0, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]  # lead .5, .25, 0, -.5
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 2).double()
    weights = WEIGHTINGS["accuracy"](logits, labels, "prob")
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3, 0, 0], dtype=torch.float64))


def test_inverse_loss_weights_are_inverse_to_the_loss() -> None:
    logits, labels = outputs()
    products = WEIGHTINGS["inverse_loss"](logits, labels, "prob") * torch.stack(
        [nll(member, labels) for member in logits.log_softmax(-1)]
    )
    torch.testing.assert_close(products, products[:1].expand(5))


def test_geometric_falls_by_one_ratio_and_topk_keeps_the_best() -> None:
    logits, labels = outputs(b=6)
    best_first = torch.stack([accuracy(member, labels) for member in logits]).argsort(descending=True)
    falling = WEIGHTINGS["geometric"](logits, labels, "log_prob")[best_first]
    torch.testing.assert_close(falling[1:] / falling[:-1], (falling[1] / falling[0]).expand(5))
    kept = WEIGHTINGS["topk"](logits, labels, "log_prob")[best_first]
    m = int((kept > 0).sum())
    torch.testing.assert_close(kept, torch.tensor([1 / m] * m + [0] * (6 - m), dtype=torch.float64))


@pytest.mark.parametrize("guessing", [0, 5])  # members that see other images than the labels
@pytest.mark.parametrize("space", CANONICAL)
def test_geometric_and_topk_choose_their_parameter_on_the_data(space: str, guessing: int) -> None:
    logits, labels = outputs(b=6)
    logits = torch.cat([logits[:guessing].roll(1, dims=1), logits[guessing:]])
    best_first = torch.stack([accuracy(member, labels) for member in logits]).argsort(descending=True)
    ranks = best_first.argsort()
    families = {
        "topk": [ranks < m for m in range(1, 7)],
        "geometric": [(1 - p) ** ranks for p in GEOMETRIC_P],
    }
    for name, family in families.items():
        rivals = [calibrated_nll(pool(logits, w / w.sum(), space), labels) for w in family]
        found = calibrated_nll(pool(logits, WEIGHTINGS[name](logits, labels, space), space), labels)
        assert found == pytest.approx(min(rivals), rel=1e-6)
        assert max(rivals) > found + 1e-3


class TestShrunkWeights:
    def test_classwise_skill_is_found(self) -> None:
        labels = torch.randint(0, 4, (3000,), generator=torch.Generator().manual_seed(0))
        g = torch.Generator().manual_seed(1)
        sure = torch.eye(4, dtype=torch.float64).repeat(2, 1)[:, None] * 3  # member i knows class i % 4 only
        right = torch.nn.functional.one_hot(labels, 4)
        logits = sure * right + torch.randn(8, 3000, 4, dtype=torch.float64, generator=g)

        def held_out(row: str) -> float:
            weights = WEIGHTINGS[row](logits[:, :1500], labels[:1500], "log_prob")
            return nll(pool(logits[:, 1500:], weights, "log_prob"), labels[1500:]).item()

        assert held_out("per_class") < 0.8 * held_out("simplex")
        assert held_out("stacking") < 0.8 * held_out("simplex")

    @pytest.mark.parametrize(("name", "loss"), [("per_class", 0.02), ("stacking", 0.01)])
    @pytest.mark.parametrize("scale", [0.7, 2.1])
    def test_few_samples_do_not_spoil_it(self, name: str, loss: float, scale: float) -> None:
        logits, labels = outputs(b=16, n=3360, k=10)
        logits = scale * logits
        few, rest = logits[:, :360], logits[:, 360:]

        def held_out(row: str) -> float:
            weights = WEIGHTINGS[row](few, labels[:360], "log_prob")
            return calibrated_nll(pool(rest, weights, "log_prob"), labels[360:])

        assert held_out(name) < held_out("simplex") + loss

    @pytest.mark.parametrize("family", [CLASS_WEIGHTS, AFFINE_MAPS])
    def test_overconfidence_is_left_to_the_temperature(self, family: Family) -> None:
        logits, labels = outputs(n=1000)
        problem = Shrinkage(30 * logits, labels, SPACES["log_prob"], family)
        weights, centre = problem.minimise(1.0, problem.centre), problem.centre
        torch.testing.assert_close(weights.sum(), centre.sum(), atol=0.5, rtol=0)

    def test_stacking_reads_a_member_that_names_the_classes_wrongly(self) -> None:
        logits, labels = outputs(n=1000, k=4)
        shuffled = torch.cat([logits[:3], logits[3:, :, [1, 2, 3, 0]]])  # the two best of five

        def right(row: str, members: Tensor) -> float:
            weights = WEIGHTINGS[row](members, labels, "log_prob")
            return accuracy(pool(members, weights, "log_prob"), labels).item()

        assert right("simplex", shuffled) < right("simplex", logits) - 0.1
        assert right("stacking", shuffled) > right("simplex", logits) - 0.01

    @pytest.mark.parametrize("family", [CLASS_WEIGHTS, AFFINE_MAPS])
    def test_ridge_draws_the_weights_to_the_centre(self, family: Family) -> None:
        problem = Shrinkage(*outputs(), SPACES["log_prob"], family)
        found = [problem.minimise(ridge, problem.centre) for ridge in (0.1, 10, 1e3, 1e9)]
        distances = [(weights - problem.centre).norm().item() for weights in found]
        assert distances == sorted(distances, reverse=True)
        assert distances[-1] < 1e-3

    @pytest.mark.parametrize("family", [CLASS_WEIGHTS, AFFINE_MAPS])
    def test_the_minimum_is_stationary(self, family: Family) -> None:
        problem = Shrinkage(*outputs(), SPACES["log_prob"], family)
        weights = problem.minimise(10.0, problem.centre)
        gradient = torch.autograd.functional.jacobian(lambda w: problem.loss(w, 10.0), weights)
        at_bound = (weights < 1e-3) & (family is CLASS_WEIGHTS)
        assert gradient[~at_bound].abs().max() < 1e-2
        assert (gradient[at_bound] > -1e-2).all()
