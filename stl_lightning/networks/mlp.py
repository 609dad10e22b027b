"""The fully connected network of the published MNIST runs."""

from itertools import pairwise
from math import prod

from torch import nn

from stl_lightning.networks.common import check_dropout, dropout_layer, init_weights, option_error


class MLP(nn.Sequential):
    """Linear layers with ReLU between them.

    depth: linear layers in all; width: of the hidden ones, by default the number of inputs c*h*w. The
    published branch has depth 8 on a 7x7 slice (width 49), its baseline depth 8 on the 28x28 image (width
    784).
    batch_norm: BatchNorm after each ReLU; dropout: before the last layer.
    Shapes: (n, c, h, w) -> logits (n, k).
    Raises: ConfigError for options out of range.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        n_classes: int,
        depth: int = 8,
        width: int | None = None,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        if depth < 1:
            raise option_error("depth", "1 or more linear layers", depth)
        if width is not None and width < 1:
            raise option_error("width", "1 or more units, or null for as many as inputs", width)
        check_dropout(dropout)
        n_inputs = prod(in_shape)
        sizes = [n_inputs] + [width or n_inputs] * (depth - 1)
        hidden = [layer for a, b in pairwise(sizes) for layer in _hidden(a, b, batch_norm)]
        head = nn.Linear(sizes[-1], n_classes)
        super().__init__(nn.Flatten(), *hidden, dropout_layer(dropout), head)
        init_weights(self)


def _hidden(n_in: int, n_out: int, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Linear(n_in, n_out), nn.ReLU()]
    return [*layers, nn.BatchNorm1d(n_out)] if batch_norm else layers
