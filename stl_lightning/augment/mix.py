"""Mixup and cutmix of the slices of a minibatch, the same on all ranks.

Both are linear in the images and the transform is linear, so mixing slices equals mixing images. Shares add up to 1, so
it may come before or after the mean is subtracted and the deviation divided by.

Letters: s slices or branches, n samples, c channels, h w space, k classes.
"""

from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stl_lightning.augment.boxes import cut_boxes
from stl_lightning.augment.draws import MIX, N_MIX_DRAWS, uniform
from stl_lightning.augment.moves import inside
from stl_lightning.augment.pixels import Augment

N_KNOTS = 4096


def mix(
    augment: Augment,
    x: Tensor,
    labels: Tensor,
    n_classes: int,
    seed: int,
    epoch: int,
    indices: Tensor | np.ndarray,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Mix each sample with a partner of its minibatch, and say how much of which class is in it.

    Shapes: x (s, n, c, h, w), labels and indices (n,) -> x of the same shape, targets (n, k), float32.
    A minibatch is `batch_size` samples in a row, the last may be smaller; its order does not matter.
    Source: Zhang et al. 2018 (mixup), Yun et al. 2019 (cutmix); here with a share for each sample.
    """
    targets = F.one_hot(labels.to(x.device), n_classes).float()
    if not augment.mixes:
        return x, targets
    draws = uniform(seed, epoch, indices, N_MIX_DRAWS, first=MIX)
    partner = torch.from_numpy(partners(draws[:, 0], batch_size)).to(x.device)
    h, w = x.shape[-2:]
    own = own_shares(augment, draws[:, 1:], (h, w)).to(x.device)
    mixed = torch.lerp(x.index_select(1, partner), x, own[:, None].to(x.dtype))
    return mixed, torch.lerp(targets[partner], targets, own.mean((1, 2))[:, None])


def partners(uniform_draws: np.ndarray, batch_size: int) -> np.ndarray:
    """Who each sample is mixed with: the next one of its minibatch in the order of the draws, the last with the first.

    So no sample is its own partner unless it is alone. Shapes: (n,) -> (n,) int64.
    """
    n = len(uniform_draws)
    batch = np.arange(n) // batch_size
    order = np.lexsort((uniform_draws, batch))  # batch by batch
    is_last = np.append(batch[1:] != batch[:-1], True)
    following = np.where(is_last, batch * batch_size, np.arange(n) + 1)
    partner = np.empty(n, np.int64)
    partner[order] = order[following]
    return partner


def own_shares(augment: Augment, uniform_draws: np.ndarray, size: tuple[int, int]) -> Tensor:
    """How much of each place a sample keeps: for mixup the same everywhere, for cutmix 0 in the box and 1 around it.

    Shapes: uniform_draws (n, 4) -> (n, h, w), or (n, 1, 1) if there is only mixup; float32.
    """
    which, share, *centre = uniform_draws.T
    if not augment.cutmix:
        return torch.from_numpy(beta(share, augment.mixup)).float()[:, None, None]
    boxes = cut_boxes(np.stack(centre, 1), beta(share, augment.cutmix), *size)
    around = (~inside(torch.from_numpy(boxes), size)).float()
    if not augment.mixup:
        return around
    everywhere = torch.from_numpy(beta(share, augment.mixup)).float()
    return torch.where(torch.from_numpy(which < 0.5)[:, None, None], around, everywhere[:, None, None])


def beta(uniform_draws: np.ndarray, alpha: float) -> np.ndarray:
    """Numbers distributed as Beta(alpha, alpha), interpolated between quantiles; `scipy.stats.beta.ppf`."""
    return np.interp(uniform_draws, np.linspace(0, 1, N_KNOTS + 1), _beta_quantiles(alpha))


@cache
def _beta_quantiles(alpha: float) -> np.ndarray:
    from scipy.special import betaincinv  # 1 us a number: as much as mixing a small image

    return betaincinv(alpha, alpha, np.linspace(0, 1, N_KNOTS + 1))
