"""Three ways to cut an image into tubes of B pixels, and the way back.

Axes: H W the image, h w one slice, b = bh * bw components of a tube, row-major in the block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Block = tuple[int, int]  # (bh, bw)


@dataclass(frozen=True)
class Reorganisation:
    """One row of `REORGANISATIONS`: the image as a view of blocks, the way back, and the components one a row.

    `combine` is the sum of the components with weights u[row] v[col] in two cheap steps, where there are two.
    """

    to_blocks: Callable[[Tensor, Block], Tensor]  # (..., H, W) -> (..., h, w, bh, bw)
    from_blocks: Callable[[Tensor, Block], Tensor]  # (..., h, w, bh, bw) -> (..., H, W)
    components: Callable[[Tensor, Block], Tensor]  # (..., H, W) -> (bh*bw, tubes), what a matrix multiplies
    combine: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # (..., H, W), u (bh,), v (bw,) -> (..., h, w)

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


def polyphase_components(images: Tensor, block: Block) -> Tensor:
    """Component j of every tube as row j; `polyphase_blocks` with the components first, flattened.

    A copy of that strided view would move single pixels. A band of bh image rows, seen as one pixel with bh*W
    channels in channels_last memory, is what `torch.channel_shuffle` transposes in vector registers:
    (bh, w, bw) -> (bw, bh, w). What is left to copy are runs of w pixels.
    """
    (bh, bw), width = block, images.shape[-1]
    bands = images.reshape(1, -1, 1, bh * width).permute(0, 3, 1, 2)
    shuffled = torch.channel_shuffle(bands, bh * width // bw)
    runs = shuffled.permute(0, 2, 3, 1).unflatten(-1, (bw, bh, width // bw)).flatten(0, 2)  # (bands, bw, bh, w)
    return runs.permute(2, 1, 0, 3).flatten(2).flatten(0, 1)


def polyphase_combine(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The sum of components (row, col) weighted by vertical[row] * horizontal[col], without forming them.

    Neighbours in a row are contiguous, so they are summed first; what is left has whole rows of w pixels.
    Shapes: (..., H, W), (bh,), (bw,) -> (..., H/bh, W/bw).
    """
    bh, bw = len(vertical), len(horizontal)
    height, width = images.shape[-2:]
    rows = torch.mv(images.reshape(-1, bw), horizontal).view(*images.shape[:-2], height // bh, bh, width // bw)
    return _weighted_sum(rows.unbind(-2), vertical)


def _weighted_sum(parts: Sequence[Tensor], weights: Tensor) -> Tensor:
    first, *others = zip(parts, weights.tolist(), strict=True)
    total = first[0] * first[1]
    for part, weight in others:
        total.add_(part, alpha=weight)
    return total


def tile_blocks(images: Tensor, block: Block) -> Tensor:
    """Component (row, col) is tile (row, col) of a bh x bw grid of tiles; undone by `tile_image`."""
    tiles = images.unflatten(-2, (block[0], -1)).unflatten(-1, (block[1], -1))
    return tiles.movedim((-4, -2), (-2, -1))


def tile_image(blocks: Tensor, block: Block) -> Tensor:
    """The image whose `tile_blocks` these are."""
    return blocks.movedim((-2, -1), (-4, -2)).flatten(-4, -3).flatten(-2)


def tile_components(images: Tensor, block: Block) -> Tensor:
    """Tile j of every image as row j; `tile_blocks` with the components first, flattened."""
    return tile_blocks(images, block).movedim((-2, -1), (0, 1)).flatten(2).flatten(0, 1)


def tile_combine(images: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """The sum of tiles (row, col) weighted by vertical[row] * horizontal[col]; shapes as in `polyphase_combine`."""
    band = _weighted_sum(images.unflatten(-2, (len(vertical), -1)).unbind(-3), vertical)
    return _weighted_sum(band.unflatten(-1, (len(horizontal), -1)).unbind(-2), horizontal)


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


def raster_components(images: Tensor, block: Block) -> Tensor:
    """Pixel j of every run as row j: a transposed view, for a tube is contiguous."""
    return images.reshape(-1, block[0] * block[1]).T


REORGANISATIONS: dict[str, Reorganisation] = {
    "polyphase": Reorganisation(polyphase_blocks, polyphase_image, polyphase_components, polyphase_combine),
    "tiles": Reorganisation(tile_blocks, tile_image, tile_components, tile_combine),
    "raster": Reorganisation(raster_blocks, raster_image, raster_components),
}
