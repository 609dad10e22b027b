"""How the numbers of a slice are stored: as they are, halved, or as 8-bit steps of one size a channel.

Letters: n samples, c channels, h w space.
"""

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

LEVELS = 127  # of either sign: symmetric, so that zero is stored as zero


def encode(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """What is stored of x; undone, to rounding, by `decode`. Shapes: x (n, c, h, w), scale (c, 1, 1)."""
    return x.to(dtype) if scale is None else (x / scale).round_().clamp_(-LEVELS, LEVELS).to(dtype)


def decode(values: Tensor, scale: Tensor | None) -> Tensor:
    """The float32 slice whose `encode` these are."""
    return values.float() if scale is None else values * scale


def count_clipped(x: Tensor, scale: Tensor | None) -> Tensor:
    """How many values of each channel lie beyond the last step. Shape: (c,)."""
    if scale is None:
        return torch.zeros(x.shape[1])
    return (x.abs() > (LEVELS + 0.5) * scale).sum((0, 2, 3))


def best_scale(sample: Tensor) -> Tensor:
    """The step of each channel that loses least, in mean square over a sample. Shapes: (n, c, h, w) -> (c, 1, 1).

    Not the step at which nothing can clip: a bound from the matrix and pixels in [0, 1] is met by checkerboards only,
    and costs the highest frequency of photographs 3 of its 8 bits; even the largest value of a data set is an outlier
    that costs up to a factor of two. With this step one value of 10,000 is clipped; the manifest counts them.
    """
    peak = sample.abs().amax((0, 2, 3)).clamp(min=1e-12)[:, None, None]
    steps = [peak / LEVELS * 2.0 ** (-quarter / 4) for quarter in range(16)]
    losses = [(decode(encode(sample, torch.int8, step), step) - sample).square_().mean((0, 2, 3)) for step in steps]
    best = torch.stack(losses).argmin(0)
    return torch.stack(steps)[best, torch.arange(len(best))]
