"""Logits of validation images after every epoch: which images, which weights, and that resuming changes nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_groups import N_STEPS, jobs_of, train, train_until_killed
from test_groups_faults import poison
from test_training import noisy_mlp

from stl_lightning.checkpoint import load_checkpoint
from stl_lightning.ensemble.members import branch_outputs
from stl_lightning.errors import ConfigError
from stl_lightning.paths import RunPaths
from stl_lightning.run import RunOptions
from stl_lightning.tracking import EpochLogits
from stl_lightning.training import BranchJob, train_branches

N_VAL = 288
NOISY: dict[str, Any] = {"network": noisy_mlp, "options": {"chunk": 4}}


def logits(job: BranchJob) -> np.ndarray:
    return np.load(job.paths.epoch_logits)


def kept(n: int, **options: Any) -> dict[str, Any]:
    return NOISY | {"options": {"chunk": 4, "epoch_logits": n} | options}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[BranchJob]:
    return train(tmp_path_factory.mktemp("trained"), [0, 1], **NOISY)


@pytest.mark.parametrize("averaging", [None, 0.9])
@pytest.mark.parametrize(("n", "n_kept"), [(5000, N_VAL), (130, 130)])
def test_a_row_is_of_the_first_images_and_the_validated_weights(
    averaging: float | None, n: int, n_kept: int, tmp_path: Path
) -> None:
    """Of the epoch of `best.ckpt`, the logits that the ensemble computes from it, in the same order."""
    for job in train(tmp_path, [0, 1], **kept(n), averaging=averaging):
        job.data.eval_batch_size = 100  # as in no training here: the order does not depend on it
        rows = logits(job)
        assert (rows.shape, rows.dtype) == ((2, n_kept, 10), np.float16)
        expected = branch_outputs(job, "val").logits[:n_kept]
        row = torch.from_numpy(rows[load_checkpoint(job.paths.best)["epoch"]]).float()
        torch.testing.assert_close(row, expected, rtol=2**-10, atol=1e-4)


def test_images_come_from_several_batches(tmp_path: Path, trained: Any) -> None:
    jobs = jobs_of(tmp_path, [0, 1], **kept(130))
    for job in jobs:
        job.data.eval_batch_size = 50
    assert train_branches(jobs) == 0
    for job, other in zip(jobs, trained, strict=True):
        np.testing.assert_allclose(logits(job), logits(other)[:, :130], rtol=2**-9, atol=1e-4)


def test_stacked_branches_have_the_logits_of_each_alone(tmp_path: Path, trained: Any) -> None:
    for job, other in zip(train(tmp_path, [0, 1], stack=False, **NOISY), trained, strict=True):
        np.testing.assert_allclose(logits(job), logits(other), rtol=2**-9, atol=1e-4)


@pytest.mark.parametrize("step", [3, N_STEPS, 14, 23])
def test_a_run_that_was_killed_resumes_to_the_same_logits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Any
) -> None:
    train_until_killed(tmp_path, step, monkeypatch, branches=[0, 1], **NOISY)
    for job, other in zip(train(tmp_path, [0, 1], **NOISY), trained, strict=True):
        assert np.array_equal(logits(job), logits(other))


def test_with_another_number_of_images_the_rows_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_until_killed(tmp_path, 14, monkeypatch, branches=[0], **kept(20))
    (job,) = train(tmp_path, [0], **kept(30))
    rows = logits(job)
    assert rows.shape == (2, 30, 10)
    assert np.isnan(rows[0]).all()
    assert np.isfinite(rows[1]).all()


def test_an_epoch_without_validation_is_a_row_of_nan(tmp_path: Path) -> None:
    (job,) = train(tmp_path, [0], **NOISY, trainer={"max_epochs": 4, "check_val_every_n_epoch": 2})
    assert [bool(np.isfinite(row).all()) for row in logits(job)] == [False, True, False, True]


@pytest.mark.parametrize("changes", [kept(0), NOISY | {"trainer": {"limit_val_batches": 0}}], ids=["none", "no images"])
def test_nothing_is_written_where_nothing_is_kept(changes: dict[str, Any], tmp_path: Path) -> None:
    (job,) = train(tmp_path, [0], **changes)
    assert not job.paths.epoch_logits.exists()


def test_the_rows_of_a_sibling_do_not_see_a_branch_that_diverges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Any
) -> None:
    poison(monkeypatch, {1: 5}, math.nan)
    jobs = jobs_of(tmp_path, [0, 1], **kept(5000, stack=True))
    assert train_branches(jobs) == 1
    np.testing.assert_allclose(logits(jobs[0]), logits(trained[0]), rtol=2**-9, atol=1e-4)


def test_a_damaged_file_is_named_and_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only pictures need it."""
    train_until_killed(tmp_path, 14, monkeypatch, branches=[0], **NOISY)
    (job,) = jobs_of(tmp_path, [0], **NOISY)
    job.paths.epoch_logits.write_bytes(job.paths.epoch_logits.read_bytes()[:300])
    assert train_branches([job]) == 0
    assert "epochs.npy is left out of the pictures" in capfd.readouterr().err
    assert np.isfinite(logits(job)[-1]).all()


def test_an_epoch_that_is_repeated_replaces_those_after_it(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path).branch(0)
    for first in (0, 1):
        history = EpochLogits(paths)
        for epoch in range(first, 3 - first):
            history.note(epoch, torch.full((2, 5), 10.0 * first + epoch).half())
        history.save()
    assert np.load(paths.epoch_logits)[:, 0, 0].tolist() == [0, 11]


def test_huge_logits_stay_finite(tmp_path: Path) -> None:
    """Whatever float16 can hold of them."""
    (job,) = jobs_of(tmp_path, [0], **NOISY)
    module = job.built_module()
    module.n_kept_logits = 3
    module.on_validation_epoch_start()
    module._score = lambda *_: (torch.zeros(1, 3), torch.full((1, 5, 10), 1e9))  # type: ignore[method-assign]
    module.validation_step((torch.zeros(5, 1, 4, 4), torch.zeros(5)), 0)
    assert module.kept_logits().shape == (1, 3, 10)
    assert module.kept_logits().isfinite().all()


def test_a_negative_number_of_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.epoch_logits: expected at least 0, got -1"):
        RunOptions(epoch_logits=-1)
