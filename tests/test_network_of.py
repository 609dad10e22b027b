"""Branches of different sizes in one run: who gets which options, who trains together, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_cli import DIGITS, QUICK, stl
from test_groups import Log, assert_same_branches, log, state, train, train_until_killed
from torch import Tensor, nn

from stl_lightning.__main__ import main
from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.cli.ensemble import load_ensemble
from stl_lightning.errors import ConfigError
from stl_lightning.module import BranchModule
from stl_lightning.networks import MLP
from stl_lightning.paths import RunPaths
from stl_lightning.ranges import as_ranges, by_number, from_ranges
from stl_lightning.training import load_best

__all__ = ["log"]

Capture = pytest.CaptureFixture[str]
SIZES: dict[str | int, dict[str, Any]] = {0: {"width": 12}, "1,3": {"depth": 2}}


def small(in_shape: tuple[int, int, int], n_classes: int, depth: int = 3, width: int = 8) -> nn.Module:
    return MLP(in_shape, n_classes, depth=depth, width=width)


SIZED: dict[str, Any] = {"network": small, "network_of": SIZES, "options": {"chunk": 4}}


SIZES_OF_DIGITS = (
    {"depth": 3, "width": 40},
    {"depth": 2, "width": 64},
    {"depth": 3, "width": 64},
    {"depth": 2, "width": 64},
)


def shapes(state_dict: dict[str, Tensor]) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in state_dict.values()]


def test_each_branch_has_the_options_of_its_key() -> None:
    own = BranchModule(small, network_of=SIZES)
    for branch, options in {0: {"width": 12}, 1: {"depth": 2}, 2: {}, 3: {"depth": 2}}.items():
        plain = BranchModule(lambda *args, options=options: small(*args, **options))
        built = [module.build((1, 4, 4), 10, 0, [branch]).state_dict() for module in (own, plain)]
        assert all(a.equal(b) for a, b in zip(*map(dict.values, built), strict=True))


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Four branches of three sizes, trained one by one."""
    return train(tmp_path_factory.mktemp("sized"), stack=False, **SIZED)


def test_branches_of_equal_design_train_together_as_each_alone(sized: Any, tmp_path: Path, log: Log) -> None:
    jobs = train(tmp_path, **SIZED)
    assert sorted(branches for branches, _ in log.groups) == [[0], [1, 3], [2]]
    assert_same_branches(jobs, sized)
    for job in jobs:
        assert shapes(load_best(job).state_dict()) == shapes(state(job))


def test_a_killed_run_resumes_in_the_same_groups(
    sized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    train_until_killed(tmp_path, 14, monkeypatch, killed=[1, 3], **SIZED)
    log.groups.clear()
    assert_same_branches(train(tmp_path, **SIZED), sized)
    assert log.groups == [([1, 3], 12), ([2], 0)]


# What the user writes -> what the message has to say.
BAD: dict[str, tuple[dict[str | int, Any], str]] = {
    "no number": ({"first": {}}, r"model\.network_of: expected branches as keys, such as 0 or 3,7-9; got 'first'"),
    "backwards": ({"3-1": {}}, r"model\.network_of: expected branches .*'3-1'"),
    "negative": ({-1: {}}, r"model\.network_of: expected branches .*-1"),
    "twice": ({"0-2": {}, "2-3": {}}, r"model\.network_of: branches 2 are in '2-3' and in a key before"),
    "twice, as a number": ({"0-2": {}, 1: {}}, r"model\.network_of: branches 1 are in 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_keys_that_say_nothing_clear_are_refused(case: str) -> None:
    table, message = BAD[case]
    with pytest.raises(ConfigError, match=message):
        BranchModule(network_of=table)


def test_a_table_gives_each_number_its_value() -> None:
    assert by_number("x", {"0,5-7": "a", 2: "b"}) == {0: "a", 5: "a", 6: "a", 7: "a", 2: "b"}
    assert from_ranges(as_ranges([0, 5, 6, 7])) == [0, 5, 6, 7]


# The same on the command line, before any training.
REFUSED = {
    "unknown branches": ('{"2-5": {"width": 9}}', ["model.network_of", "branches 0 to 3", "4-5"]),
    "unknown option": ('{"1-2": {"widht": 9}}', ["model.network_of, branch 2", "widht"]),
    "bad value": ('{"2": {"width": 0}}', ["model.network_of, branch 2", "1 or more units"]),
    "overlap": ('{"1-2": {}, "0,2": {}}', ["model.network_of", "branches 2"]),
    "no options": ('{"1": 9}', ["model.network_of"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_sizes_are_refused_before_any_training(case: str, tmp_path: Path, capfd: Capture) -> None:
    given, said = REFUSED[case]
    assert stl("run", tmp_path / "runs", f"--model.network_of={given}") == 2
    message = capfd.readouterr().err
    assert all(words in message for words in said)
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_a_run_of_several_sizes_from_a_file(tmp_path: Path, capfd: Capture) -> None:
    """To the ensemble; the baseline ignores the sizes; who resumes with other sizes is told which."""
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["model"]["network_of"] = {0: {"width": 40}, "1,3": {"depth": 2}}
    file = tmp_path / "sized.yaml"
    file.write_text(yaml.safe_dump(config))
    args = ["--config", str(file), f"--run.root={tmp_path}", *QUICK, "--ensemble.weighting=uniform"]
    assert main(["run", *args]) == 0
    assert main(["baseline", *args]) == 0
    run = RunPaths(tmp_path / "digits")
    found = [load_checkpoint(run.branch(branch).best)["state_dict"] for branch in range(4)]
    expected = [MLP((1, 4, 4), 10, **options) for options in SIZES_OF_DIGITS]
    assert [shapes(weights) for weights in found] == [shapes(network.state_dict()) for network in expected]
    assert load_ensemble(run.folder)(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    kept = yaml.safe_load(run.baseline.branch(0).config.read_text())
    assert kept["model"]["network_of"] is None
    capfd.readouterr()
    assert main(["fit", *args, '--model.network_of={"0": {"width": 41}, "1,3": {"depth": 2}}']) == 2
    assert "model.network_of.0.width was 40 and is now 41" in capfd.readouterr().err
    assert main(["fit", *args, '--model.network_of={"0": {"width": 40}, "1,3": {"depth": 2}}']) == 0
