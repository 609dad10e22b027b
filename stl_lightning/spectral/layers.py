"""Tensor layers: one weight per slice, applied to all slices at once.

Where the nonlinearity stands decides whether branches couple. Layers with domain="spectral" take and give
spectra, so a stack of them with pointwise nonlinearities between is exactly b independent networks. Layers
with domain="original" transform, multiply and transform back; a nonlinearity after each then mixes the slices
(t-NN, Newman et al. 2018).

Axes: n samples, b slices, i inputs, o outputs, h w space; b is second, as in `torch.stack(slices, 1)`.
"""

from abc import ABC, abstractmethod
from math import prod, sqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl_lightning.errors import ConfigError, unknown
from stl_lightning.spectral.product import from_spectral, to_spectral

Domain = Literal["spectral", "original"]
DOMAINS: tuple[Domain, ...] = ("spectral", "original")


class SpectralLayer(nn.Module, ABC):
    """What the tensor layers share: a weight per slice in the transform domain, and the way there and back.

    Raises: ConfigError if the matrix is not orthonormal, or the domain is unknown.
    """

    matrix: Tensor

    def __init__(self, weight_shape: tuple[int, ...], matrix: Tensor, bias: bool, domain: Domain) -> None:
        super().__init__()
        if domain not in DOMAINS:
            raise unknown("domain", domain, DOMAINS)
        _check_orthonormal(matrix)
        self.domain = domain
        self.n_slices = len(matrix)
        self.register_buffer("matrix", matrix.to(torch.get_default_dtype()))
        self.weight = nn.Parameter(torch.empty(self.n_slices, *weight_shape))  # (b, o, i, ...)
        self.bias = nn.Parameter(torch.empty(self.n_slices, weight_shape[0])) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what b separate `nn.Linear`/`nn.Conv2d` would: uniform within 1/sqrt(inputs of one slice)."""
        bound = 1 / sqrt(prod(self.weight.shape[2:]))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer. Shapes: (n, b, i, ...) -> (n, b, o, ...), both in the domain of the layer."""
        if self.domain == "spectral":
            return self.per_slice(x)
        matrix = self.matrix.to(x.dtype)
        return from_spectral(self.per_slice(to_spectral(x, matrix, 1)), matrix, 1)

    @abstractmethod
    def per_slice(self, spectrum: Tensor) -> Tensor:
        """Apply weight b to slice b. Shapes: (n, b, i, ...) -> (n, b, o, ...)."""


class SpectralLinear(SpectralLayer):
    """b linear maps, one a slice; b times `torch.nn.Linear`. Shapes: (n, b, i) -> (n, b, o)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        matrix: Tensor,
        bias: bool = True,
        domain: Domain = "spectral",
    ) -> None:
        super().__init__((out_features, in_features), matrix, bias, domain)

    def per_slice(self, spectrum: Tensor) -> Tensor:
        product = (spectrum.transpose(0, 1) @ self.weight.mT).transpose(0, 1)
        return product if self.bias is None else product + self.bias


class SpectralConv2d(SpectralLayer):
    """b convolutions, one a slice; b times `torch.nn.Conv2d`. Shapes: (n, b, i, h, w) -> (n, b, o, h, w)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        matrix: Tensor,
        bias: bool = True,
        domain: Domain = "spectral",
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), matrix, bias, domain)
        self.stride, self.padding = stride, padding

    def per_slice(self, spectrum: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.flatten()
        filters = self.weight.flatten(0, 1)  # (b*o, i, kh, kw)
        y = F.conv2d(spectrum.flatten(1, 2), filters, bias, self.stride, self.padding, groups=self.n_slices)
        return y.unflatten(1, (self.n_slices, -1))


def _check_orthonormal(matrix: Tensor) -> None:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.is_floating_point()
    if not square or not torch.allclose(matrix @ matrix.T, torch.eye(len(matrix)).to(matrix), atol=1e-5):
        raise ConfigError(
            f"matrix: expected a real orthonormal (b, b) matrix, fitted if it is learned; received another "
            f"of {matrix.dtype} {tuple(matrix.shape)}"
        )
