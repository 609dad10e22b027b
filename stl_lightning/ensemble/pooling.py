"""One prediction from many members: encode, take the weighted sum, decode, divide by the temperature.

Axes: b members, n samples, k classes (j: classes of the pooled prediction).

Weights are one tensor; its number of axes says what is weighted:
    (b,)          one number a member
    (b, k)        one number a member and class
    (b, j, k + 1) an affine map a member; the last column is the member's share of the bias
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stl_lightning.ensemble.metrics import nll
from stl_lightning.errors import unknown

T_MIN, T_MAX = 0.01, 100.0  # a temperature at a limit means that the predictions are all right or all noise


@dataclass(frozen=True)
class Space:
    """Where the weighted sum is taken. `decode` turns a sum of encoded logits into log-probabilities."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    log_linear: bool  # weights of any sign are valid; otherwise they must not be negative


def _log_softmax(x: Tensor) -> Tensor:
    return x.log_softmax(-1)


def _identity(x: Tensor) -> Tensor:
    return x


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _log_normalise(x: Tensor) -> Tensor:
    """log(x / sum of x); zeros count as the smallest positive number, so that the logarithm stays finite."""
    x = x.clamp(min=torch.finfo(x.dtype).tiny)
    return x.log() - x.sum(-1, keepdim=True).log()


# With one weight a member, `logits` and `log_prob` pool to the same prediction: they differ by a constant per
# sample, which decoding removes. With weights per class only `log_prob` ignores such a shift of the logits.
SPACES = {
    "logits": Space(_identity, _log_softmax, log_linear=True),
    "log_prob": Space(_log_softmax, _log_softmax, log_linear=True),
    "prob": Space(_softmax, _log_normalise, log_linear=False),
}


def space_named(name: str) -> Space:
    """The row of `SPACES`, or a ConfigError that lists the rows."""
    if name not in SPACES:
        raise unknown("ensemble.space", name, SPACES)
    return SPACES[name]


def combine(outputs: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over members: outputs (b, n, k), weights as above -> (n, k) or (n, j)."""
    if weights.ndim == 1:
        return torch.einsum("b,bnk->nk", weights, outputs)
    if weights.ndim == 2:
        return torch.einsum("bk,bnk->nk", weights, outputs)
    return torch.einsum("bjk,bnk->nj", weights[..., :-1], outputs) + weights[..., -1].sum(0)


def pool(logits: Tensor, weights: Tensor, space: str) -> Tensor:
    """Log-probabilities of the weighted members: (b, n, k) -> (n, k), in float32 or wider.

    Raises ConfigError for an unknown space.
    """
    row = space_named(space)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # Decoding removes what this encoding adds, see SPACES; it would take as long as everything after it.
    encoded = logits if row.log_linear and weights.ndim == 1 else row.encode(logits)
    return row.decode(combine(encoded, weights.to(logits)))


def temper(log_probs: Tensor, temperature: float) -> Tensor:
    """Softens (temperature > 1) or sharpens (< 1) predictions (n, k); `fit_temperature` finds the best."""
    return (log_probs / temperature).log_softmax(-1)


def fit_temperature(log_probs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> float:
    """The temperature in [T_MIN, T_MAX] whose `temper` has the lowest NLL on (n, k), (n,).

    label_smoothing: the share e of each label that goes to all classes alike; it adds -e s mean d to f.

    With margins d = log p - log p_y the NLL is f(s) = mean logsumexp(s d), convex in s = 1 / temperature;
    f' = mean E[d] and f'' = mean Var[d]. Newton's method inside a bracket. Source: Guo et al. 2017.
    """
    margins = (log_probs - log_probs.gather(-1, labels[:, None])).double()
    towards_all = label_smoothing * margins.mean().item()
    low, high, scale = 1 / T_MAX, 1 / T_MIN, 1.0
    for _ in range(60):
        probs = (margins * scale).softmax(-1)
        mean = (probs * margins).sum(-1)
        slope = mean.mean().item() - towards_all
        curvature = ((probs * margins.square()).sum(-1) - mean.square()).mean().item()
        low, high = (low, scale) if slope > 0 else (scale, high)
        newton = scale - slope / curvature if curvature > 0 else low
        previous, scale = scale, newton if low < newton < high else (low * high) ** 0.5
        if abs(scale - previous) <= 1e-9 * previous:
            break
    return 1 / scale


def cautious_temperature(log_probs: Tensor, labels: Tensor) -> float:
    """`fit_temperature` for predictions of other samples than these.

    Where all n of these are right, the likelihood has no optimum but certainty, which the first error would make
    worthless: 1 / (n + 1) of each label then goes to all classes alike. Source: Platt 1999, section 2.2.
    """
    all_right = bool((log_probs.argmax(-1) == labels).all())
    return fit_temperature(log_probs, labels, label_smoothing=1 / (len(labels) + 1) if all_right else 0.0)


def calibrated_nll(log_probs: Tensor, labels: Tensor) -> float:
    """NLL after the best temperature, in nats."""
    return nll(temper(log_probs, fit_temperature(log_probs, labels)), labels).item()
