"""The user's own arrays in one file: kept as they are, or refused with the name of the array."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from stl_lightning.errors import DataError
from stl_lightning.sources import open_source


def test_arrays_keep_their_values_and_channels_come_first(tmp_path):
    images = np.random.default_rng(0).random((5, 4, 6, 3), np.float32)
    arrays = {f"{split}_images": images for split in ("train", "test")}
    np.savez(tmp_path / "own.npz", **arrays, train_labels=np.arange(5), test_labels=np.arange(5))
    source = open_source("npz", tmp_path / "own.npz")
    assert source.image_shape == (3, 4, 6)
    assert torch.equal(source.load("train").pixels, torch.from_numpy(images.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": None}, "without test_labels"),
        ({"test_images": np.zeros((5, 4), np.uint8)}, r"received uint8 \(1, 4\)"),
        ({"test_images": np.zeros((5, 4, 4), np.int64)}, "int64"),
        ({"train_labels": np.array([{}] * 5)}, "cannot be read"),
        ({"train_labels": np.array(["cat"] * 5)}, "whole numbers from 0"),
        ({"train_labels": np.arange(1, 6)}, "whole numbers from 0, received int64 from 1"),
        ({"test_labels": np.arange(4)}, "received 4 and 5"),
        ({"test_images": np.zeros((5, 3, 8, 8), np.uint8)}, "own.npz: test_images: .*channels last"),
    ],
)
def test_arrays_of_another_layout_are_refused(change, message, tmp_path):
    images, labels = np.zeros((5, 4, 4), np.uint8), np.arange(5)
    arrays = {"train_images": images, "test_images": images, "train_labels": labels, "test_labels": labels}
    np.savez(tmp_path / "own.npz", **{name: a for name, a in (arrays | change).items() if a is not None})
    with pytest.raises(DataError, match=message):
        open_source("npz", tmp_path / "own.npz")


RANGES = [(0.0, 1.0, True), (-1e-6, 1.00001, True), (0.0, 209.4, False), (-1.0, 1.0, False)]


@pytest.mark.parametrize(("low", "high", "is_taken"), RANGES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_floats_are_taken_from_0_to_1(low, high, is_taken, split, tmp_path):
    """Also of the test images before any training."""
    labels = np.arange(5)
    arrays = {f"{name}_images": np.zeros((5, 4, 4)) for name in ("train", "test")}
    arrays[f"{split}_images"] = np.linspace(low, high, 5 * 4 * 4).reshape(5, 4, 4)
    np.savez(tmp_path / "own.npz", **arrays, train_labels=labels, test_labels=labels)
    said = f"own.npz: {split}_images: expected floats in .*received {low:.4g} to {high:.4g}"
    with nullcontext() if is_taken else pytest.raises(DataError, match=said):
        open_source("npz", tmp_path / "own.npz").load("train")
