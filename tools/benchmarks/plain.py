"""Training and inference written by hand in plain PyTorch: what stl is measured against.

Letters: n samples, b slices/branches, f features, c channels, h w space, k classes.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

LR = 1e-3
BATCH = 128
Parameters = list[tuple[Tensor, Tensor]]  # per layer: weights (b f_in f_out), biases (b 1 f_out)


def mlp(n_inputs: int = 49, n_classes: int = 10, depth: int = 8) -> nn.Sequential:
    """The MNIST branch: `depth` linear layers as wide as the input, with ReLU between them."""
    sizes = [n_inputs] * depth
    hidden = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())]
    network = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(n_inputs, n_classes))
    for layer in network:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    return network


def adam(parameters: Iterable[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=LR, fused=True)


def bmm_parameters(networks: Sequence[nn.Sequential]) -> Parameters:
    """The weights of several `mlp`s, side by side."""
    layers = zip(*([layer for layer in network if isinstance(layer, nn.Linear)] for network in networks), strict=True)
    return [
        (
            torch.stack([layer.weight.detach().T for layer in same]).requires_grad_(),
            torch.stack([layer.bias.detach()[None] for layer in same]).requires_grad_(),
        )
        for same in layers
    ]


def bmm_logits(parameters: Parameters, x: Tensor) -> Tensor:
    """All branches at once. Shapes: (b n f) -> (b n k)."""
    *hidden, (weight, bias) = parameters
    for w, b in hidden:
        x = torch.baddbmm(b, x, w).relu_()
    return torch.baddbmm(bias, x, weight)


def bmm_epoch(
    parameters: Parameters, optimizer: torch.optim.Optimizer, x: Tensor, labels: Tensor, order: Tensor
) -> Tensor:
    """One pass over all branches' slices (b n f), by the images in `order`; returns the last loss, summed over b."""
    for indices in order.split(BATCH):
        logits = bmm_logits(parameters, x[:, indices])
        targets = labels[indices].expand(len(x), -1)
        # The mean over the images and the sum over the branches: each has the gradient it would have alone.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()) * len(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """One pass of one branch over `batches`; returns the last loss."""
    for x, labels in batches:
        with precision():
            loss = F.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def batches_of(x: Tensor, labels: Tensor, order: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches out of tensors that lie on the device, by the images in `order`."""
    return ((x[indices], labels[indices]) for indices in order.split(BATCH))


def image_loader(pixels: Tensor, labels: Tensor) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(pixels, labels), batch_size=BATCH, shuffle=True)


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II, (frequency, position). Equivalent: scipy.fft.dct(eye(n), norm="ortho", axis=0)."""
    frequency, position = torch.arange(n)[:, None], torch.arange(n)
    rows = torch.cos(torch.pi * (position + 0.5) * frequency / n) * (2 / n) ** 0.5
    rows[0] /= 2**0.5
    return rows


def slice_batches(
    loader: Iterable[Sequence[Tensor]], matrix: Tensor, k: int, device: torch.device
) -> Iterable[tuple[Tensor, Tensor]]:
    """Batches of slice k as a script makes them that transforms each batch of whole images, then takes its slice.

    Raster tubes: 16 consecutive pixels of the flattened image. Shapes: (n 1 28 28) -> (n 49).
    """
    for pixels, labels in loader:
        standard = (pixels.to(device) - 0.1307) / 0.3081
        spectrum = standard.flatten(1).unflatten(1, (-1, len(matrix))) @ matrix.T
        yield spectrum[..., k], labels.to(device)
