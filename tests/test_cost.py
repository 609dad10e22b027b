"""Costs: counted twice in different ways, added up without counting twice, the same before a training and after it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stl_lightning.__main__ import main
from stl_lightning.cost import (
    Training,
    activation_bytes,
    costs,
    measured,
    measured_in_all,
    multiply_adds,
    n_parameters,
    slice_multiply_adds,
    weight_bytes,
)
from stl_lightning.exits import REFUSED
from stl_lightning.networks import MLP, ConvNet, FastConvNet, ResNet
from stl_lightning.paths import BranchPaths, RunPaths, write_json
from stl_lightning.report.costs import cost_table, remarks
from stl_lightning.spectral import SpectralSplit

DIGITS = str(Path(__file__).resolve().parent.parent / "configs" / "digits.yaml")
QUICK = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, int, int]]] = {
    "MLP": (lambda *shape: MLP(*shape, batch_norm=True, dropout=0.1), (1, 7, 7)),
    "ConvNet": (lambda *shape: ConvNet(*shape, widths=(8, "P", 16)), (3, 16, 16)),
    "FastConvNet": (lambda *shape: FastConvNet(*shape, widths=(8, 16)), (3, 16, 16)),
    "ResNet": (lambda *shape: ResNet(*shape, depth=(1, 1), width=8), (3, 16, 16)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_multiply_adds_are_those_of_every_layer(name: str) -> None:
    """Against the product of the sizes of each layer, as its output shows them."""
    build, in_shape = NETWORKS[name]
    network, seen = build(in_shape, 10), []

    def note(layer: Any, _: Any, out: Tensor) -> None:
        of_filter = layer.in_features if isinstance(layer, nn.Linear) else layer.weight[0].numel()
        seen.append(out.numel() * of_filter)

    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note)
    counted = multiply_adds(network, in_shape)
    assert counted == sum(seen) > 0


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("n", [3, 16])
def test_activations_of_any_batch_follow_from_two_small_ones(name: str, n: int) -> None:
    """Against all that the graph of a batch of that size holds on to."""
    build, in_shape = NETWORKS[name]
    network = build(in_shape, 10)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda _: pytest.fail("nothing goes backward")):
        F.cross_entropy(network.train()(torch.zeros(n, *in_shape)), torch.arange(n) % 10)
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    memory = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    expected = sum(n_bytes for place, n_bytes in memory.items() if place not in weights)
    assert activation_bytes(network, in_shape, 10, n) == expected


def test_a_layer_of_attention_by_hand() -> None:
    """Of 7 tokens of 8 numbers: four products with 8 x 8 weights, two of all pairs, 16 hidden units."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(nn.Flatten(2), layer)
    assert multiply_adds(network, (7, 2, 4)) == 7 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 7 * 7 * 8
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_mlp_by_hand() -> None:
    """The published branch: 8 layers on 49 numbers."""
    network = MLP((1, 7, 7), 10)
    assert n_parameters(network) == 7 * (49 * 49 + 49) + 49 * 10 + 10 == 17_650
    assert weight_bytes(network) == 4 * 17_650
    assert multiply_adds(network, (1, 7, 7)) == 7 * 49 * 49 + 49 * 10
    # The input and the output of 7 ReLUs, the log-probabilities, the labels as int64, and one weight sum of the loss.
    assert activation_bytes(network, (1, 7, 7), 10, 128) == 128 * (4 * 8 * 49 + 4 * 10 + 8) + 4


def training(network: nn.Module | None = None, **changes: Any) -> Training:
    facts: dict[str, Any] = {"n_images": 100, "epochs": 3, "batch_size": 8, "stored_as": "float32"} | changes
    return Training(network or MLP((1, 4, 4), 10, depth=2), (1, 4, 4), 10, read_shape=(1, 4, 4), **facts)


