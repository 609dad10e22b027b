"""The images that all methods train on: a part of CIFAR-10 in one file."""

from pathlib import Path

import numpy as np
import torch

from networking.work import Work
from stl_lightning.sources import open_source


def write_images(work: Work, data_root: Path) -> None:
    """The first images of the training set, into the file `work.images`.

    Raises: DataError if CIFAR-10 is not in `data_root`.
    """
    stored = open_source("cifar10", data_root).load("train")
    pixels = stored.fetch(torch.arange(work.n_images + work.n_held_out)).permute(0, 2, 3, 1).numpy()
    labels = stored.labels[: len(pixels)].numpy()
    few = slice(0, 8)  # the format wants test images too; nobody looks at them
    np.savez(work.images, train_images=pixels, train_labels=labels, test_images=pixels[few], test_labels=labels[few])
