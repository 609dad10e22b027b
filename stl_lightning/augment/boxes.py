"""Boxes from uniform draws: the resized crop of a file, and what random erasing and cutmix take out of an image.

Letters: n samples, h w the sides of the grid that a box lies on.
"""

import math

import numpy as np
from torch import Tensor

from stl_lightning.augment.draws import BOX, N_BOX_DRAWS, N_TRIES, uniform

CROP_RATIO = (3 / 4, 4 / 3)
ERASED_AREA = (0.02, 0.33)
ERASED_RATIO = (0.3, 3.3)


def box_draws(seed: int, epoch: int, indices: Tensor | np.ndarray) -> np.ndarray:
    """The draws (n, N_BOX_DRAWS) for `resized_crop_box`, which needs the size of each file too."""
    return uniform(seed, epoch, indices, N_BOX_DRAWS, first=BOX)


def _between(uniform_draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * uniform_draws


def _sides(area: np.ndarray, ratio_draws: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Two sides of an area, rounded, whose ratio first / second is log-uniform between two bounds."""
    drawn = np.exp(_between(ratio_draws, math.log(ratio[0]), math.log(ratio[1])))
    return np.rint(np.sqrt(area * drawn)), np.rint(np.sqrt(area / drawn))


def resized_crop_box(
    uniform_draws: np.ndarray, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The box (top, left, height, width) of a random crop that is resized afterwards.

    Equivalent: `torchvision.transforms.RandomResizedCrop.get_params(image, scale, (3/4, 4/3))`.
    Shapes: uniform_draws (N_BOX_DRAWS,) in [0, 1). Units: pixels; scale: share of the area, from and to.
    """
    area = height * width * _between(uniform_draws[:N_TRIES], *scale)
    widths, heights = _sides(area, uniform_draws[N_TRIES : 2 * N_TRIES], CROP_RATIO)
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if not fits.any():
        return _central_box(height, width)
    first = int(fits.argmax())
    h, w = int(heights[first]), int(widths[first])
    top, left = uniform_draws[-2:] * (height - h + 1, width - w + 1)
    return int(top), int(left), h, w


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    h = min(height, round(width / CROP_RATIO[0]))
    w = min(width, round(height * CROP_RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def erased_boxes(uniform_draws: np.ndarray, probability: float, height: int, width: int) -> np.ndarray:
    """The boxes (top, left, height, width) of random erasing; a sample that is not chosen gets a height of 0.

    Equivalent: `torchvision.transforms.RandomErasing.get_params`, but a side that does not fit is cut down to the
    grid, and one below half a place is one place, where that draws again: small grids would never see small boxes.
    Shapes: uniform_draws (n, N_ERASE_DRAWS) -> (n, 4) int64. Units: places of the grid.
    Source: Zhong et al. 2020, algorithm 1; the ratio of the sides is log-uniform, as in torchvision.
    """
    chosen, area, ratio, top, left = uniform_draws.T
    heights, widths = _sides(height * width * _between(area, *ERASED_AREA), ratio, ERASED_RATIO)
    heights, widths = heights.clip(1, height), widths.clip(1, width)
    top, left = top * (height - heights + 1), left * (width - widths + 1)
    return np.stack([top, left, heights * (chosen < probability), widths], 1).astype(np.int64)


def cut_boxes(uniform_draws: np.ndarray, area: np.ndarray, height: int, width: int) -> np.ndarray:
    """The boxes (top, left, height, width) of cutmix: of the image's shape, around any centre, clipped to the image.

    Shapes: uniform_draws (n, 2), row and column of the centre; area (n,), wanted share -> (n, 4) int64.
    Units: places of the grid, to which the edges are rounded. Source: Yun et al. 2019, section 3.1.
    """
    sides = np.array([height, width])
    half = np.sqrt(area)[:, None] / 2
    low = np.rint((uniform_draws - half) * sides).clip(0, sides)
    high = np.rint((uniform_draws + half) * sides).clip(0, sides)
    return np.concatenate([low, high - low], 1).astype(np.int64)
