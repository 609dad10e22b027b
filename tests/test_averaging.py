"""Averaged weights: the average itself, that training does not see it, that it is what is validated and kept."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_groups import (
    EXACT,
    N_STEPS,
    assert_bits,
    assert_close,
    assert_same_branches,
    jobs_of,
    rows,
    state,
    train,
    train_until_killed,
)
from test_groups_faults import poison
from test_leaving import leave_at
from test_training import assert_same, noisy_mlp
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stl_lightning import leaving
from stl_lightning.averaging import Averages, decay_at
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.ensemble.members import branch_outputs
from stl_lightning.errors import ConfigError
from stl_lightning.module import AVERAGES, BranchModule
from stl_lightning.networks import MLP, ConvNet, ResNet
from stl_lightning.status import read_status
from stl_lightning.training import BranchJob, load_best, train_branches

DECAY = 0.9
BRANCHES = (0, 1)
AVERAGED: dict[str, Any] = {"network": noisy_mlp, "averaging": DECAY, "options": {"chunk": 4}}
NETWORKS = {
    "mlp": lambda: MLP((1, 4, 4), 10, depth=3, width=8, batch_norm=True, dropout=0.2),
    "convnet": lambda: ConvNet((1, 4, 4), 10, widths=(4, "P", 6), dropout=0.2),
    "resnet": lambda: ResNet((1, 4, 4), 10, depth=[1, 1], width=3),
    "complex": lambda: nn.ParameterList([torch.randn(3, dtype=torch.complex64), torch.randn(2)]),
}


@pytest.fixture(autouse=True)
def _nobody_asks_afterwards() -> Iterator[None]:
    with leaving.listening():
        yield


def averages(job: BranchJob) -> dict[str, Tensor]:
    return load_checkpoint(job.paths.last)[AVERAGES]


def change(network: nn.Module) -> None:
    """Another network of the same shapes; the integers, as counters, higher by one."""
    with torch.no_grad():
        for value in network.state_dict().values():
            value.copy_(torch.randn_like(value) if value.is_floating_point() or value.is_complex() else value + 1)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_average_is_that_of_torch_buffers_included(name: str) -> None:
    """Long after the start, where the decay is constant."""
    network = NETWORKS[name]()
    ours = Averages(network, DECAY)
    torchs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    torchs.update_parameters(network)  # the first one copies
    for step in range(1000, 1010):
        change(network)
        ours.update(step)
        torchs.update_parameters(network)
    expected = {name: value for name, value in torchs.module.state_dict().items() if name in ours.values}
    torch.testing.assert_close(ours.values, expected)
    averaged = [value for value in network.state_dict().values() if value.dtype != torch.int64]
    assert len(ours.values) == len(averaged) > 0


def test_the_decay_starts_small() -> None:
    decays = [decay_at(step, 0.99) for step in range(2000)]
    assert decays[0] == 0.1
    assert decays == sorted(decays)
    assert decays[-1] == max(decays) == 0.99


def test_in_place_the_network_has_the_averages_and_afterwards_its_own() -> None:
    network = NETWORKS["resnet"]()
    ours = Averages(network, DECAY)
    change(network)
    ours.update(7)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with ours.in_place():
        assert_same({name: network.state_dict()[name] for name in ours.values}, ours.values)
    assert_same(dict(network.state_dict()), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_small_steps_are_not_rounded_away(dtype: torch.dtype) -> None:
    """Towards 1 from 0, a thousandth of the rest at each step: in bfloat16 it would stay behind."""
    network = nn.Linear(1, 1, bias=False).to(dtype)
    nn.init.zeros_(network.weight)
    ours = Averages(network, 0.999)
    nn.init.ones_(network.weight)
    for step in range(10_000, 13_000):
        ours.update(step)
    assert ours.values["weight"].item() == pytest.approx(1 - 0.999**3000, rel=1e-3)


def test_a_layer_that_replaces_its_buffer_is_followed() -> None:
    layer = nn.BatchNorm1d(2)
    ours = Averages(layer, 0.0)
    layer.running_mean = torch.tensor([3.0, 4.0])
    ours.update(0)
    assert_same({"running_mean": ours.values["running_mean"]}, {"running_mean": torch.tensor([3.0, 4.0])})


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, list[BranchJob]]:
    """Branches with dropout and BatchNorm, trained stacked (True) and one by one (False)."""
    root = tmp_path_factory.mktemp("averaged")
    return {stack: train(root / str(stack), BRANCHES, stack=stack, **AVERAGED) for stack in (True, False)}


@pytest.mark.parametrize("stack", [True, False])
def test_training_does_not_see_the_average(stack: bool, averaged: Any, tmp_path: Path) -> None:
    plain = train(tmp_path, [0, 1] if stack else [0], stack=stack, **AVERAGED | {"averaging": None})
    for job, other in zip(averaged[stack], plain, strict=False):
        assert_same(state(job), state(other))
        for a, b in zip(rows(job), rows(other), strict=True):
            assert a["train/loss"] == b["train/loss"]
            assert a["val/loss"] != b["val/loss"]
        assert AVERAGES not in load_checkpoint(other.paths.last)


def test_without_decay_the_average_is_the_weights(tmp_path: Path) -> None:
    ways = [train(tmp_path / str(decay), [0, 1], **AVERAGED | {"averaging": decay}) for decay in (0.0, None)]
    assert_bits(*ways)


@pytest.mark.parametrize("stack", [True, False])
def test_a_checkpoint_holds_the_average_of_the_weights_of_all_steps(
    stack: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace: list[dict[str, Tensor]] = []

    def noted(hook: Any) -> Any:
        def and_note(module: BranchModule) -> None:
            hook(module)
            trace.append({name: value.clone() for name, value in module.network.state_dict().items()})

        return and_note

    for name in ("on_train_start", "_step_if_due"):
        monkeypatch.setattr(BranchModule, name, noted(getattr(BranchModule, name)))
    jobs = train(tmp_path, [0, 1] if stack else [0], stack=stack, **AVERAGED)
    expected = trace[0]
    for step, now in enumerate(trace[1:]):
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * now[name] for name in now}
    assert len(trace) == 2 * N_STEPS + 1
    for i, job in enumerate(jobs):
        found = averages(job)
        assert_close(found, {name: expected[name][i] if stack else expected[name] for name in found})


def test_the_best_weights_are_the_averaged_ones_that_were_validated(averaged: Any) -> None:
    """Their outputs have the loss that metrics.csv says; at the last epoch, last.ckpt holds them as averages."""
    for job in averaged[True]:
        best = load_checkpoint(job.paths.best)
        assert AVERAGES not in best
        outputs = branch_outputs(job, "val")
        row = rows(job)[best["epoch"]]
        loss = nn.functional.cross_entropy(outputs.logits.double(), outputs.labels)
        assert_close(loss.item(), row["val/loss"], 1e-5)
        own = averages(job)
        if best["epoch"] == 1:
            assert_same({name: best["state_dict"][f"network.{name}"] for name in own}, own)
    assert any(load_checkpoint(job.paths.best)["epoch"] == 1 for job in averaged[True])


@pytest.mark.parametrize(("stack", "step"), [(True, 14), (False, 23)])
def test_a_run_that_was_killed_resumes_to_the_same_bits(
    stack: bool, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: Any
) -> None:
    branches = BRANCHES if stack else [0]
    train_until_killed(tmp_path, step, monkeypatch, branches=branches, stack=stack, **AVERAGED)
    again = train(tmp_path, branches, stack=stack, **AVERAGED)
    assert_bits(again, averaged[stack][: len(branches)])
    for job, other in zip(again, averaged[stack], strict=False):
        assert_same(averages(job), averages(other))


def test_who_left_in_mid_chunk_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"network": noisy_mlp, "averaging": DECAY, "trainer": EXACT, "options": {"stack": True}}
    undisturbed = train(tmp_path / "undisturbed", [0, 1], **settings)
    leave_at(tmp_path / "left", 6, monkeypatch, **settings)
    again = train(tmp_path / "left", [0, 1], **settings)
    assert_bits(again, undisturbed)
    for job, other in zip(again, undisturbed, strict=True):
        assert_same(averages(job), averages(other))


def test_a_group_goes_on_as_branches_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: Any) -> None:
    train_until_killed(tmp_path, 19, monkeypatch, branches=BRANCHES, **AVERAGED)
    assert_same_branches(train(tmp_path, BRANCHES, stack=False, **AVERAGED), averaged[False])


def test_a_branch_that_diverges_spoils_no_other_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averaged: Any
) -> None:
    poison(monkeypatch, {1: 5}, math.nan)
    jobs = jobs_of(tmp_path, BRANCHES, **AVERAGED | {"options": {"chunk": 4, "stack": True}})
    assert train_branches(jobs) == 1
    assert "not finite at step 5;" in read_status(jobs[1].paths, 1).error
    assert_same_branches(jobs[:1], averaged[False][:1])


def test_branches_that_run_out_of_patience_end_each_in_its_own_epoch(tmp_path: Path) -> None:
    changes = {"trainer": {"max_epochs": 6}, "lr": 0.03, "options": {"patience": 1}, "averaging": 0.5}
    changes["scheduler"] = lambda optimizer: optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 3.0**epoch)
    stacked = train(tmp_path / "stacked", BRANCHES, **changes)
    assert_same_branches(stacked, train(tmp_path / "alone", BRANCHES, stack=False, **changes))
    assert len({len(rows(job)) for job in stacked}) > 1


@pytest.mark.parametrize("branches", [[0], [0, 1]])
def test_without_validation_the_best_weights_are_the_averages(branches: list[int], tmp_path: Path) -> None:
    jobs = train(tmp_path, branches, **AVERAGED | {"trainer": {"limit_val_batches": 0}})
    for job in jobs:
        own = averages(job)
        assert_same({name: state(job, "best")[f"network.{name}"] for name in own}, own)
        job.paths.best.unlink()  # as in a run that was killed just before it was written
    for job in train(tmp_path, branches, **AVERAGED | {"trainer": {"limit_val_batches": 0}}):
        own = averages(job)
        assert_same({name: state(job, "best")[f"network.{name}"] for name in own}, own)


@pytest.mark.parametrize("precision", ["bf16-true", "32-true"])
def test_any_precision_keeps_averages_of_its_own(precision: str, tmp_path: Path) -> None:
    """In float32 in last.ckpt; in best.ckpt in the precision in which they were validated."""
    (job,) = train(tmp_path, [0], **AVERAGED | {"trainer": {"precision": precision}})
    own, best, last = averages(job), state(job, "best"), state(job)
    assert {value.dtype for value in own.values()} == {torch.float32}
    assert {name: value.dtype for name, value in best.items()} == {name: value.dtype for name, value in last.items()}
    assert all(value.isfinite().all() for value in load_best(job).state_dict().values())


def test_validation_in_the_middle_of_an_accumulated_step_changes_nothing(tmp_path: Path) -> None:
    """Gradients that are being added up outlive the exchange of the weights."""
    trainer = {"accumulate_grad_batches": 4, "val_check_interval": 0.5}
    ways = [
        train(tmp_path / str(averaging), [0], **AVERAGED | {"averaging": averaging, "trainer": trainer})[0]
        for averaging in (DECAY, None)
    ]
    assert_same(state(ways[0]), state(ways[1]))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, math.nan])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.averaging: expected a decay"):
        BranchModule(averaging=decay)
