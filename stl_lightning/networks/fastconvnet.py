"""A short stack of convolutions that pools early: much accuracy for few multiply-adds and few epochs."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from stl_lightning.networks.common import check_dropout, dropout_layer, option_error

LOGIT_SCALE = 1 / 8  # maxima are large, and the first steps are made at a high learning rate


class FastConvNet(nn.Sequential):
    """A 3x3 convolution at full size, then stages of two, the first of which halves the sides; global max-pooling.

    widths: output channels of the first convolution and of each stage. dropout: before the last layer.
    Each convolution is followed by BatchNorm and GELU, max-pooling comes before them, where they then cost a quarter.
    A convolution starts as the identity on as many channels as come in (`torch.nn.init.dirac_`), the others as torch
    draws them.
    Shapes: (n, c, h, w) -> logits (n, k).
    Raises: ConfigError for options out of range, and where a stage would halve a side of 1 pixel.
    Source: the layout and the start of airbench94 (Jordan 2024), without its whitening layer.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        n_classes: int,
        widths: Sequence[int] = (64, 128, 256),
        dropout: float = 0.0,
    ) -> None:
        check_dropout(dropout)
        _check_widths(widths, in_shape)
        stages = [layer for sizes in pairwise(widths) for layer in _stage(*sizes)]
        pool = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), dropout_layer(dropout)]
        super().__init__(_convolution(in_shape[0], widths[0]), *stages, *pool, _Head(widths[-1], n_classes, bias=False))


class _Head(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return LOGIT_SCALE * super().forward(x)


def _stage(n_in: int, n_out: int) -> list[nn.Module]:
    return [_convolution(n_in, n_out, nn.MaxPool2d(2)), _convolution(n_out, n_out)]


def _convolution(n_in: int, n_out: int, *pool: nn.Module) -> nn.Sequential:
    # No bias: BatchNorm subtracts it again.
    conv = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:n_in])
    return nn.Sequential(conv, *pool, nn.BatchNorm2d(n_out), nn.GELU())


def _check_widths(widths: Sequence[int], in_shape: tuple[int, int, int]) -> None:
    if not widths or min(widths) < 1:
        raise option_error("widths", "one or more channel counts", list(widths))
    _, h, w = in_shape
    most = min(h, w).bit_length()
    if len(widths) > most:
        raise option_error("widths", f"at most {most} channel counts for an input of {h}x{w} pixels", list(widths))
