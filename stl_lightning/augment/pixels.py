"""The setting `data.augment`, and what it does to whole images.

Letters: n samples, c channels, h w space.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stl_lightning.augment.moves import Moves, Pair, read
from stl_lightning.errors import ConfigError


@dataclass(frozen=True)
class Augment:
    """Random crop, flip and erasing of the training images, and mixing them, the same on all ranks.

    Args:
        crop_pad: Pixels of zero padding before a random crop of the original size; 0 is off.
        flip: Mirror every second image on average.
        resized_crop: Share of the area, from and to, that a resized crop keeps; (0.08, 1) in most ImageNet recipes. It
            is done where a file is decoded, at full resolution, see `resized_crop_box`.
        aligned: Crops move by whole blocks, so that a rank can make them on the slices it has stored.
        erase: Probability that a box of whole blocks, 2 to 33 percent of the image, is set to zero (random erasing).
        mixup: Mix each image with another one of its minibatch; the share follows Beta(mixup, mixup). 0 is off.
        cutmix: Replace a box of whole blocks by that of another image of the minibatch; its area follows
            Beta(cutmix, cutmix). 0 is off; with `mixup` too, a draw per image chooses one of them.

    Raises: ConfigError for values out of range.
    """

    crop_pad: int = 0
    flip: bool = False
    resized_crop: tuple[float, float] | None = None
    aligned: bool = False
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if self.crop_pad < 0:
            raise ConfigError(f"data.augment.crop_pad: expected 0 or more pixels, received {self.crop_pad}")
        scale = self.resized_crop
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ConfigError(
                f"data.augment.resized_crop: expected (low, high) with 0 < low <= high <= 1, received {scale}"
            )
        if not 0 <= self.erase <= 1:
            raise ConfigError(f"data.augment.erase: expected a probability from 0 to 1, received {self.erase}")
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not 0 <= alpha < float("inf"):
                raise ConfigError(f"data.augment.{name}: expected alpha of Beta(alpha, alpha), 0 is off; got {alpha}")

    @property
    def moves(self) -> bool:
        """Whether images change before they are mixed."""
        return bool(self.crop_pad or self.flip or self.resized_crop or self.erase)

    @property
    def mixes(self) -> bool:
        """Whether images of a minibatch are mixed."""
        return bool(self.mixup or self.cutmix)

    def crop_step(self, block: Pair) -> Pair:
        """Pixels by which crops move. Raises: ConfigError for an `aligned` crop whose padding is no whole blocks."""
        if not self.aligned:
            return 1, 1
        if self.crop_pad % block[0] or self.crop_pad % block[1]:
            raise ConfigError(
                f"data.augment.crop_pad: expected, with data.augment.aligned, a multiple of both sides of data.block "
                f"{block[0]}x{block[1]}; received {self.crop_pad}"
            )
        return block

    def __call__(
        self, images: Tensor, seed: int, epoch: int, indices: Tensor | np.ndarray, block: Pair = (1, 1)
    ) -> Tensor:
        """Crop, flip and erase; `resized_crop` has been done by then, and `mix` comes after the split.

        Shapes: images (n, c, h, w) of any dtype, indices (n,) in the data set -> (n, c, h, w). Units: block in pixels,
        height and width. Raises: ConfigError for an `aligned` crop that the block does not divide.
        """
        if not (self.crop_pad or self.flip or self.erase):
            return images
        h, w = images.shape[-2:]
        pad = (self.crop_pad, self.crop_pad)
        moves = Moves((h, w), pad, self.flip, self.erase, step=self.crop_step(block), cell=block)
        drawn = torch.from_numpy(moves.draw(seed, epoch, indices)).to(images.device)
        return read(images, moves.source(drawn))
