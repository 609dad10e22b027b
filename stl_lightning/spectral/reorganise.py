"""Three ways to cut an image into tubes of B pixels, and the way back.

Axes: H W the image, h w one slice, b = bh * bw components of a tube, row-major in the block.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

Block = tuple[int, int]  # (bh, bw)


@dataclass(frozen=True)
class Reorganisation:
    """One row of `REORGANISATIONS`: the image as a view of blocks, the way back, and one sum over a block."""

    to_blocks: Callable[[Tensor, Block], Tensor]  # (..., H, W) -> (..., h, w, bh, bw)
    from_blocks: Callable[[Tensor, Block], Tensor]  # (..., h, w, bh, bw) -> (..., H, W)
    combine: Callable[[Tensor, Tensor], Tensor]  # (..., H, W), weights (bh, bw) -> (..., h, w)

    def forward(self, images: Tensor, block: Block) -> Tensor:
        """Tubes of the image; undone by `inverse`. Shapes: (..., H, W) -> (..., H/bh, W/bw, bh*bw)."""
        return self.to_blocks(images, block).flatten(-2)

    def inverse(self, tubes: Tensor, block: Block) -> Tensor:
        """The image of the tubes that `forward` made. Shapes: (..., h, w, bh*bw) -> (..., h*bh, w*bw)."""
        return self.from_blocks(tubes.unflatten(-1, block), block)


def polyphase_blocks(images: Tensor, block: Block) -> Tensor:
    """Component (row, col) is `images[..., row::bh, col::bw]`; undone by `polyphase_image`.

    `torch.nn.functional.pixel_unshuffle` with the components last instead of in the channels.
    """
    return images.unflatten(-2, (-1, block[0])).unflatten(-1, (-1, block[1])).transpose(-3, -2)


def polyphase_image(blocks: Tensor, block: Block) -> Tensor:
    """The image whose `polyphase_blocks` these are; `torch.nn.functional.pixel_shuffle`."""
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)


def polyphase_combine(images: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the components; `torch.nn.functional.conv2d` with the block as stride.

    Not that function, because GPUs round its inputs to TF32 by default. Whole image rows are added first,
    along contiguous pixels, then neighbours within the sum.
    """
    bh, bw = weights.shape
    rows = images.unflatten(-2, (-1, bh))  # (..., h, bh, W)
    along_row = weights.repeat(1, images.shape[-1] // bw)  # (bh, W)
    total = rows[..., 0, :] * along_row[0]
    for row in range(1, bh):
        total = torch.addcmul(total, rows[..., row, :], along_row[row])
    return total.unflatten(-1, (-1, bw)) @ weights.new_ones(bw)


def tile_blocks(images: Tensor, block: Block) -> Tensor:
    """Component (row, col) is tile (row, col) of a bh x bw grid of tiles; undone by `tile_image`."""
    tiles = images.unflatten(-2, (block[0], -1)).unflatten(-1, (block[1], -1))
    return tiles.movedim((-4, -2), (-2, -1))


def tile_image(blocks: Tensor, block: Block) -> Tensor:
    """The image whose `tile_blocks` these are."""
    return blocks.movedim((-2, -1), (-4, -2)).flatten(-4, -3).flatten(-2)


def tile_combine(images: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of the tiles."""
    bh, bw = weights.shape
    tiles = tile_blocks(images, (bh, bw))
    total = torch.zeros_like(tiles[..., 0, 0])
    for row, column in product(range(bh), range(bw)):
        total = torch.addcmul(total, tiles[..., row, column], weights[row, column])
    return total


def raster_blocks(images: Tensor, block: Block) -> Tensor:
    """Each run of bh*bw pixels in row-major order is one tube; undone by `raster_image`.

    The H*W/b tubes are laid out as (H/bh, W/bw), which keeps their order but not their place in the image.
    """
    height, width = images.shape[-2:]
    return images.flatten(-2).unflatten(-1, (height // block[0], width // block[1], *block))


def raster_image(blocks: Tensor, block: Block) -> Tensor:
    """The image whose `raster_blocks` these are."""
    h, w = blocks.shape[-4:-2]
    return blocks.flatten(-4).unflatten(-1, (h * block[0], w * block[1]))


def raster_combine(images: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum within each run of pixels."""
    bh, bw = weights.shape
    return raster_blocks(images, (bh, bw)).flatten(-2) @ weights.flatten()


REORGANISATIONS: dict[str, Reorganisation] = {
    "polyphase": Reorganisation(polyphase_blocks, polyphase_image, polyphase_combine),
    "tiles": Reorganisation(tile_blocks, tile_image, tile_combine),
    "raster": Reorganisation(raster_blocks, raster_image, raster_combine),
}
