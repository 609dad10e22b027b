"""The commands as a user calls them: what they print, and how they refuse bad input before any training."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from stl_lightning.__main__ import COMMANDS, main
from stl_lightning.cli.ensemble import load_ensemble
from stl_lightning.errors import ConfigError
from stl_lightning.exits import DONE, INTERRUPTED

CHECKOUT = Path(__file__).resolve().parent.parent
DIGITS = str(CHECKOUT / "configs" / "digits.yaml")
QUICK = ["--trainer.max_epochs=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]

Capture = pytest.CaptureFixture[str]
PLATEAU = "torch.optim.lr_scheduler.ReduceLROnPlateau"
ONE_CYCLE = "torch.optim.lr_scheduler.OneCycleLR"
CYCLE = [f"--model.lr_scheduler.init_args.{name}" for name in ("max_lr=0.1", "total_steps=71")]
THREE_PIXELS = ["--data.block=[1,3]", "--data.pad=zeros"]

# What the user gets wrong -> the arguments, and what the message has to say.
BAD = {
    "unknown source": (["--data.source=mnits"], ["data.source", "'mnits'", "cifar10, cifar100, digits"]),
    "missing data": (["--data.source=mnist", "--data.root=nowhere"], ["nowhere/MNIST/raw", "data.download=true"]),
    "unknown transform": (["--data.transform=dct3"], ["data.transform", "dct, dct2, dft"]),
    "unknown reorganisation": (["--data.reorganisation=zigzag"], ["data.reorganisation", "polyphase, raster, tiles"]),
    "unknown weighting": (["--ensemble.weighting=best"], ["ensemble.weighting", "'best'", "greedy", "uniform"]),
    "unfit space": (["--ensemble.weighting=stacking", "--ensemble.space=prob"], ["ensemble.space", "stacking"]),
    "block": (["--data.block=3"], ["data.block", "data.pad", "9x9"]),
    "block of all": (
        ["--data.block=16"],
        ["data.block: 16x16", "Heights that fit: 1, 2, 4, 8; widths that fit: 1, 2, 4, 8\n"],
    ),
    "hadamard": ([*THREE_PIXELS, "--data.transform=hadamard"], ["powers of two", "(1, 3)", "dct, dct2, dft"]),
    "haar": ([*THREE_PIXELS, "--data.transform=haar"], ["powers of two", "(1, 3)", "dct, dct2, dft"]),
    "folds": (["--ensemble.n_folds=1"], ["ensemble.n_folds", "2 or more"]),
    "resized crop": (["--data.augment.resized_crop=[0.5,1]"], ["data.augment.resized_crop", "crop_pad"]),
    "plateau": ([f"--model.lr_scheduler={PLATEAU}"], ["model.lr_scheduler", "ReduceLROnPlateau"]),
    "short schedule": (
        [f"--model.lr_scheduler={ONE_CYCLE}", *CYCLE, "--model.lr_interval=step"],
        ["total_steps", "expected 72"],
    ),
    "slices": (["--data.slices_per_branch=5"], ["data.slices_per_branch", "1 to 4"]),
    "common slices": (["--data.common_slices=[4]"], ["data.common_slices", "0 to 3"]),
    "branches": (["--run.branches=[4]"], ["run.branches", "0 to 3"]),
    "val_size": (["--data.val_size=1.5"], ["data.val_size"]),
    "batch_size": (["--data.batch_size=0"], ["data.batch_size", "at least 1"]),
    "strategy": (["--trainer.strategy=ddp"], ["trainer.strategy", "left unset"]),
    "checkpoints": (["--run.checkpoint_every_n_steps=0"], ["run.checkpoint_every_n_steps", "at least 1"]),
    "folds of few": (["--data.val_size=4"], ["ensemble.n_folds", "2 to 4"]),
    "one to validate": (["--data.val_size=1"], ["data.val_size", "2 validation images"]),
    "seed": (["--seed_everything=5000000000"], ["seed_everything"]),
    "learning rate": (["--model.optimizer.init_args.lr=-1"], ["model.optimizer", "Invalid learning rate"]),
    "no length": (
        [f"--model.lr_scheduler={ONE_CYCLE}", CYCLE[0]],
        ["model.lr_scheduler", "total_steps"],
    ),
    "epochs": (["--trainer.max_epochs=-7"], ["trainer: ", "max_epochs", "-7"]),
    "limit": (["--trainer.limit_val_batches=-1"], ["trainer: ", "limit_val_batches", "-1"]),
    "endless": (["--trainer.max_epochs=null"], ["trainer.max_epochs"]),
    "accelerator": (["--trainer.accelerator=tpu"], ["trainer.accelerator", "'tpu'"]),
    "monitor": (["--run.monitor=val/f1"], ["run.monitor", "val/acc"]),
    "network option": (["--model.network.init_args.depth=0"], ["model.network.init_args.depth", "1 or more"]),
    "smoothing": (["--model.label_smoothing=2"], ["model.label_smoothing"]),
    "no list": (["--run.branches=2"], ["run.branches", "write [2]"]),
    "no list of two": (["--run.branches=2,3"], ["run.branches", "write [2, 3]"]),
    "typo in a class": (["--model.network=stl_lightning.networks.ConvNett"], ["did you mean ConvNet in place of"]),
    "typo in a package": (
        ["--model.network=stl_lightning.network.MLP"],
        ["did you mean networks in place of network?"],
    ),
    "no such module": (["--model.network=nowhere.Net"], ["no module nowhere in the folder that this is called from"]),
    "typo in a key": (["--data.sorce=digits"], ["unrecognized", "did you mean data.source in place of data.sorce?"]),
    "two typos": (["--tranier.max_epoch=3", "--data.blok", "2"], ["mean trainer.max_epochs in", "mean data.block in"]),
    "no such key": (["--something.else=3"], ["unrecognized arguments: --something.else=3\n"]),
    "wrong type": (["--data.batch_size=many"], ["data.batch_size"]),
}


def stl(command: str, root: Path, *args: str, config: str = DIGITS) -> int:
    try:
        return main([command, "--config", config, f"--run.root={root}", *QUICK, *args])
    except SystemExit as exit:  # argparse leaves this way
        return int(exit.code or 0)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_any_training(case: str, tmp_path: Path, capfd: Capture) -> None:
    args, said = BAD[case]
    assert stl("run", tmp_path / "runs", *args) == 2
    message = capfd.readouterr().err
    for words in said:
        assert words in message
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_callbacks_of_the_users_are_taken(tmp_path: Path) -> None:
    """A checkpoint beside ours, and a progress bar where none is shown."""
    names = ("ModelCheckpoint", "RichProgressBar")
    callbacks = [f"--trainer.callbacks+=lightning.pytorch.callbacks.{name}" for name in names]
    assert stl("fit", tmp_path, *callbacks, "--run.branches=[0]") == 0


def test_a_schedule_that_outlives_the_training_is_told(tmp_path: Path, capfd: Capture) -> None:
    longer = [f"--model.lr_scheduler={ONE_CYCLE}", *CYCLE, "--model.lr_interval=step", "--trainer.max_epochs=1"]
    assert stl("fit", tmp_path, *longer, "--run.branches=[0]") == 0
    assert "total_steps: 71 steps, but the training ends after 36" in capfd.readouterr().err


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_precision_that_is_emulated_is_told(
    is_there: bool, precision: str, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stl_lightning.training.precision.has_bfloat16", lambda device: is_there)
    assert stl("fit", tmp_path, f"--trainer.precision={precision}", "--run.branches=[0]") == 0
    is_told = "32-true is many times faster" in capfd.readouterr().err
    assert is_told == (precision == "bf16-mixed" and not is_there)


TYPOS = {
    "data: {sorce: digits}": "did you mean data.source in place of data.sorce?",
    "modle: {channels_last: true}": "did you mean model.channels_last in place of modle.channels_last?",
    "model: {network: {class_path: stl_lightning.networks.MLP, init_args: {dept: 3}}}": "did you mean depth in",
}


@pytest.mark.parametrize("text", TYPOS)
def test_a_typo_in_a_file_is_answered_with_what_was_meant(text: str, tmp_path: Path, capfd: Capture) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(text)
    assert stl("run", tmp_path / "runs", config=str(file)) == 2
    assert TYPOS[text] in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_ensemble_stage_at_once(
    number: signal.Signals, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would wait for a next step, which does not come any more."""
    went_on = []

    def combine(*_: object) -> None:
        os.kill(os.getpid(), number)
        went_on.append(True)

    with monkeypatch.context() as patch:
        patch.setattr("stl_lightning.cli.train.combine", combine)
        assert stl("run", tmp_path) == INTERRUPTED
    assert not went_on
    assert f"asked to leave by {number.name}; the same command goes on" in capfd.readouterr().err
    assert stl("run", tmp_path) == DONE
    assert "written: " in capfd.readouterr().out


