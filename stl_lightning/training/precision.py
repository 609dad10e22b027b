"""Whether a device computes in the precision of `trainer.precision`, or only emulates it."""

import platform
import sys

import torch


def check_precision(precision: str | int | None, device: torch.device) -> None:
    """Says so where bfloat16 is emulated: the results are the same, but float32 is many times faster there.

    A CPU computes in it if it has AVX-512, AMX or ARM's bfloat16 (those that oneDNN has kernels for), a GPU from
    compute capability 8.0.
    """
    if str(precision).startswith("bf16") and not has_bfloat16(device):
        print(
            f"trainer.precision: {precision} is emulated on {device.type} of {platform.node()}, which has no "
            "instructions for bfloat16; 32-true is many times faster there",
            file=sys.stderr,
        )


def has_bfloat16(device: torch.device) -> bool:
    """True for devices that cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True
