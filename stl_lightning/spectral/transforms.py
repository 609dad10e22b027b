"""Invertible transforms along the tube: every one a real orthonormal matrix, one basis vector a row.

Orthonormal means that the inverse is the transpose and that energy is kept (Parseval).
Axes: b components of a tube, and rows of the matrix; u v vertical and horizontal frequency inside the block.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import torch
import torch_dct
from torch import Tensor

from stl_lightning.errors import ConfigError, unknown
from stl_lightning.spectral.reorganise import Block


@dataclass(frozen=True)
class Basis:
    """An orthonormal matrix (b, b) float64, and for each slice the rows that make it up and its frequency.

    `groups` lists the rows in order and without a gap, so that the rows of all slices are 0, 1, ... b-1.
    `frequencies` are (u, v) for a transform of the plane and (0, k) for a transform of the flattened tube.
    """

    matrix: Tensor
    groups: tuple[tuple[int, ...], ...]
    frequencies: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Transform:
    """One row of `TRANSFORMS`: how to build the basis for a block and a seed, and what it asks for."""

    basis: Callable[[Block, int], Basis]
    power_of_two: bool = False
    fit: Callable[[Tensor], Tensor] | None = None  # (b, b) covariance of the tubes -> (b, b) matrix


def dct_matrix(size: int) -> Tensor:
    """DCT-II; `scipy.fft.dct(numpy.eye(size), norm="ortho", axis=0)`. Shape: (size, size) float64."""
    return torch_dct.dct(torch.eye(size, dtype=torch.float64, device="cpu"), norm="ortho").T.contiguous()


def unitary_dft(size: int) -> Tensor:
    """Complex DFT; `scipy.linalg.dft(size, scale="sqrtn")`. Shape: (size, size) complex128."""
    return torch.fft.fft(torch.eye(size, dtype=torch.float64, device="cpu"), norm="ortho")


def hadamard_matrix(size: int) -> Tensor:
    """Walsh-Hadamard in sequency order (row k changes sign k times); `scipy.linalg.hadamard`, sorted.

    Shape: (size, size) float64, size a power of two.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:  # Sylvester's construction
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    sequency = (matrix[:, 1:] != matrix[:, :-1]).sum(1)
    return matrix[sequency.argsort()] / size**0.5


def haar_matrix(size: int) -> Tensor:
    """Haar wavelets, coarse to fine and left to right within a scale.

    Shape: (size, size) float64, size a power of two. Source: Haar 1910, as the recursion
    W(2m) = [W(m) (x) (1, 1); I (x) (1, -1)] / sqrt 2.
    """
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < size:
        means = matrix.repeat_interleave(2, dim=1)
        details = torch.kron(torch.eye(len(matrix)).to(matrix), matrix.new_tensor([[1.0, -1.0]]))
        matrix = torch.cat([means, details]) / 2**0.5
    return matrix


def identity_matrix(size: int) -> Tensor:
    """No transform: slice k is component k of the tubes. Shape: (size, size) float64."""
    return torch.eye(size, dtype=torch.float64, device="cpu")