def test_lower_precision_takes_less() -> None:
    def row(precision: str) -> dict[str, Any]:
        network = ConvNet((1, 4, 4), 10, widths=(32, 32))
        return costs({0: training(network, precision=precision)}, training())["branches"][0]

    full, mixed, true = (row(precision) for precision in ("32-true", "bf16-mixed", "bf16-true"))
    assert mixed["weight_bytes"] == full["weight_bytes"]
    assert true["weight_bytes"] == pytest.approx(full["weight_bytes"] / 2, rel=0.01)
    assert true["activation_bytes"] < mixed["activation_bytes"] < full["activation_bytes"]


@pytest.mark.parametrize(("stored_as", "n_bytes"), [("float32", 4), ("float16", 2), ("int8", 1), ("uint8", 1)])
def test_bytes_read_are_those_of_the_store(stored_as: str, n_bytes: int) -> None:
    row = costs({0: training(stored_as=stored_as)}, training())["branches"][0]
    assert row["bytes_read_epoch"] == 100 * 16 * n_bytes
    assert row["bytes_read"] == 3 * row["bytes_read_epoch"]


def test_all_branches_are_the_sum_and_ratios_are_to_the_baseline() -> None:
    small, large = MLP((1, 4, 4), 10, depth=1), MLP((1, 4, 4), 10, depth=3)
    counted = costs({0: training(small), 1: training(large)}, training(large))
    for key in ("n_parameters", "multiply_adds", "activation_bytes", "bytes_read"):
        assert counted["all_branches"][key] == sum(row[key] for row in counted["branches"])
        assert counted["ratios"]["branch"][key] == 1
        assert 1 < counted["ratios"]["all_branches"][key] <= 2
    assert "parameters (1." in remarks(counted)[0]
    cheap = costs({0: training(small, stored_as="int8")}, training(large))
    assert remarks(cheap)[0].endswith("in: nothing of these")


def test_the_transform_is_a_product_with_the_rows_that_are_read() -> None:
    split = SpectralSplit((3, 8, 8), 2, transform="dct2")
    assert slice_multiply_adds(split.matrix[[1]], (3, 4, 4)) == 3 * 8 * 8
    assert slice_multiply_adds(split.matrix, (3, 4, 4)) == 4 * 3 * 8 * 8
    assert slice_multiply_adds(SpectralSplit((3, 8, 8), 2, transform="identity").matrix, (3, 4, 4)) == 0


def trained(folder: Path, branch: int, epoch_s: list[float], windows: dict[str, list[int]]) -> BranchPaths:
    paths = RunPaths(folder).branch(branch)
    rows = "".join(f"{epoch},{seconds}\n" for epoch, seconds in enumerate(epoch_s))
    paths.folder.mkdir(parents=True)
    paths.metrics.write_text(f"epoch,epoch_s\n{rows}")
    write_json(paths.status, {"branch": branch, "traffic": {"windows": windows}})
    return paths


def test_branches_of_one_process_count_once(tmp_path: Path) -> None:
    """0 and 1 began together, 1 went on with 2; 3 was alone."""
    branches = {
        0: trained(tmp_path, 0, [1, 1], {"a": [5, 0]}),
        1: trained(tmp_path, 1, [1, 1, 1], {"a": [5, 0], "b": [2, 1]}),
        2: trained(tmp_path, 2, [1, 1, 1], {"b": [2, 1]}),
        3: trained(tmp_path, 3, [4], {"c": [0, 3]}),
    }
    assert measured(branches)[1] == {"wall_s": 3, "bytes_sent": 7, "bytes_received": 1}
    assert measured_in_all(branches) == {"wall_s": 3 + 4, "bytes_sent": 7, "bytes_received": 4}
    not_begun = {4: RunPaths(tmp_path).branch(4)}
    assert measured(not_begun)[4]["wall_s"] is None
    assert measured_in_all(branches | not_begun)["wall_s"] == 7


