"""How an image, a block and a padding fit together, checked before anything is computed.

Axes: c channels, H W the image, bh bw the block.
"""

from collections.abc import Sequence

from stl_lightning.errors import ConfigError, unknown
from stl_lightning.spectral.reorganise import Block

ImageShape = tuple[int, int, int]  # (c, H, W)

PADS = {"reflect": "reflect", "zeros": "constant"}  # data.pad -> mode of torch.nn.functional.pad


def _positive(setting: str, received: object, length: int) -> tuple[int, ...]:
    values = tuple(received) if isinstance(received, Sequence) else (received,)
    if len(values) != length or not all(type(value) is int and value > 0 for value in values):
        raise ConfigError(f"{setting}: expected {length} positive integers; received {received!r}")
    return values


def parse_image_shape(image_shape: Sequence[int]) -> ImageShape:
    """(c, H, W) as a tuple. Raises: ConfigError unless it is three positive integers."""
    c, height, width = _positive("image_shape (channels, height, width)", image_shape, 3)
    return c, height, width


def parse_block(block: int | Sequence[int]) -> Block:
    """(bh, bw); one integer stands for a square. Raises: ConfigError unless one or two positive integers."""
    pair = (block, block) if isinstance(block, int) else block
    bh, bw = _positive("data.block (one integer, or height and width)", pair, 2)
    return bh, bw


def padding(image_shape: ImageShape, block: Block, pad: str | None) -> tuple[int, int]:
    """Rows and columns to add at the bottom and at the right, so that the block divides the image.

    Raises: ConfigError if `pad` is unknown, if it is None and the block does not divide the image, or if the
    image is too small to reflect so much.
    """
    if pad is not None and pad not in PADS:
        raise unknown("data.pad", pad, [*PADS, "null"])
    _, height, width = image_shape
    rows, columns = -height % block[0], -width % block[1]
    if pad is None and (rows or columns):
        or_pad = (
            f". Or set data.pad to one of {', '.join(PADS)}, which enlarges the image to "
            f"{height + rows}x{width + columns}"
        )
        raise ConfigError(
            f"data.block: {block[0]}x{block[1]} does not divide the {height}x{width} image. Heights that fit: "
            f"{_divisors(height)}; widths that fit: {_divisors(width)}"
            # With a larger block most of the image would be padding.
            + (or_pad if block[0] <= height and block[1] <= width else "")
        )
    if pad == "reflect" and (rows >= height or columns >= width):
        raise ConfigError(
            f"data.pad: reflect adds at most {height - 1} rows and {width - 1} columns to a {height}x{width} "
            f"image; data.block={block} asks for {rows} and {columns}. Choose a smaller data.block, or "
            f"data.pad=zeros"
        )
    return rows, columns


def _divisors(size: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, size + 1) if size % divisor == 0)