def random_matrix(size: int, seed: int) -> Tensor:
    """A uniformly distributed orthogonal matrix that depends on the seed alone; `scipy.stats.ortho_group`.

    Shape: (size, size) float64. Source: Mezzadri 2007; without the sign fix QR is not uniform, nor unique.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def klt_matrix(covariance: Tensor) -> Tensor:
    """Eigenvectors of the tube covariance, largest variance first; `sklearn.decomposition.PCA.components_`.

    Shapes: (b, b) -> (b, b) float64. An eigenvector's sign is free: the first entry that is not small against
    the largest becomes positive. The largest itself would not do: half of the vectors are antisymmetric, and
    rounding would decide between +x and -x on each machine.
    """
    rows = torch.linalg.eigh(covariance).eigenvectors.T.flip(0)
    prominent = rows.abs() > 0.6 * rows.abs().amax(1, keepdim=True)
    first = prominent.int().argmax(1, keepdim=True)
    return rows * rows.gather(1, first).sign()


def tube_covariance(tubes: Iterable[Tensor]) -> Tensor:
    """Covariance of the tubes within each channel, averaged over channels; PCA's, with float64 sums.

    Centred, because a constant added to a channel carries no information: the basis is then the same before
    and after the mean of each channel is subtracted. Uncentred, it would follow the brightness.

    Shapes: batches of (n, c, h, w, b) -> (b, b) float64; NaN without samples.
    """
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for batch in tubes:
        flat = batch.transpose(0, 1).flatten(1, 3).to("cpu", torch.float64)  # (c, nhw, b)
        count, first, second = count + flat.shape[1], first + flat.sum(1), second + flat.mT @ flat
    mean = first / count
    return (second / count - mean[:, :, None] * mean[:, None, :]).mean(0)


def line_basis(matrix: Tensor) -> Basis:
    """A 1-D transform of the flattened tube, one row a slice. Shape: (b, b)."""
    size = len(matrix)
    return Basis(matrix, tuple((k,) for k in range(size)), tuple((0, k) for k in range(size)))


def plane_basis(vertical: Tensor, horizontal: Tensor) -> Basis:
    """The separable transform of the block, in zig-zag order of frequency (u + v, as in JPEG).

    `scipy.fft.dctn` if both are DCT matrices. Shapes: (bh, bh), (bw, bw) -> (bh*bw, bh*bw).
    """

    def zigzag(frequency: tuple[int, int]) -> tuple[int, int]:
        u, v = frequency
        return u + v, u if (u + v) % 2 else v

    bh, bw = len(vertical), len(horizontal)
    frequencies = sorted(((u, v) for u in range(bh) for v in range(bw)), key=zigzag)
    rows = [u * bw + v for u, v in frequencies]
    groups = tuple((k,) for k in range(bh * bw))
    return Basis(torch.kron(vertical, horizontal)[rows], groups, tuple(frequencies))


def along_tube(matrix: Callable[[int], Tensor]) -> Callable[[Block, int], Basis]:
    """The 1-D transform of the flattened tube that a family of matrices gives, for the table."""
    return lambda block, seed: line_basis(matrix(prod(block)))


def over_block(matrix: Callable[[int], Tensor]) -> Callable[[Block, int], Basis]:
    """The separable 2-D transform of the block that a family of matrices gives, for the table."""
    return lambda block, seed: plane_basis(matrix(block[0]), matrix(block[1]))


def real_dft(block: Block, seed: int) -> Basis:
    """The DFT of a real tube as floor(b/2)+1 complex slices, each stored as sqrt2*Re and sqrt2*Im.

    `torch.fft.rfft(norm="ortho")`. The other half of the spectrum is the conjugate of this one: each stored
    row stands for two, hence the sqrt2 that makes the stacked matrix orthonormal. The mean and, for even b,
    the Nyquist slice are real and have one row.
    """
    size = prod(block)
    rows: list[Tensor] = []
    groups: list[tuple[int, ...]] = []
    for k, row in enumerate(unitary_dft(size)[: size // 2 + 1]):
        parts = [row.real] if 2 * k % size == 0 else [row.real * 2**0.5, row.imag * 2**0.5]
        groups.append(tuple(range(len(rows), len(rows) + len(parts))))
        rows += parts
    return Basis(torch.stack(rows), tuple(groups), tuple((0, k) for k in range(len(groups))))


def random_basis(block: Block, seed: int) -> Basis:
    """The random orthogonal transform of the flattened tube."""
    return line_basis(random_matrix(prod(block), seed))


def unfitted_matrix(size: int) -> Tensor:
    """Stands for a matrix that training data will give: NaN, so that it can never pass for a transform."""
    return torch.full((size, size), torch.nan, dtype=torch.float64, device="cpu")


TRANSFORMS: dict[str, Transform] = {
    "dct": Transform(along_tube(dct_matrix)),
    "dct2": Transform(over_block(dct_matrix)),
    "dft": Transform(real_dft),
    "hadamard": Transform(over_block(hadamard_matrix), power_of_two=True),
    "haar": Transform(over_block(haar_matrix), power_of_two=True),
    "identity": Transform(along_tube(identity_matrix)),
    "random": Transform(random_basis),
    "klt": Transform(along_tube(unfitted_matrix), fit=klt_matrix),
}


def fitting_transforms(block: Block) -> list[str]:
    """Names of the transforms that exist for this block."""
    power_of_two = prod(block).bit_count() == 1
    return [name for name, transform in TRANSFORMS.items() if power_of_two or not transform.power_of_two]


def build_basis(name: str, block: Block, seed: int = 0) -> Basis:
    """The basis of a named transform; only `random` reads the seed, and `klt` is NaN until it is fitted.

    Raises: ConfigError if the name is unknown or the transform does not exist for this block.
    """
    if name not in TRANSFORMS:
        raise unknown("data.transform", name, TRANSFORMS)
    if name not in (names := fitting_transforms(block)):
        raise ConfigError(
            f"data.transform: {name} needs sides of data.block that are powers of two; received "
            f"data.block={block}. Change data.block, or choose a transform that fits it: {', '.join(names)}"
        )
    return TRANSFORMS[name].basis(block, seed)
