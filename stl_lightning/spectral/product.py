"""The tensor product under an invertible transform L of the third dimension, and the same as a dense matrix.

L is orthonormal, or unitary and complex, so that its inverse is its conjugate transpose.
Axes: m rows, n columns of `a`, p columns of `x`, b slices. Source: Kernfeld, Kilmer, Aeron 2015.
"""

import torch
from torch import Tensor


def to_spectral(x: Tensor, matrix: Tensor, dim: int = -1) -> Tensor:
    """Transform one dimension; undone by `from_spectral`.

    `scipy.fft.dct(x, norm="ortho", axis=dim)` if the matrix is the DCT.
    Shapes: dimension `dim` of x is b, matrix is (b, b); the shape stays.
    """
    dtype = torch.promote_types(x.dtype, matrix.dtype)
    return (x.movedim(dim, -1).to(dtype) @ matrix.to(dtype).mT).movedim(-1, dim)


def from_spectral(x: Tensor, matrix: Tensor, dim: int = -1) -> Tensor:
    """Undo `to_spectral`. Shapes: as there."""
    return to_spectral(x, matrix.mH, dim)


def tensor_product(a: Tensor, x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply slice by slice in the transform domain: c^_b = a^_b x^_b.

    With `unitary_dft(b)` this is the t-product (tubes convolved in a circle) divided by sqrt b, because that
    matrix is normalised; the result is complex, with an imaginary part of rounding errors for real a and x.
    Shapes: (m, n, b), (n, p, b) -> (m, p, b), all in the original domain.
    """
    spectrum = torch.einsum("mnb,npb->mpb", to_spectral(a, matrix), to_spectral(x, matrix))
    return from_spectral(spectrum, matrix)


def structured_matrix(a: Tensor, matrix: Tensor) -> Tensor:
    """The dense matrix of `x -> tensor_product(a, x, matrix)`: (L^-1 (x) I) blkdiag(a^_b) (L (x) I).

    Acts on the slices of x stacked on each other, `x.movedim(-1, 0).flatten(0, 1)`. It is block-circulant for
    the DFT and block-Toeplitz-plus-Hankel for the orthonormal DCT-II: m n b parameters where a free matrix of
    this size has m n b^2.
    Shapes: (m, n, b) -> (b*m, b*n).
    """
    m, n, _ = a.shape
    blocks = torch.block_diag(*to_spectral(a, matrix).unbind(-1))
    there = torch.kron(matrix.contiguous(), torch.eye(n).to(matrix))  # kron takes no transposed memory
    back = torch.kron(matrix.mH.contiguous(), torch.eye(m).to(matrix))
    return back.to(blocks.dtype) @ blocks @ there.to(blocks.dtype)
