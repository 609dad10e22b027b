"""Random numbers that every rank can repeat alone, because each of them is a hash.

Ranks that own different slices of one image must see the same crop and flip of it, and they never talk. So a draw
depends on (seed, epoch, sample, number of the draw); batch size, worker, rank and order cannot change it.

Letters: n samples.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

N_TRIES = 10  # torchvision's number of attempts at a box that fits

# Draw numbers of one sample. A new augmentation takes new numbers, so that the old ones keep their values.
FLIP, TOP, LEFT, BOX = 0, 1, 2, 3
N_MOVE_DRAWS = BOX
N_BOX_DRAWS = 2 * N_TRIES + 2
ERASE = BOX + N_BOX_DRAWS  # whether, area, ratio, top, left
N_ERASE_DRAWS = 5
MIX = ERASE + N_ERASE_DRAWS  # order of the partners, mixup or cutmix, share, row and column of the centre
N_MIX_DRAWS = 5

GAMMA = np.uint64(0x9E3779B97F4A7C15)
MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * MIX_1
    state = (state ^ (state >> np.uint64(27))) * MIX_2
    return state ^ (state >> np.uint64(31))


def _absorb(state: np.ndarray, value: np.ndarray) -> np.ndarray:
    # + 1: a zero would leave the state as it is, and seed 0, epoch 0, sample 0 would share their first steps.
    return _mix(state + GAMMA * (value + np.uint64(1)))


def _word(number: int) -> np.ndarray:
    # An array, not a scalar: NumPy warns of the intended overflow on scalars only.
    return np.array([number % 2**64], dtype=np.uint64)


@lru_cache(maxsize=8)  # as long as the rest of the work for one minibatch
def _start(seed: int, epoch: int) -> np.ndarray:
    return _absorb(_absorb(np.zeros(1, np.uint64), _word(seed)), _word(epoch))


def uniform(seed: int, epoch: int, indices: Tensor | np.ndarray, n_draws: int, first: int = 0) -> np.ndarray:
    """Random numbers in [0, 1), float64, that depend on (seed, epoch, sample index, draw number) alone.

    Shapes: indices (n,) -> (n, n_draws), the draws numbered `first`, `first` + 1, ...
    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied after each of the four words.
    """
    samples = torch.as_tensor(indices).cpu().numpy().astype(np.uint64)
    numbers = np.arange(first, first + n_draws, dtype=np.uint64)
    draws = _absorb(_absorb(_start(seed, epoch), samples)[:, None], numbers)
    return (draws >> np.uint64(11)) * 2.0**-53
