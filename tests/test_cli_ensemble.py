"""`stl ensemble` from the command line: of some branches, of other images, of runs that have moved."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import Capture, stl

from stl_lightning.__main__ import main
from stl_lightning.exits import DONE
from stl_lightning.module import BranchModule
from stl_lightning.paths import RunPaths
from stl_lightning.run import RunOptions
from stl_lightning.status import read_status


def test_an_ensemble_of_nothing(tmp_path: Path, capfd: Capture) -> None:
    assert main(["ensemble", str(tmp_path)]) == 2
    assert "run.json" in capfd.readouterr().err


def test_a_partial_ensemble_names_the_missing_and_is_a_model(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stl("fit", tmp_path, "--run.branches=[0,2,3]") == 0
    run = RunPaths(tmp_path / "digits")
    run.branch(3).best.write_bytes(b"damaged")
    build = BranchModule.build
    with monkeypatch.context() as broken:
        broken.setattr(BranchModule, "build", lambda module, *args: with_nan(build(module, *args)))
        assert stl("fit", tmp_path, "--run.branches=[1]") == 1
    assert "not finite at step 0" in capfd.readouterr().err
    assert main(["ensemble", str(run.folder), "--weighting=simplex", "--flips"]) == 0
    printed = capfd.readouterr().out
    assert "branches missing: 1, 3" in printed
    assert "branch 3 is left out" in printed
    assert "branch 1 is left out: it has not finished: failed" in printed
    results = json.loads(run.results.read_text())
    assert results["members"] == [0, 2]
    assert results["flips"]
    assert sum(row["weight"] for row in results["branches"]) == pytest.approx(1.0)
    assert results["ensemble"]["accuracy"] > 0.3


def with_nan(module: BranchModule) -> BranchModule:
    torch.nn.init.constant_(next(module.parameters()), math.nan)
    return module


def test_branches_of_other_settings_do_not_join(tmp_path: Path, capfd: Capture) -> None:
    """As tasks of an array would that start after somebody has edited the config."""
    assert stl("fit", tmp_path, "--run.branches=[1]") == 0
    capfd.readouterr()
    assert stl("fit", tmp_path, "--run.branches=[2]", "--model.network.init_args.width=8") == 2
    assert "branches/01 was begun with other settings: model.network.init_args.width" in capfd.readouterr().err
    assert not RunPaths(tmp_path / "digits").branch(2).config.exists()


def test_a_branch_that_is_named_twice_trains_once(tmp_path: Path) -> None:
    assert stl("fit", tmp_path, "--run.branches=[2,2]") == DONE
    assert read_status(RunPaths(tmp_path / "digits").branch(2), 2).attempt == 1


def test_a_folder_that_cannot_be_looked_at_is_named(tmp_path: Path, capfd: Capture) -> None:
    assert main(["status", str(tmp_path / ("x" * 300))]) == 2
    assert "File name too long" in capfd.readouterr().err


def test_results_that_are_none_are_named(tmp_path: Path, capfd: Capture) -> None:
    run = RunPaths(tmp_path / "digits")
    run.results.parent.mkdir(parents=True)
    run.results.write_text("{}")
    assert main(["report", str(run.folder)]) == 2
    assert "repeat `stl ensemble" in capfd.readouterr().err


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunOptions(root="~/runs", name="a").paths.folder == tmp_path / "runs" / "a"


def write_npz(file: Path, seed: int) -> str:
    """Images of noise in two classes; the same labels and the same size whatever the seed."""
    images, labels = np.random.default_rng(seed).random((2, 40, 8, 8), dtype=np.float32), np.arange(40) % 2
    np.savez(file, train_images=images[0], train_labels=labels, test_images=images[1], test_labels=labels)
    return str(file)


def test_a_run_is_scored_on_its_own_images_only(tmp_path: Path, capfd: Capture) -> None:
    """Others of the same name, size and labels are told apart, and leave nothing behind."""
    own, other = (write_npz(tmp_path / f"{name}.npz", seed) for seed, name in enumerate(("own", "other")))
    settings = ["--data.source=npz", "--data.block=2", "--data.val_size=10"]
    assert stl("run", tmp_path, *settings, f"--data.root={own}") == 0
    run, kept = tmp_path / "digits", (tmp_path / "digits" / "ensemble" / "results.json").read_text()
    for command in ("ensemble", "report"):
        capfd.readouterr()
        assert main([command, str(run), f"--data.root={other}"]) == 2
        assert "Expected data.root" in capfd.readouterr().err
    assert main(["ensemble", str(run)]) == 0
    assert (run / "ensemble" / "results.json").read_text() == kept


def test_finished_runs_are_scored_again_and_not_trained_again(tmp_path: Path, capfd: Capture) -> None:
    assert stl("run", tmp_path) == 0
    assert stl("baseline", tmp_path) == 0
    run = RunPaths(tmp_path / "digits")
    trained = {path: path.stat().st_mtime_ns for path in run.folder.glob("branches/*/*.ckpt")}
    capfd.readouterr()
    assert stl("run", tmp_path) == 0
    assert "is finished already" in capfd.readouterr().out
    assert trained == {path: path.stat().st_mtime_ns for path in trained}
    results = json.loads(run.results.read_text())
    assert results["baseline"]["n_parameters"] > results["branches"][0]["n_parameters"]
    assert results["mean"] == pytest.approx(np.mean([row["test"]["accuracy"] for row in results["branches"]]))


def test_a_baseline_of_other_data_is_not_compared(tmp_path: Path, capfd: Capture) -> None:
    assert stl("fit", tmp_path, "--run.branches=[0]") == 0
    assert stl("baseline", tmp_path, "--data.val_size=0.5") == 2
    assert "val_size is 0.2 there and 0.5 here" in capfd.readouterr().err
    assert stl("baseline", tmp_path) == 0


def test_a_run_is_combined_where_its_data_are_now(tmp_path: Path, capfd: Capture) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.random((60, 8, 8), np.float32) for split in ("train", "test")}
    arrays |= {f"{split}_labels": np.arange(60) % 5 for split in ("train", "test")}
    old, new = tmp_path / "old.npz", tmp_path / "new.npz"
    np.savez(old, **arrays)
    assert stl("fit", tmp_path, "--data.source=npz", f"--data.root={old}") == 0
    old.rename(new)
    run = str(tmp_path / "digits")
    assert main(["ensemble", run]) == 2
    assert "old.npz" in capfd.readouterr().err
    assert main(["ensemble", run, f"--data.root={new}"]) == 0
    assert stl("run", tmp_path, "--data.source=npz", f"--data.root={new}") == 0
    capfd.readouterr()
    assert main(["ensemble", run, f"--data.root={new}", "--data.block=4"]) == 2
    assert "data.block" in capfd.readouterr().err
