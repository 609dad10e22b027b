"""The ensemble as one module: images in, log-probabilities out.

Letters: s members of a group, n samples, f features, c channels, h w space, k classes.
"""

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
from stl_lightning.paths import write_atomically
from stl_lightning.spectral import SpectralSplit
from stl_lightning.stacked import can_stack, chain, run_chain, stack
from stl_lightning.training import BranchJob, load_best


class SpectralEnsemble(nn.Module):
    """Splits images, runs each branch on its slices, and adds their outputs up.

    Equivalent: `fitted.log_probs` of the stacked branch outputs, with `flips` of their means over each image and its
    mirror image. Only the slices are computed that a branch reads, in
    one pass. Branches of one architecture, if it is a chain that `stacked` can batch, are copied into one network;
    the others are called one after the other.
    Shapes: images (n, c, H, W), uint8 or floating point of any precision, which is then in [0, 1] (not checked: it
    would cost a pass over the images) -> log-probabilities (n, k).
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
        self.fitted = fitted
        widths = [sum(spectral.slice_shape(k)[0] for k in ks) for ks in slices]
        groups = _groups(branches)
        self.groups = nn.ModuleList(
            MemberGroup([branches[i] for i in group], [statistics[i] for i in group]) for group in groups
        )
        order = [i for group in groups for i in group]  # of the members, as they are computed
        self.slices = [k for i in order for k in slices[i]]
        self.widths = [sum(widths[i] for i in group) for group in groups]
        self.places = [order.index(i) for i in range(len(order))] if order != sorted(order) else None

    def forward(self, images: Tensor) -> Tensor:
        return self.fitted.log_probs(self.member_logits(images))

    def member_logits(self, images: Tensor) -> Tensor:
        """The logits (b, n, k) of every branch."""
        logits = self._logits(images)
        return (logits + self._logits(images.flip(-1))) / 2 if self.fitted.flips else logits

    def _logits(self, images: Tensor) -> Tensor:
        precision = self.spectral.matrix.dtype
        pixels = images.to(precision) if images.is_floating_point() else images
        parts = self.spectral.slices(pixels, self.slices).to(precision).split(self.widths, 1)
        logits = [group(part) for group, part in zip(self.groups, parts, strict=True)]
        together = torch.cat(logits) if len(logits) > 1 else logits[0]
        return together if self.places is None else together[self.places]


class MemberGroup(nn.Module):
    """Members that are computed together, or one alone, on raw slices.

    Shapes: what each member reads, side by side as channels (n, s c, h, w) -> logits (s, n, k).
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, branches: Sequence[nn.Module], statistics: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        mean, std = (torch.stack(values)[:, None] for values in zip(*statistics, strict=True))  # (s, 1, c, 1, 1)
        self.register_buffer("scale", 1 / std)
        self.register_buffer("shift", -mean / std)
        self.network = stack(branches) if len(branches) > 1 else branches[0]
        self.layers = chain(self.network) if len(branches) > 1 else None  # listed once: a call costs microseconds

    def forward(self, slices: Tensor) -> Tensor:
        x = slices.unflatten(1, (len(self.scale), -1)).transpose(0, 1)
        if self.layers is None:
            return self.network(self._standardised(x)[0])[None]
        parts = x.split(PART, 1) if x.device.type == "cpu" else [x]  # a GPU wants few large steps
        logits = [self._stacked(part) for part in parts]
        return torch.cat(logits, 1) if len(logits) > 1 else logits[0]

    def _standardised(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)

    def _stacked(self, x: Tensor) -> Tensor:
        """Raw slices (s, n, c, h, w) -> logits (s, n, k)."""
        assert self.layers is not None, "a member alone is called as it is"
        return run_chain(self.layers, self._standardised(x))


def _groups(branches: Sequence[nn.Module]) -> list[list[int]]:
    """Positions of the branches that can be one network: chains that flatten a slice, and print the same.

    A layer that a chain may have prints all its sizes and options. Convolutions are not among them: stacked, they
    would be grouped convolutions, which on a CPU take longer than the branches one after the other.
    """
    groups: dict[object, list[int]] = {}
    for i, branch in enumerate(branches):
        is_batched = chain(branch) is not None and can_stack(branch)
        groups.setdefault(repr(branch) if is_batched else i, []).append(i)
    return list(groups.values())


PART = 256  # samples a CPU takes through all layers at once, so that what is between two layers stays in its cache


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
    settings = {name: getattr(fitted, name) for name in ("weighting", "space", "temperature", "members", "cv", "flips")}
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
