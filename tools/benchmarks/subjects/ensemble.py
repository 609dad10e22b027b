"""16 members on images, split and standardised, against the same with a forward call per member."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.compare import Pair, rows, steadily
from benchmarks.setting import Setting
from stl_lightning.ensemble.fit import FittedEnsemble
from stl_lightning.ensemble.model import SpectralEnsemble
from stl_lightning.networks import MLP
from stl_lightning.spectral import SpectralSplit

B = 16
GOALS = {1: "ratio >= 5", 1024: "ratio >= 1.5"}  # images in a batch


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    seconds = setting.choose(0.3, 0.02)
    for device in setting.devices:
        for n, goal in GOALS.items():
            pair = Pair(f"stl, batch {n}", f"{B} forward calls, batch {n}", goal)

            def of_stl(n: int = n, device: str = device) -> Any:
                model, images = prepared(n, device)
                return torch.inference_mode()(lambda: model.member_logits(images))

            def of_loop(n: int = n, device: str = device) -> Any:
                model, images = prepared(n, device)
                statistics = [(model.get_buffer(f"mean_{k}"), model.get_buffer(f"std_{k}")) for k in range(B)]
                return torch.inference_mode()(lambda: one_by_one(model.spectral, model.branches, statistics, images))

            sides = {pair.name: steadily(n, of_stl, seconds), pair.against: steadily(n, of_loop, seconds)}
            values = setting.take_turns(sides, threads)
            yield from rows(values, [pair], "images / s", device=device, threads=threads, data="generated")


def prepared(n: int, device: str) -> tuple[SpectralEnsemble, Tensor]:
    """An ensemble of untrained members, and images for it."""
    spectral = SpectralSplit((1, 28, 28), 4, "raster", "dct")
    weights = torch.full((B,), 1 / B, dtype=torch.float64)
    fitted = FittedEnsemble("uniform", "log_prob", weights, 1.0, tuple(range(B)), ())
    statistics = [(torch.zeros(1, 1, 1), torch.ones(1, 1, 1)) for _ in range(B)]
    branches = [MLP((1, 7, 7), 10) for _ in range(B)]
    model = SpectralEnsemble(spectral, [(k,) for k in range(B)], statistics, branches, fitted)
    return model.eval().to(device), torch.rand(n, 1, 28, 28, device=device)


def one_by_one(
    spectral: SpectralSplit, branches: nn.ModuleList, statistics: list[tuple[Tensor, Tensor]], images: Tensor
) -> Tensor:
    """Logits (b n k)."""
    slices = zip(spectral(images), branches, statistics, strict=True)
    return torch.stack([branch((x - mean) / std) for x, branch, (mean, std) in slices])
