"""What branches and their baseline cost: parameters, multiply-adds, memory, bytes of data, seconds, bytes sent."""

from stl_lightning.cost.measured import measured, measured_in_all, read_epochs
from stl_lightning.cost.network import activation_bytes, multiply_adds, n_parameters, weight_bytes
from stl_lightning.cost.totals import Training, costs, slice_multiply_adds

__all__ = [
    "Training",
    "activation_bytes",
    "costs",
    "measured",
    "measured_in_all",
    "multiply_adds",
    "n_parameters",
    "read_epochs",
    "slice_multiply_adds",
    "weight_bytes",
]
