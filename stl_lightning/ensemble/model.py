"""The ensemble as one module: images in, log-probabilities out."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from stl_lightning.ensemble.fit import FittedEnsemble
from stl_lightning.errors import RunError
from stl_lightning.images import as_float
from stl_lightning.paths import write_atomically
from stl_lightning.spectral import SpectralSplit
from stl_lightning.training import BranchJob, load_best


class SpectralEnsemble(nn.Module):
    """Splits images, runs each branch on its slices, and adds their outputs up.

    Equivalent: `fitted.log_probs` of the stacked branch outputs. A branch computes only the slices it reads.
    Shapes: images (n, c, H, W), uint8 or float in [0, 1] -> log-probabilities (n, k).
    """

    def __init__(
        self,
        spectral: SpectralSplit,
        slices: Sequence[tuple[int, ...]],
        statistics: Sequence[tuple[Tensor, Tensor]],
        branches: Sequence[nn.Module],
        fitted: FittedEnsemble,
    ) -> None:
        super().__init__()
        self.spectral = spectral
        self.slices = tuple(slices)
        self.branches = nn.ModuleList(branches)
        self.fitted = fitted
        for i, (mean, std) in enumerate(statistics):
            self.register_buffer(f"mean_{i}", mean)
            self.register_buffer(f"std_{i}", std)

    def forward(self, images: Tensor) -> Tensor:
        return self.fitted.log_probs(self.member_logits(images))

    def member_logits(self, images: Tensor) -> Tensor:
        """The logits (b, n, k) of every branch."""
        pixels = as_float(images)
        return torch.stack([branch(self._standardised(pixels, i)) for i, branch in enumerate(self.branches)])

    def _standardised(self, pixels: Tensor, i: int) -> Tensor:
        mean, std = self.get_buffer(f"mean_{i}"), self.get_buffer(f"std_{i}")
        return (self.spectral.slices(pixels, self.slices[i]) - mean) / std


def build_ensemble(jobs: Sequence[BranchJob], fitted: FittedEnsemble) -> SpectralEnsemble:
    """The model of the fitted members, with the weights of their best checkpoints.

    Raises: CheckpointError if a member's checkpoint cannot be read; RunError if a member has no job.
    """
    by_branch = {job.branch: job for job in jobs}
    lost = [member for member in fitted.members if member not in by_branch]
    if lost:
        raise RunError(f"members {lost} of the ensemble are gone; run `stl ensemble` again to do without them")
    members = [by_branch[member] for member in fitted.members]
    branches = [load_best(job) for job in members]
    statistics = [(state["mean"], state["std"]) for state in (job.data.state_dict()["branches"][0] for job in members)]
    slices = [job.data.reads[0] for job in members]
    return SpectralEnsemble(members[0].data.spectral, slices, statistics, branches, fitted).eval().requires_grad_(False)


def save_fitted(fitted: FittedEnsemble, path: Path) -> None:
    """Undone by `load_fitted`."""
    settings = {name: getattr(fitted, name) for name in ("weighting", "space", "temperature", "members", "cv")}
    blob = safetensors.torch.save({"weights": fitted.weights.contiguous()}, {"fitted": json.dumps(settings)})
    write_atomically(path, lambda file: file.write(blob))


def load_fitted(path: Path) -> FittedEnsemble:
    """Undo `save_fitted`. Raises: RunError if the file is missing or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            settings: dict[str, Any] = json.loads(file.metadata()["fitted"])
            weights = file.get_tensor("weights")
    except (SafetensorError, OSError, KeyError) as error:
        raise RunError(f"cannot read {path}: {error}. Make it with `stl ensemble`") from error
    settings |= {name: tuple(settings[name]) for name in ("members", "cv")}
    return FittedEnsemble(weights=weights, **settings)
