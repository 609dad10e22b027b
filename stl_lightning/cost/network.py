"""What a network costs, counted by running it on a few images of zeros.

Letters: n samples, c channels, h w space, k classes.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, int, int]

FEW, MORE = 2, 4  # images of the two batches that are tried; BatchNorm cannot train on one
# Of `trainer.precision`; anything else is float32.
DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}


def n_parameters(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers, as they are kept in memory and, but for a header, in a file."""
    return sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))


def multiply_adds(network: nn.Module, in_shape: Shape) -> int:
    """Of the forward pass of one image: those of matrix products and convolutions, which are nearly all.

    Half of `torch.utils.flop_counter.FlopCounterMode`, which counts the multiplication and the addition; an
    `nn.LSTM` counts as none.
    """
    first = next(network.parameters())
    fuses = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator for a whole layer of attention, not counted either
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(first.new_zeros(1, *in_shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(fuses)
    return counter.get_total_flops() // 2


def activation_bytes(
    network: nn.Module, in_shape: Shape, n_classes: int, batch_size: int, precision: str = "32-true"
) -> int:
    """Bytes that the forward pass of a training batch and its loss keep for the backward pass, beside the weights.

    A memory that several layers keep counts once. What is kept is a constant and a share of each image, so that two
    small batches tell it of any. `precision` as in `trainer.precision`; the network has to be in it, where it is true.
    Updates the buffers of the network, as training does.
    """
    few, more = (_saved_bytes(network, in_shape, n_classes, n, precision) for n in (FEW, MORE))
    return few + (batch_size - FEW) * (more - few) // (MORE - FEW)


def in_precision(network: nn.Module, precision: str) -> nn.Module:
    """The network with its weights as `trainer.precision` keeps them: "mixed" ones stay in float32."""
    kind, how = _precision(precision)
    return network if how == "mixed" else network.to(DTYPES.get(kind, torch.float32))


def _precision(precision: str) -> tuple[str, str]:
    """The type and "true" or "mixed", which is what Lightning takes "bf16" alone for."""
    kind, _, how = str(precision).partition("-")
    return kind, how or ("mixed" if kind == "bf16" else "true")


def _saved_bytes(network: nn.Module, in_shape: Shape, n_classes: int, n: int, precision: str) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # holds them, so that no memory is used twice
    x = next(network.parameters()).new_zeros(n, *in_shape)
    targets = torch.arange(n) % n_classes
    with torch.autograd.graph.saved_tensors_hooks(_keep_in(kept), _never), _autocast(precision):
        F.cross_entropy(network.train()(x), targets)
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own)


def _keep_in(kept: dict[int, torch.UntypedStorage]) -> Callable[[Tensor], None]:
    def keep(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage

    return keep


def _never(_: None) -> Tensor:
    raise AssertionError("nothing goes backward here")


def _autocast(precision: str) -> AbstractContextManager[object]:
    kind, how = _precision(precision)
    return torch.autocast("cpu", DTYPES[kind]) if how == "mixed" else nullcontext()
