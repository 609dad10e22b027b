"""Images to slices and back, and one slice without the others.

Axes: n samples, c channels, H W the image, h w one slice, b = bh * bw components of a tube, r rows.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stl_lightning.errors import ConfigError, DataError, unknown
from stl_lightning.spectral.geometry import PADS, padding, parse_block, parse_image_shape
from stl_lightning.spectral.reorganise import REORGANISATIONS
from stl_lightning.spectral.transforms import TRANSFORMS, build_basis, tube_covariance

FIT_BATCH = 1024  # images; bounds the memory of the float64 copy
CHUNK = 1 << 18  # pixels the CPU takes through all steps at once: 1 MB of float32, near the size of a core's cache
ONE_SLICE_CHUNK = 1 << 20  # of one row the steps are so short that calling them costs more than the cache


class SpectralSplit(nn.Module):
    """Split images into tubes, transform the tubes, and hand out the spectrum slice by slice.

    Slice k of the polyphase split is `torch.nn.functional.conv2d` with basis image k and the block as stride.

    Shapes: (n, c, H, W) -> `n_slices` tensors (n, c_k, h, w), where c_k is c times the rows of slice k; the
    channels of a slice with two rows are all c of its first row, then all c of its second. `pad` enlarges the
    image at the bottom and at the right until the block divides it, and `inverse` crops it again. Autocast
    does not lower the precision, so that a slice is the same wherever it is made. Images are floating point, or
    uint8, which stands for pixels / 255.

    Raises: ConfigError for an unknown name, a block that does not divide the image, a transform that does not
    exist for the block or was to be fitted first; DataError for images of another shape or kind.
    """

    matrix: Tensor

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        block: int | tuple[int, int],
        reorganisation: str = "polyphase",
        transform: str = "dct2",
        pad: Literal["reflect", "zeros"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image_shape = parse_image_shape(image_shape)
        self.block = parse_block(block)
        if reorganisation not in REORGANISATIONS:
            raise unknown("data.reorganisation", reorganisation, REORGANISATIONS)
        basis = build_basis(transform, self.block, seed)
        self.padding = padding(self.image_shape, self.block, pad)
        self.reorganisation, self.transform, self.pad, self.seed = reorganisation, transform, pad, seed
        self.groups, self.frequencies = basis.groups, basis.frequencies
        learned = TRANSFORMS[transform].fit is not None
        self.is_fitted = not learned
        # Saved only if data decided it: any other matrix follows from the settings and must agree with them.
        self.register_buffer("matrix", basis.matrix.float(), persistent=learned)
        self.register_load_state_dict_post_hook(_note_loaded_matrix)

    @property
    def n_slices(self) -> int:
        """Number of slices: b, or floor(b/2)+1 for the DFT."""
        return len(self.groups)

    def rows(self, k: int) -> tuple[int, ...]:
        """Rows of the matrix that make up slice k. Raises: ConfigError unless 0 <= k < n_slices."""
        if not 0 <= k < self.n_slices:
            raise ConfigError(
                f"slice: expected 0..{self.n_slices - 1}, which data.transform={self.transform} and "
                f"data.block={self.block} give; received {k}"
            )
        return self.groups[k]

    def slice_shape(self, k: int) -> tuple[int, int, int]:
        """(c_k, h, w) of slice k."""
        c, height, width = self.image_shape
        h, w = (height + self.padding[0]) // self.block[0], (width + self.padding[1]) // self.block[1]
        return c * len(self.rows(k)), h, w

    def fit(self, images: Tensor) -> "SpectralSplit":
        """Learn the matrix from training images if the transform has one to learn; otherwise do nothing.

        Shape: (n, c, H, W). Raises: DataError for no images, or images that are not finite.
        """
        learn = TRANSFORMS[self.transform].fit
        if learn is None:
            return self
        self._check_images(images)
        tubes = REORGANISATIONS[self.reorganisation].forward
        batches = images.detach().split(FIT_BATCH)
        covariance = tube_covariance(tubes(self._padded(batch), self.block) for batch in batches)
        if not covariance.isfinite().all():
            raise DataError(f"data.transform={self.transform}: expected at least one image, all finite, to fit on")
        self.matrix.copy_(learn(covariance))
        self.is_fitted = True
        return self

    def forward(self, images: Tensor, out: Tensor | None = None) -> list[Tensor]:
        """All slices; undone by `inverse`. Shapes: (n, c, H, W) -> n_slices of (n, c_k, h, w).

        Slices of one row are views of one memory, each contiguous. `out` (b, n, c, h, w) is that memory: the
        first use of fresh memory can cost more time than the transform, so a loop should pass the same again.
        """
        spectrum = self._spectrum(images, range(len(self.matrix)), out)
        return [part.transpose(0, 1).flatten(1, 2) for part in spectrum.split([len(rows) for rows in self.groups])]

    def inverse(self, slices: Sequence[Tensor]) -> Tensor:
        """The images whose slices `forward` made. Shapes: n_slices of (n, c_k, h, w) -> (n, c, H, W)."""
        self._require_fitted()
        self._check_slices(slices)
        c, height, width = self.image_shape
        spectrum = torch.cat(tuple(slices), 1).unflatten(1, (-1, c))  # (n, b, c, h, w)
        with _full_precision(spectrum):
            tubes = (self.matrix.to(spectrum.dtype).T @ spectrum.flatten(2)).view(spectrum.shape)
        images = REORGANISATIONS[self.reorganisation].inverse(tubes.movedim(1, -1), self.block)
        return images[..., :height, :width]

    def slice(self, images: Tensor, k: int) -> Tensor:
        """Slice k alone, r/b of the multiply-adds of `forward`. Shapes: (n, c, H, W) -> (n, c_k, h, w)."""
        return self.slices(images, [k])

    def slices(self, images: Tensor, ks: Sequence[int]) -> Tensor:
        """Several slices, one after the other. Shapes: (n, c, H, W) -> (n, sum of c_k, h, w)."""
        if not ks:
            raise ConfigError("slices: expected at least one slice; received none")
        rows = [row for k in ks for row in self.rows(k)]
        return self._spectrum(images, rows).transpose(0, 1).flatten(1, 2)

    def extra_repr(self) -> str:
        return (
            f"image_shape={self.image_shape}, block={self.block}, reorganisation={self.reorganisation}, "
            f"transform={self.transform}, pad={self.pad}, n_slices={self.n_slices}"
        )

    def _spectrum(self, images: Tensor, rows: Sequence[int], out: Tensor | None = None) -> Tensor:
        """Some rows of the transform, written where they stay. Shapes: (n, c, H, W) -> (r, n, c, h, w)."""
        self._require_fitted()
        self._check_images(images)
        matrix = self._rows_for(images, rows)
        c, (_, h, w) = self.image_shape[0], self.slice_shape(0)
        shape = (len(matrix), len(images), c, h, w)
        with _full_precision(images):
            if torch.is_grad_enabled() and images.requires_grad:  # a written memory has no gradient
                return (matrix @ self._components(images)).view(shape)
            spectrum = _memory(out, shape, matrix)
            write, n_pixels = self._writer(matrix)
            chunks = _chunks(images, n_pixels)
            for chunk, part in zip(chunks, spectrum.split([len(chunk) for chunk in chunks], 1), strict=True):
                write(chunk, part)
        return spectrum

    def _writer(self, matrix: Tensor) -> tuple[Callable[[Tensor, Tensor], object], int]:
        """A function that writes some rows of the transform, and the pixels it should get at a time.

        Shapes: matrix (r, b); images (n, c, H, W), out (r, n, c, h, w).
        """
        if len(matrix) > 1:
            return lambda images, out: torch.mm(matrix, self._components(images), out=out.flatten(1)), CHUNK
        weights, combine = matrix[0], REORGANISATIONS[self.reorganisation].combine
        is_long = self.block[1] > 2 and not weights.is_cuda  # sums of two neighbours gain nothing, nor does a GPU
        factors = rank_one(weights.unflatten(0, self.block)) if combine is not None and is_long else None
        if combine is None or factors is None:  # as a matrix product up to twice as slow
            return lambda images, out: torch.mv(self._components(images).T, weights, out=out.flatten()), CHUNK
        return lambda images, out: out[0].copy_(combine(self._padded(images), *factors)), ONE_SLICE_CHUNK

    def _components(self, images: Tensor) -> Tensor:
        return REORGANISATIONS[self.reorganisation].components(self._padded(images), self.block)

    def _rows_for(self, images: Tensor, rows: Sequence[int]) -> Tensor:
        return self.matrix[list(rows)].to(torch.result_type(images, 1.0))

    def _check_images(self, images: Tensor) -> None:
        known = images.is_floating_point() or images.dtype == torch.uint8
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape or not known:
            raise DataError(
                f"images: expected floating point or uint8 (n, {', '.join(map(str, self.image_shape))}); "
                f"received {images.dtype} {tuple(images.shape)}"
            )

    def _padded(self, images: Tensor) -> Tensor:
        pixels = images if images.is_floating_point() else images / 255
        if self.pad is None or self.padding == (0, 0):
            return pixels
        return F.pad(pixels, (0, self.padding[1], 0, self.padding[0]), mode=PADS[self.pad])

    def _check_slices(self, slices: Sequence[Tensor]) -> None:
        expected = [self.slice_shape(k) for k in range(self.n_slices)]
        received = [tuple(part.shape[1:]) for part in slices]
        if received != expected:
            raise DataError(f"slices: expected, after the batch, shapes {expected}; received {received}")

    def _require_fitted(self) -> None:
        if not self.is_fitted:
            raise ConfigError(
                f"data.transform={self.transform} is learned from training images: call fit(images), or load "
                f"the state of a fitted split, before the first slice is made"
            )


def rank_one(weights: Tensor) -> tuple[Tensor, Tensor] | None:
    """Vectors u and v with weights = u v^T, if there are any: the basis images of separable transforms.

    Shapes: (bh, bw) -> (bh,), (bw,).
    """
    u, s, vh = torch.linalg.svd(weights.double())
    if len(s) > 1 and s[1] > 1e-6 * s[0]:
        return None
    return (u[:, 0] * s[0]).to(weights), vh[0].to(weights)


def _chunks(images: Tensor, n_pixels: int) -> Sequence[Tensor]:
    """The images in parts of about `n_pixels`; all at once on a GPU, which wants few large steps."""
    if images.device.type != "cpu":
        return [images]
    return images.split(max(1, n_pixels // prod(images.shape[1:])))


def _memory(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`out`, or new memory. Raises: DataError unless it is contiguous and of the shape and type of the result."""
    if out is None:
        return like.new_empty(shape)
    if tuple(out.shape) != shape or out.dtype != like.dtype or not out.is_contiguous():
        raise DataError(
            f"out: expected contiguous {like.dtype} {shape}; received {out.dtype} {tuple(out.shape)}, "
            f"{'' if out.is_contiguous() else 'not '}contiguous"
        )
    return out


def _full_precision(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _note_loaded_matrix(split: nn.Module, incompatible_keys: Any) -> None:
    """A fitted matrix that came with a state dict counts as fitted."""
    assert isinstance(split, SpectralSplit), "the hook is registered by SpectralSplit alone"
    split.is_fitted = bool(split.matrix.isfinite().all())
