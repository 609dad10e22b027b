"""Crop, flip and erase as one reading map: every place of the result names the place it is read from, or none.

The map of a sample is the same for all its channels and slices, and one gather does all three. A plane is a whole
image, or a slice, whose places are the blocks of the image.

Letters: s slices, n samples, c channels, h w space.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stl_lightning.augment.boxes import erased_boxes
from stl_lightning.augment.draws import ERASE, FLIP, LEFT, N_ERASE_DRAWS, N_MOVE_DRAWS, TOP, uniform

Pair = tuple[int, int]  # vertical, horizontal

NOWHERE = -1  # read from here: zero


@dataclass(frozen=True)
class Moves:
    """What is drawn for each sample of a plane. Units: places of the plane; `pad` is divisible by `step`."""

    size: Pair
    pad: Pair  # zeros around the plane before the crop
    flip: bool
    erase: float  # probability
    step: Pair = (1, 1)  # crops start at multiples of it
    cell: Pair = (1, 1)  # boxes to erase are made of these

    def draw(self, seed: int, epoch: int, indices: Tensor | np.ndarray) -> np.ndarray:
        """Top, left, mirrored or not, and the box to erase in cells. Shapes: indices (n,) -> (n, 7) int64."""
        draws = uniform(seed, epoch, indices, N_MOVE_DRAWS)
        steps = 2 * np.array(self.pad) // self.step + 1
        offsets = (draws[:, [TOP, LEFT]] * steps).astype(np.int64) * self.step
        mirrored = draws[:, [FLIP]] < (0.5 if self.flip else 0)
        erased = np.zeros((len(draws), 4), np.int64)
        if self.erase:
            # Counted from the top left corner, so that a box may reach into the padding of a slice.
            cells = (-(-side // cell) for side, cell in zip(self.size, self.cell, strict=True))
            erased = erased_boxes(uniform(seed, epoch, indices, N_ERASE_DRAWS, first=ERASE), self.erase, *cells)
        return np.concatenate([offsets, mirrored, erased], 1)

    def source(self, drawn: Tensor) -> Tensor:
        """The reading map of each sample. Shapes: what `draw` returned (n, 7) -> (n, h, w) int64."""
        top, left, mirrored = drawn[:, :3].unbind(1)
        source = cropped(self.size, self.pad, top, left)
        if self.flip:
            source = torch.where(mirrored.bool()[:, None, None], source.flip(-1), source)
        return source.masked_fill(inside(drawn[:, 3:], self.size, self.cell), NOWHERE) if self.erase else source


def cropped(size: Pair, pad: Pair, top: Tensor, left: Tensor) -> Tensor:
    """The map of a window of the plane that has zeros around it.

    Equivalent: `crop(pad(plane, pad), top, left, h, w)` of torchvision.transforms.functional, sample by sample.
    Shapes: top and left (n,) in 0..2 pad -> (n, h, w) int64.
    """
    return _windows(size, pad, top.device)[top, left]


@lru_cache(maxsize=16)
def _windows(size: Pair, pad: Pair, device: torch.device) -> Tensor:
    """All windows of the plane with zeros around it, a view of one padded map: (top, left, h, w)."""
    (h, w), (rows, columns) = size, pad
    places = torch.arange(h * w, device=device).view(h, w)
    padded = F.pad(places, (columns, columns, rows, rows), value=NOWHERE)
    return padded.unfold(0, h, 1).unfold(1, w, 1)


def inside(boxes: Tensor, size: Pair, cell: Pair = (1, 1)) -> Tensor:
    """Whether a place lies in the box of its sample.

    Shapes: boxes (n, 4) of top, left, height and width in cells -> (n, h, w) bool.
    """
    top, left, height, width = boxes[..., None].unbind(1)  # each (n, 1)
    row = torch.arange(size[0], device=boxes.device) // cell[0] - top
    column = torch.arange(size[1], device=boxes.device) // cell[1] - left
    return ((row >= 0) & (row < height))[:, :, None] & ((column >= 0) & (column < width))[:, None]


def read(planes: Tensor, source: Tensor) -> Tensor:
    """The planes that the maps describe, zero where they read from nowhere.

    Equivalent: `numpy.take_along_axis` on flattened planes.
    Shapes: planes (n, c, h, w) or (s, n, c, h, w) of any dtype, source (n, h, w) -> as planes.
    """
    flat, places = planes.flatten(-2), source.flatten(-2)[:, None]
    gathered = flat.gather(-1, places.clamp(min=0).expand_as(flat))
    return gathered.mul_(places >= 0).view(planes.shape)
