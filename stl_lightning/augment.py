"""Pixel augmentation that every rank can repeat alone, because each random number is a hash.

Ranks that own different slices of one image must see the same crop and flip of it, and they never talk. So
a draw depends on (seed, epoch, sample, number of the draw); batch size, worker, rank and order cannot
change it.

Letters: n samples, c channels, h w space.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stl_lightning.errors import ConfigError

# Draw numbers of one sample. A new augmentation takes new numbers, so that the old ones keep their values.
FLIP, TOP, LEFT, BOX = 0, 1, 2, 3
N_TRIES = 10  # torchvision's number of attempts at a box that fits
N_BOX_DRAWS = 2 * N_TRIES + 2
RATIO = (3 / 4, 4 / 3)

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def _absorb(state: np.ndarray, value: np.ndarray) -> np.ndarray:
    # + 1: a zero would leave the state as it is, and seed 0, epoch 0, sample 0 would share their first steps.
    return _mix(state + GAMMA * (value + np.uint64(1)))


def _word(number: int) -> np.ndarray:
    # An array, not a scalar: NumPy warns of the intended overflow on scalars only.
    return np.array([number % 2**64], dtype=np.uint64)


def uniform(seed: int, epoch: int, indices: Tensor | np.ndarray, n_draws: int) -> np.ndarray:
    """Random numbers in [0, 1), float64, that depend on (seed, epoch, sample index, draw number) alone.

    Shapes: indices (n,) -> (n, n_draws); the first columns do not depend on n_draws.
    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied after each of the four words.
    """
    samples = torch.as_tensor(indices).cpu().numpy().astype(np.uint64)
    state = _absorb(_absorb(np.zeros(1, np.uint64), _word(seed)), _word(epoch))
    draws = _absorb(_absorb(state, samples)[:, None], np.arange(n_draws, dtype=np.uint64))
    return (draws >> np.uint64(11)) * 2.0**-53


def crop(images: Tensor, top: Tensor, left: Tensor, pad: int) -> Tensor:
    """Pad each image with zeros and cut its own window of the original size.

    Equivalent: `crop(pad(image, pad), top, left, h, w)` of torchvision.transforms.functional, image by image.
    Shapes: images (n, c, h, w), top and left (n,) in 0..2 pad -> (n, c, h, w). Units: pixels.
    """
    n, _, h, w = images.shape
    windows = F.pad(images, (pad, pad, pad, pad)).unfold(2, h, 1).unfold(3, w, 1)  # a view: n c top left h w
    return windows[torch.arange(n, device=images.device), :, top, left]


def flip(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirror the chosen images left to right; its own inverse.

    Shapes: images (n, c, h, w), chosen (n,) bool -> (n, c, h, w).
    """
    return torch.where(chosen[:, None, None, None], images.flip(-1), images)


def box_draws(seed: int, epoch: int, indices: Tensor | np.ndarray) -> np.ndarray:
    """The draws (n, N_BOX_DRAWS) for `resized_crop_box`, which needs the size of each file too."""
    return uniform(seed, epoch, indices, BOX + N_BOX_DRAWS)[:, BOX:]


def resized_crop_box(
    uniform_draws: np.ndarray, height: int, width: int, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """The box (top, left, height, width) of a random crop that is resized afterwards.

    Equivalent: `torchvision.transforms.RandomResizedCrop.get_params(image, scale, (3/4, 4/3))`.
    Shapes: uniform_draws (N_BOX_DRAWS,) in [0, 1). Units: pixels; scale: share of the area, from and to.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform_draws[:N_TRIES])
    log_ratio = math.log(RATIO[1]) * (2 * uniform_draws[N_TRIES : 2 * N_TRIES] - 1)  # RATIO[0] = 1 / RATIO[1]
    ratio = np.exp(log_ratio)
    widths, heights = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    if not fits.any():
        return _central_box(height, width)
    first = int(fits.argmax())
    h, w = int(heights[first]), int(widths[first])
    top, left = uniform_draws[-2:] * (height - h + 1, width - w + 1)
    return int(top), int(left), h, w


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    h = min(height, round(width / RATIO[0]))
    w = min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class PixelAugment:
    """Random crop and horizontal flip of whole images, the same on all ranks.

    Args:
        crop_pad: Pixels of zero padding before a random crop of the original size; 0 is off.
        flip: Mirror every second image on average.
        resized_crop: Share of the area, from and to, that a resized crop keeps; (0.08, 1) in most ImageNet recipes. It
            is done where a file is decoded, at full resolution, see `resized_crop_box`.

    Raises: ConfigError for values out of range.
    """

    crop_pad: int = 0
    flip: bool = False
    resized_crop: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.crop_pad < 0:
            raise ConfigError(f"data.augment.crop_pad: expected 0 or more pixels, received {self.crop_pad}")
        scale = self.resized_crop
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ConfigError(
                f"data.augment.resized_crop: expected (low, high) with 0 < low <= high <= 1, received {scale}"
            )

    def __call__(self, images: Tensor, seed: int, epoch: int, indices: Tensor | np.ndarray) -> Tensor:
        """Crop and flip; `resized_crop` has been done by then.

        Shapes: images (n, c, h, w) of any dtype, indices (n,) in the data set -> (n, c, h, w).
        """
        draws = torch.from_numpy(uniform(seed, epoch, indices, BOX)).to(images.device)
        if self.crop_pad:
            top, left = (draws[:, [TOP, LEFT]] * (2 * self.crop_pad + 1)).long().T
            images = crop(images, top, left, self.crop_pad)
        return flip(images, draws[:, FLIP] < 0.5) if self.flip else images