def stl_cost(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["cost", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_costs_what_its_run_has_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--config", DIGITS, f"--run.root={tmp_path}", *QUICK]
    planned = stl_cost(capsys, *settings)
    assert not list(tmp_path.iterdir())
    assert [row["n_parameters"] for row in planned["branches"]] == [5898] * 4
    assert planned["baseline"]["n_parameters"] == 8970
    assert planned["all_branches"]["wall_s"] is None
    assert main(["fit", *settings, "--run.branches=[0,2]"]) == 0
    run = stl_cost(capsys, str(tmp_path / "digits"))
    keys = [key for key, value in planned["baseline"].items() if value is not None]
    assert [row["wall_s"] is None for row in run["branches"]] == [False, True, False, True]
    for was, now in zip([*planned["branches"], planned["baseline"]], [*run["branches"], run["baseline"]], strict=True):
        assert {key: was[key] for key in keys} == {key: now[key] for key in keys}
    assert main(["baseline", *settings]) == 0
    both = stl_cost(capsys, str(tmp_path / "digits"))
    assert both["baseline"]["wall_s"] > 0
    assert both["all_branches"]["bytes_sent"] in (0, None)
    assert main(["cost", str(tmp_path / "digits")]) == 0
    assert "ALL BRANCHES TOGETHER TAKE MORE THAN THE BASELINE in: parameters (2.63" in capsys.readouterr().out


def test_a_store_says_what_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a baseline can be counted where its images are not."""
    store = f"--data.store={tmp_path / 'store'}"
    assert main(["prepare", "--config", DIGITS, store, "--dtype=int8"]) == 0
    counted = stl_cost(capsys, "--config", DIGITS, store)
    assert counted["ratios"]["branch"]["bytes_read"] == 1 / 4
    assert counted["ratios"]["all_branches"]["bytes_read"] == 1


def test_a_branch_reads_all_pixels_where_the_augmentation_moves_them_between_slices(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No store would do then, which `stl fit` says when it gets one."""
    crop, store = "--data.augment.crop_pad=2", f"--data.store={tmp_path / 'store'}"
    counted = stl_cost(capsys, "--config", DIGITS, crop)
    assert (counted["stored_as"], counted["ratios"]["branch"]["bytes_read"]) == ("uint8", 1)
    assert main(["cost", "--config", DIGITS, crop]) == 0
    assert "a branch reads all pixels" in capsys.readouterr().out
    assert main(["cost", "--config", DIGITS]) == 0
    assert "without data.store, as here, a process makes its slices of all pixels" in capsys.readouterr().out
    aligned = [crop, "--data.augment.aligned=true"]
    assert stl_cost(capsys, "--config", DIGITS, *aligned)["stored_as"] == "float32"
    assert main(["prepare", "--config", DIGITS, store, "--dtype=int8"]) == 0
    assert stl_cost(capsys, "--config", DIGITS, *aligned, store)["ratios"]["branch"]["bytes_read"] == 1 / 4
    for command in (["fit", f"--run.root={tmp_path}"], ["cost"]):
        assert main([*command, "--config", DIGITS, store, crop]) == REFUSED
        assert "data.augment.aligned" in capsys.readouterr().err


def test_steps_are_the_limit_where_they_end_first(capsys: pytest.CaptureFixture[str]) -> None:
    an_epoch = stl_cost(capsys, "--config", DIGITS)["baseline"]["bytes_read_epoch"]
    limited = stl_cost(capsys, "--config", DIGITS, "--trainer.max_steps", "18", "--data.batch_size", "64")
    assert limited["baseline"]["bytes_read"] == an_epoch  # 1,150 images are 18 steps of 64


BAD = {
    "no run": (["nowhere"], "run.json"),
    "no end": ([], "trainer.max_epochs"),
    "unknown setting": (["--config", DIGITS, "--data.sorce=digits"], "data.sorce"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_counted(case: str, capfd: pytest.CaptureFixture[str]) -> None:
    args, said = BAD[case]
    try:
        code = main(["cost", *args])
    except SystemExit as exit:
        code = int(exit.code or 0)
    assert code == 2
    assert said in capfd.readouterr().err


def test_the_table_groups_branches_of_equal_cost() -> None:
    counted = costs({0: training(), 1: training(MLP((1, 4, 4), 10, depth=3)), 2: training()}, training())
    headings = [column.header for column in cost_table(counted).columns]
    assert headings[1:3] == ["0,2, each", "branch 1"]
