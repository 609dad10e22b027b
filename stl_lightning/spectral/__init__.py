"""Images to spectral slices and back: reorganisations, orthonormal transforms, tensor product and layers."""

from stl_lightning.spectral.layers import SpectralConv2d, SpectralLinear
from stl_lightning.spectral.product import from_spectral, structured_matrix, tensor_product, to_spectral
from stl_lightning.spectral.reorganise import REORGANISATIONS, Reorganisation
from stl_lightning.spectral.split import SpectralSplit
from stl_lightning.spectral.transforms import (
    TRANSFORMS,
    Basis,
    Transform,
    build_basis,
    fitting_transforms,
    unitary_dft,
)

__all__ = [
    "REORGANISATIONS",
    "TRANSFORMS",
    "Basis",
    "Reorganisation",
    "SpectralConv2d",
    "SpectralLinear",
    "SpectralSplit",
    "Transform",
    "build_basis",
    "fitting_transforms",
    "from_spectral",
    "structured_matrix",
    "tensor_product",
    "to_spectral",
    "unitary_dft",
]
