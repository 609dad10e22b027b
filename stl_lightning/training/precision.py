"""Whether a device computes in the precision of `trainer.precision`, or only emulates it."""

import platform

import torch

from stl_lightning.errors import say


def warn_of_emulation(precision: str | int | None, device: torch.device) -> None:
    """Say so where bfloat16 is emulated: with the numbers that hardware would give, but many times slower than float32.

    A CPU computes in it if oneDNN has kernels for it there (AVX-512, AMX, ARM's bfloat16), a GPU from compute
    capability 8.0.
    """
    if is_emulated(precision, device):
        say(
            f"trainer.precision: {precision} is emulated on {device.type} of {platform.node()}, which has no "
            "instructions for bfloat16; 32-true is many times faster there"
        )


def is_emulated(precision: str | int | None, device: torch.device) -> bool:
    """Whether a device only emulates the bfloat16 of `trainer.precision`; False for any other precision."""
    return str(precision).startswith("bf16") and not has_bfloat16(device)


def has_bfloat16(device: torch.device) -> bool:
    """True for devices that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
