"""Every shipped config is complete: it loads by itself and trains a few real steps, some in small batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from stl_lightning.__main__ import main
from stl_lightning.paths import RunPaths
from stl_lightning.training import is_emulated

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHORT = ["--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
SMALL = ["--data.batch_size=16", "--data.eval_batch_size=16"]
FEW_IMAGES = ["--data.val_size=100", "--data.batch_size=4", "--data.eval_batch_size=4", "--data.num_workers=0"]

Real = Callable[[str], Path]


def photographs(real_data: Real, folder: Path) -> Path:
    """The 2,000 photographs of ImageNet classes, or as many made-up pictures as a few steps need."""
    try:
        return real_data("imagenette") / "imagenette-small"
    except pytest.skip.Exception:
        noise = torch.Generator().manual_seed(0)
        for split, n_images in {"train": 80, "val": 10}.items():
            for label in ("ant", "bee"):
                (folder / split / label).mkdir(parents=True)
                for i in range(n_images):
                    pixels = torch.randint(0, 256, (240, 320, 3), dtype=torch.uint8, generator=noise)
                    Image.fromarray(pixels.numpy()).save(folder / split / label / f"{i}.jpeg")
        return folder


DATA: dict[str, Callable[[Real, Path], list[str]]] = {
    "digits": lambda real, folder: [],
    **{name: lambda real, folder: [f"--data.root={real('mnist')}"] for name in ("mnist", "mnist-best", "mnist-conv")},
    **{name: lambda real, folder: [f"--data.root={real('cifar10')}", *SMALL] for name in ("cifar10", "cifar10-best")},
    "imagenet": lambda real, folder: [
        "--data.source=imagefolder",
        f"--data.root={photographs(real, folder / 'photographs')}",
        *FEW_IMAGES,
    ],
}


def test_every_config_is_tried() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(DATA)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["fit", "baseline"])
@pytest.mark.parametrize("name", DATA)
def test_a_config_trains(name: str, command: str, real_data: Real, tmp_path: Path) -> None:
    config = CONFIGS / f"{name}.yaml"
    branch = ["--run.branches=[1]"] if command == "fit" else []
    if is_emulated("bf16-mixed", torch.device("cpu")):  # which takes minutes
        branch.append("--trainer.precision=32-true")
    args = [command, "--config", str(config), f"--run.root={tmp_path / 'runs'}", *SHORT, *branch]
    assert main(args + DATA[name](real_data, tmp_path)) == 0
    run = RunPaths(tmp_path / "runs" / yaml.safe_load(config.read_text())["run"]["name"])
    paths = run.branch(1) if command == "fit" else run.baseline.branch(0)
    checkpoint = torch.load(paths.last, weights_only=True)
    assert checkpoint["global_step"] == 3
    assert paths.best.exists()


PUBLISHED = {"mnist": (16, (1, 7, 7)), "cifar10": (4, (3, 16, 16)), "imagenet": (16, (3, 56, 56))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_settings(name: str) -> None:
    """Number of branches and slice size of the poster, whatever data are there."""
    from stl_lightning.spectral import SpectralSplit

    data = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["data"]
    image = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "imagenet": (3, 224, 224)}[name]
    split = SpectralSplit(image, data["block"], data["reorganisation"], data["transform"])
    assert (split.n_slices, split.slice_shape(0)) == PUBLISHED[name]