def test_more_ranks_than_branches(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"TORCHELASTIC_RUN_ID": "x", "RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "4"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    assert stl("fit", tmp_path) == 2
    message = capfd.readouterr().err
    assert "5 ranks were started (torchrun)" in message
    assert "4 branches" in message


def test_an_unwritable_run_directory(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert stl("fit", tmp_path / "file") == 2
    err = capfd.readouterr().err
    assert f"cannot write {tmp_path}/file/digits/run.json: " in err
    assert err.endswith("Choose another `run.root`\n")


def test_a_full_disk_is_told(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert stl("fit", tmp_path) == 2
    said = f"cannot write {tmp_path}/digits/run.json: No space left on device. Free the disk, or choose another"
    assert said in capfd.readouterr().err


def test_a_run_of_other_settings_names_the_keys(tmp_path: Path, capfd: Capture) -> None:
    assert stl("fit", tmp_path, "--run.branches=[0]") == 0
    assert stl("fit", tmp_path, "--data.transform=dft", "--run.branches=[0]") == 2
    message = capfd.readouterr().err
    assert "transform is 'dct2' there and 'dft' here" in message
    assert "run.name" in message
    assert stl("fit", tmp_path, "--model.optimizer.init_args.lr=0.1", "--run.branches=[0]") == 2
    assert "model.optimizer.init_args.lr was 0.001 and is now 0.1" in capfd.readouterr().err


def test_wandb_that_is_not_installed(tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stl_lightning.tracking.find_spec", lambda name: None)
    assert stl("fit", tmp_path, "--tracking.wandb=true") == 2
    assert "pip install wandb" in capfd.readouterr().err


@pytest.mark.parametrize("case", ["labels", "nan"])
def test_arrays_that_cannot_be_trained_on(case: str, tmp_path: Path, capfd: Capture) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{split}_images": rng.random((50, 8, 8), np.float32) for split in ("train", "test")}
    arrays |= {f"{split}_labels": np.arange(50) % 5 for split in ("train", "test")}
    if case == "labels":
        arrays["test_labels"][7] = 5
    else:
        arrays["train_images"][3, 2, 1] = np.nan
    np.savez(tmp_path / "own.npz", **arrays)
    assert stl("run", tmp_path / "runs", "--data.source=npz", f"--data.root={tmp_path / 'own.npz'}") == 2
    message = capfd.readouterr().err
    assert ("labels in 0..4" in message and "index 7" in message) if case == "labels" else "NaN" in message
    assert not (tmp_path / "runs").exists()


def test_from_python_an_unknown_setting_is_an_error_and_no_exit(tmp_path: Path) -> None:
    assert stl("run", tmp_path) == 0
    with pytest.raises(ConfigError) as raised:
        load_ensemble(tmp_path / "digits", ["--data.rot=elsewhere"])
    said = "unrecognized arguments: --data.rot=elsewhere; did you mean data.root in place of data.rot?"
    assert str(raised.value) == said


def test_scoring_a_run_that_does_not_exist_makes_none(tmp_path: Path, capfd: Capture) -> None:
    assert stl("validate", tmp_path, "--run.name=typo") == 2
    assert "typo is not a run directory" in capfd.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_scoring_commands_print_a_line_a_branch(tmp_path: Path, capfd: Capture) -> None:
    assert stl("fit", tmp_path) == 0
    for command, split in {"validate": "val", "test": "test", "predict": "val"}.items():
        capfd.readouterr()
        assert stl(command, tmp_path, "--run.branches=[1,3]") == 0
        lines = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
        assert [(line["branch"], line["split"]) for line in lines] == [(1, split), (3, split)]
        assert all(Path(line["logits"]).exists() for line in lines)


def test_print_config_is_a_config(tmp_path: Path, capfd: Capture) -> None:
    assert stl("fit", tmp_path, "--data.batch_size=7", "--print_config") == 0
    printed = capfd.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert yaml.safe_load(printed)["data"]["batch_size"] == 7
    assert stl("fit", tmp_path, "--run.branches=[0]", config=str(tmp_path / "again.yaml")) == 0


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"]])
def test_help_lists_every_command(args: list[str], capsys: Capture) -> None:
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("stl_lightning 0.")


def test_unknown_command(capsys: Capture) -> None:
    assert main(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err


def test_help_answers_in_under_half_a_second() -> None:
    def once() -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stl_lightning", "--help"], check=True, cwd=CHECKOUT, capture_output=True)
        return time.perf_counter() - begin

    assert min(once() for _ in range(3)) < 0.5


def test_completion_knows_commands_and_settings(capsys: Capture) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS, "--data.transform", "--trainer.max_epochs", "--weighting"):
        assert word in script
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    assert main(["completion", "fish"]) == 2


def test_a_run_from_a_store_is_compared_with_its_baseline(tmp_path: Path, capsys: Capture) -> None:
    """The baseline reads images, whatever the branches read."""
    store = f"--data.store={tmp_path / 'store'}"
    assert main(["prepare", f"--config={DIGITS}", store]) == 0
    assert stl("baseline", tmp_path, store) == 0
    printed = capsys.readouterr().out
    assert "the baseline reads the images" in printed
    assert "adds the baseline" not in printed
    assert stl("run", tmp_path, store) == 0
    (results,) = tmp_path.glob("*/ensemble/results.json")
    assert json.loads(results.read_text())["baseline"]["accuracy"] > 0.2
    assert stl("baseline", tmp_path, store) == 0
    assert f"`stl ensemble {tmp_path / 'digits'}` adds the baseline to the tables" in capsys.readouterr().out


def test_a_copy_of_a_store_serves_the_branches_whose_slices_it_holds(tmp_path: Path, capsys: Capture) -> None:
    store = tmp_path / "store"
    assert main(["prepare", f"--config={DIGITS}", f"--data.store={store}"]) == 0
    for split in ("train", "test"):
        (store / split / "slice-02.npy").unlink()
    assert stl("fit", tmp_path, f"--data.store={store}") == 2
    assert "slices [2] are not in this copy" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/run.json"))
    assert stl("fit", tmp_path, f"--data.store={store}", "--run.branches=[0,3]") == 0
    assert main(["verify", str(store)]) == 1
    assert "missing: train/slice-02.npy" in capsys.readouterr().err
