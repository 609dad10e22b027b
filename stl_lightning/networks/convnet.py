"""A plain stack of 3x3 convolutions, the network of the published CIFAR-10 and ImageNet runs."""

from collections.abc import Sequence
from typing import Literal

from torch import nn

from stl_lightning.networks.common import check_dropout, init_weights, option_error, pooled_head

Width = int | Literal["P"]
TEN_CONVOLUTIONS: tuple[Width, ...] = (64, 64, 64, "P", 128, 128, 128, "P", 256, 256, 256, 256)


class ConvNet(nn.Sequential):
    """3x3 convolutions, each with BatchNorm and ReLU, 2x2 max-pooling where `widths` says so, and a pooled
    head.

    widths: output channels of each convolution, or "P" for pooling. The default has ten convolutions and
    suits slices of 8x8 to 16x16; a 32x32 image or a 56x56 slice wants three "P", a 224x224 image five.
    dropout: before the last layer.
    Shapes: (n, c, h, w) -> logits (n, k).
    Raises: ConfigError for options out of range, and where a "P" would halve a side of 1 pixel.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        n_classes: int,
        widths: Sequence[Width] = TEN_CONVOLUTIONS,
        dropout: float = 0.0,
    ) -> None:
        check_dropout(dropout)
        _check_widths(widths, in_shape)
        channels = [in_shape[0], *(w for w in widths if w != "P")]
        sources = iter(channels)
        features = (nn.MaxPool2d(2) if w == "P" else _convolution(next(sources), w) for w in widths)
        super().__init__(*features, pooled_head(channels[-1], n_classes, dropout))
        init_weights(self)


def _convolution(n_in: int, n_out: int) -> nn.Sequential:
    # No bias: BatchNorm subtracts it again.
    return nn.Sequential(nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU())


def _check_widths(widths: Sequence[Width], in_shape: tuple[int, int, int]) -> None:
    channels = [w for w in widths if w != "P"]
    if not channels or not all(isinstance(w, int) and w > 0 for w in channels):
        raise option_error("widths", 'one or more channel counts, with "P" marks between', list(widths))
    _, h, w = in_shape
    n_pools = list(widths).count("P")
    most = min(h, w).bit_length() - 1
    if n_pools > most:
        raise option_error("widths", f'at most {most} "P" marks for an input of {h}x{w} pixels', list(widths))
