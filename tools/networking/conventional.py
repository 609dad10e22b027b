"""One worker that trains the conventional network on the whole image, in plain PyTorch.

Letters: n images, c channels, h w space.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from networking.nodes import address
from networking.work import N_WORKERS, EpochLog, Work
from stl_lightning.networks import ConvNet

PORT = 29400
Training = tuple[nn.Module, Any]  # what is called with a batch, and its optimiser


@dataclass(frozen=True)
class Method:
    """How to prepare a network for training, and over how many workers the images are shared."""

    prepare: Callable[[nn.Module, Work], Training]
    n_shares: int = N_WORKERS
    exchanges: bool = True

    def n_warm_steps(self, work: Work) -> int:
        return work.n_warm_steps if self.n_shares > 1 else 1


def train_worker(name: str, worker: int, work: Work, log: EpochLog, n_turns: int) -> None:
    """All that one worker does; `name` is one of `METHODS`."""
    torch.manual_seed(0)
    method = METHODS[name]
    x, labels = load(work, slice(worker % method.n_shares, work.n_images, method.n_shares))
    batches = endless_batches(x, labels, work.batch // method.n_shares)
    if method.exchanges:
        join(worker)
    network = ConvNet((3, 32, 32), 10, work.baseline_widths)
    model, optimizer = method.prepare(network, work)
    for n_steps in (method.n_warm_steps(work), *[work.steps_per_epoch] * (n_turns - 1)):
        log.begin()
        train(model, optimizer, batches, n_steps)
        log.end(n_steps)
        log.note({"network_bytes": size(network)} | (ring(size(network)) if name == "ddp" else {}))
    if method.exchanges:
        dist.destroy_process_group()


def load(work: Work, share: slice) -> tuple[Tensor, Tensor]:
    """A worker's share of the images, as one tensor (n c h w) in [-1, 1], and labels (n,)."""
    with np.load(work.images) as arrays:
        pixels, labels = arrays["train_images"][share], arrays["train_labels"][share]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.from_numpy(labels).long()


def join(worker: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    dist.init_process_group("gloo", f"tcp://{address(0)}:{PORT}", rank=worker, world_size=N_WORKERS)


def endless_batches(x: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for indices in torch.randperm(len(x)).split(size):
            if len(indices) == size:
                yield x[indices], labels[indices]


def train(model: nn.Module, optimizer: Any, batches: Iterator[tuple[Tensor, Tensor]], n_steps: int) -> None:
    for _ in range(n_steps):
        x, labels = next(batches)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def no_exchange(network: nn.Module, work: Work) -> Training:
    return network, torch.optim.Adam(network.parameters(), lr=work.lr, fused=True)


def ddp(network: nn.Module, work: Work, bucket_mb: float | None = None) -> Training:
    """Gradients are averaged in every step. Running means are not: those of one worker will do, and cost nothing."""
    model = DistributedDataParallel(network, broadcast_buffers=False, bucket_cap_mb=bucket_mb or work.bucket_mb)
    return model, no_exchange(network, work)[1]


def powersgd(network: nn.Module, work: Work) -> Training:
    """Of the gradients, a factorisation of low rank is exchanged. Source: Vogels et al. 2019; torch's hook."""
    # All gradients in one bucket: the hook goes on with a bucket when something has arrived, and so with several in an
    # order that differs between workers. Gloo takes that for a mismatch and aborts.
    model, optimizer = ddp(network, work, bucket_mb=size(network))
    state = powerSGD_hook.PowerSGDState(None, work.powersgd_rank, start_powerSGD_iter=work.n_warm_steps)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)  # type: ignore[operator]
    return model, optimizer


def local_sgd(network: nn.Module, work: Work) -> Training:
    """Every few steps the weights are averaged. Source: Lin et al. 2018; torch's hook, averager and optimiser."""
    model, optimizer = ddp(network, work)
    alone, _ = dist.new_subgroups(group_size=1)
    state = post_localSGD_hook.PostLocalSGDState(None, alone, start_localSGD_iter=work.n_warm_steps)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)  # type: ignore[operator]
    averager = PeriodicModelAverager(work.local_sgd_period, warmup_steps=work.n_warm_steps)
    return model, PostLocalSGDOptimizer(optimizer, averager)


METHODS = {
    "ddp": Method(ddp),
    "powersgd": Method(powersgd),
    "local-sgd": Method(local_sgd),
    "no exchange": Method(no_exchange, exchanges=False),
    "one worker": Method(no_exchange, n_shares=1, exchanges=False),
}


def size(network: nn.Module) -> int:
    """Bytes of all weights, and so of all gradients."""
    return sum(weight.numel() * weight.element_size() for weight in network.parameters())


def ring(n_bytes: int) -> dict[str, float]:
    """Seconds of an all-reduce of 4 bytes and of `n_bytes`, with nothing else to do: medians."""
    return {"tiny_all_reduce_s": all_reduce_s(1, 30), "all_reduce_s": all_reduce_s(n_bytes // 4, 3)}


def all_reduce_s(n_numbers: int, n_times: int) -> float:
    x = torch.zeros(n_numbers)
    seconds = []
    for _ in range(n_times):
        dist.barrier()
        since = time.perf_counter()
        dist.all_reduce(x)
        seconds.append(time.perf_counter() - since)
    return statistics.median(seconds)
