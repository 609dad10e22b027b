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
    seconds = setting.choose(0.3, 0.02)
    for device, threads in [(device, setting.n_threads(n)) for device in setting.devices for n in (1, 2)]:
        for n, goal in GOALS.items():
            pair = Pair(f"stl, batch {n}", f"{B} forward calls, batch {n}", goal)

            def of_stl(n: int = n, device: str = device) -> Any:
                branches, statistics, spectral = members(device)
                model, images = ensemble(spectral, statistics, branches), torch.rand(n, 1, 28, 28, device=device)
                return torch.inference_mode()(lambda: model.member_logits(images))

            def of_loop(n: int = n, device: str = device) -> Any:
                branches, statistics, spectral = members(device)
                images = torch.rand(n, 1, 28, 28, device=device)
                return torch.inference_mode()(lambda: one_by_one(spectral, branches, statistics, images))

            sides = {pair.name: steadily(n, of_stl, seconds), pair.against: steadily(n, of_loop, seconds)}
            values = setting.take_turns(sides, threads)
            yield from rows(values, [pair], "images / s", device=device, threads=threads, data="generated")


Members = tuple[list[nn.Module], list[tuple[Tensor, Tensor]], SpectralSplit]


def members(device: str) -> Members:
    """Untrained branches in evaluation mode, the statistics of their slices, and the split they belong to."""
    statistics = [(torch.zeros(1, 1, 1, device=device), torch.ones(1, 1, 1, device=device)) for _ in range(B)]
    branches = [MLP((1, 7, 7), 10).eval().to(device) for _ in range(B)]
    return list(branches), statistics, SpectralSplit((1, 28, 28), 4, "raster", "dct").to(device)


def ensemble(
    spectral: SpectralSplit, statistics: list[tuple[Tensor, Tensor]], branches: list[nn.Module]
) -> SpectralEnsemble:
    weights = torch.full((B,), 1 / B, dtype=torch.float64)
    fitted = FittedEnsemble("uniform", "log_prob", weights, 1.0, tuple(range(B)), ())
    device = statistics[0][0].device
    return SpectralEnsemble(spectral, [(k,) for k in range(B)], statistics, branches, fitted).eval().to(device)


def one_by_one(
    spectral: SpectralSplit, branches: list[nn.Module], statistics: list[tuple[Tensor, Tensor]], images: Tensor
) -> Tensor:
    """Logits (b n k)."""
    slices = zip(spectral(images), branches, statistics, strict=True)
    return torch.stack([branch((x - mean) / std) for x, branch, (mean, std) in slices])
