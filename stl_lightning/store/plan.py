"""What is decided before the first slice is written, and kept so that a later process goes on in the same way.

Letters: n samples, c channels, h w space.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from stl_lightning.images import ImageArray, ImageFiles, as_float
from stl_lightning.paths import StorePaths, read_json, write_json
from stl_lightning.sources import Source
from stl_lightning.spectral import TRANSFORMS, SpectralSplit, build_basis
from stl_lightning.store.encoding import DTYPES, best_scale
from stl_lightning.store.manifest import ELSEWHERE, check_settings

# The steps of int8 are chosen on at most so many images and bytes of float32 pixels.
SAMPLE_IMAGES = 4096
SAMPLE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Plan:
    """Settings, matrix, and for int8 the steps: `scales` of each slice, per channel."""

    settings: dict[str, Any]
    matrix: list[list[float]]
    scales: list[list[float] | None]

    @property
    def scale_tensors(self) -> list[Tensor | None]:
        """(c, 1, 1) of each slice."""
        return [None if scale is None else torch.tensor(scale)[:, None, None] for scale in self.scales]


def store_settings(source: Source, spectral: SpectralSplit, dtype: str, val_size: int | float | None) -> dict[str, Any]:
    """What decides the content of a store; the seed and the validation split only where they do."""
    settings = {
        "source": source.name,
        "fingerprint": source.fingerprint,
        "image_shape": source.image_shape,
        "reorganisation": spectral.reorganisation,
        "block": spectral.block,
        "transform": spectral.transform,
        "pad": spectral.pad,
        "dtype": dtype,
    }
    if TRANSFORMS[spectral.transform].fit is not None:
        return settings | {"seed": spectral.seed, "val_size": val_size}
    matrices = [build_basis(spectral.transform, spectral.block, seed).matrix for seed in (0, 1)]
    return settings if torch.equal(*matrices) else settings | {"seed": spectral.seed}


def open_plan(
    paths: StorePaths,
    settings: dict[str, Any],
    images: ImageArray | ImageFiles,
    spectral: SpectralSplit,
    fit: Callable[[], object] | None,
) -> Plan:
    """The plan of a writer that was killed, or a new one. The split has the matrix of the plan afterwards."""
    if paths.plan.exists():
        plan = Plan(**read_json(paths.plan))
        check_settings(plan.settings, settings, paths.folder, ELSEWHERE)
        spectral.matrix.copy_(torch.tensor(plan.matrix))
        spectral.is_fitted = True
        return plan
    if fit is not None and not spectral.is_fitted:
        fit()
    plan = Plan(settings, spectral.matrix.tolist(), _choose_scales(images, spectral, settings["dtype"]))
    write_json(paths.plan, asdict(plan))
    return plan


def _choose_scales(images: ImageArray | ImageFiles, spectral: SpectralSplit, dtype: str) -> list[list[float] | None]:
    if DTYPES[dtype].is_floating_point:
        return [None] * spectral.n_slices
    # Evenly spaced, since folders of images are stored class by class.
    n_sample = min(len(images), SAMPLE_IMAGES, max(16, SAMPLE_BYTES // (4 * prod(spectral.image_shape))))
    sample = images.fetch(torch.linspace(0, len(images) - 1, n_sample).long())
    return [best_scale(x).flatten().tolist() for x in spectral(as_float(sample))]
