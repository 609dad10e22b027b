"""Residual networks of basic blocks, with a stem for slices and the original stem for whole images."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stl_lightning.errors import unknown
from stl_lightning.networks.common import check_dropout, init_weights, option_error, pooled_head

DEPTHS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}  # He et al. 2016, table 1


def _slice_stem(n_in: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(n_in, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]


def _image_stem(n_in: int, width: int) -> list[nn.Module]:
    conv = nn.Conv2d(n_in, width, 7, stride=2, padding=3, bias=False)
    return [conv, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)]


# name -> (layers, how often the stem halves the input)
STEMS: dict[str, tuple[Callable[[int, int], list[nn.Module]], int]] = {
    "slice": (_slice_stem, 0),
    "image": (_image_stem, 2),
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes.

    Equivalent: torchvision.models.resnet.BasicBlock. Shapes: (n, c, h, w) -> (n, n_out, h/stride, w/stride).
    """

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        self.shortcut = (
            nn.Identity()
            if stride == 1 and n_in == n_out
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.residual(x) + self.shortcut(x))


class ResNet(nn.Module):
    """Stages of basic blocks; each stage after the first halves the sides and doubles the channels.

    depth: 18, 34, or the blocks of each stage, such as [2, 2, 2]; width: channels of the first stage.
    stem: "slice" (3x3, stride 1, no pooling; for 8x8 to 56x56) or "image" (7x7, stride 2, max-pooling; the
    original, for 224x224). dropout: before the last layer.
    Equivalent: torchvision.models.resnet18 and resnet34 with stem "image".
    Shapes: (n, c, h, w) -> logits (n, k).
    Raises: ConfigError for options out of range, and where a stage would halve a side of 1 pixel.
    Source: He et al. 2016.
    """

    def __init__(
        self,
        in_shape: tuple[int, int, int],
        n_classes: int,
        depth: int | Sequence[int] = 18,
        width: int = 64,
        stem: str = "slice",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if stem not in STEMS:
            raise unknown("model.network.init_args.stem", stem, STEMS)
        if width < 1:
            raise option_error("width", "1 or more channels", width)
        check_dropout(dropout)
        blocks = _blocks(depth)
        stem_layers, n_halvings = STEMS[stem]
        _check_size(in_shape, blocks, n_halvings)
        widths = [width * 2**stage for stage in range(len(blocks))]
        self.stem = nn.Sequential(*stem_layers(in_shape[0], width))
        self.stages = nn.Sequential(*map(_stage, [width, *widths], widths, blocks))
        self.head = pooled_head(widths[-1], n_classes, dropout)
        init_weights(self)

    def forward(self, slices: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(slices)))


def _stage(n_in: int, n_out: int, n_blocks: int) -> nn.Sequential:
    first = BasicBlock(n_in, n_out, stride=1 if n_in == n_out else 2)
    return nn.Sequential(first, *(BasicBlock(n_out, n_out, stride=1) for _ in range(n_blocks - 1)))


def _blocks(depth: int | Sequence[int]) -> tuple[int, ...]:
    blocks: Sequence[int] = DEPTHS.get(depth, ()) if isinstance(depth, int) else depth
    if not blocks or min(blocks) < 1:
        raise option_error("depth", f"one of {sorted(DEPTHS)} or the blocks of each stage, such as [2, 2]", depth)
    return tuple(blocks)


def _check_size(in_shape: tuple[int, int, int], blocks: tuple[int, ...], n_halvings: int) -> None:
    _, h, w = in_shape
    most = (min(h, w) - 1).bit_length()  # halvings until one pixel is left; strides round up: 7, 4, 2, 1
    n_stages = most - n_halvings + 1
    if len(blocks) > n_stages:
        expected = f"at most {max(n_stages, 0)} stages for an input of {h}x{w} pixels with this stem"
        raise option_error("depth", expected, list(blocks))
