"""The four CIFAR-10 branches of ten convolutions, against the same four in plain PyTorch, one after the other."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from benchmarks import plain
from benchmarks.compare import Pair, Side, Turn, only_where, rows
from benchmarks.data import Data
from benchmarks.setting import Setting
from benchmarks.stl import NO_AUGMENTATION, arguments, no_bfloat16, training
from stl_lightning.networks import ConvNet

B = 4
N_PART = 8 * plain.BATCH
FLOAT, BFLOAT = "plain loops, channels_last", "plain loops, channels_last, bfloat16"
# name -> settings; the rate of branches in sequence is that of one branch alone, per sample and branch
WAYS = {"in sequence": ("--run.stack=false", "--model.channels_last=true"), "stacked": ("--run.stack=true",)}
AUTO = {"cpu": "in sequence", "cuda": "stacked"}  # what run.stack=auto takes
BF16 = "--trainer.precision=bf16-mixed"


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    data = setting.data("cifar10", N_PART, n_quick=16)
    for device in setting.devices:
        pairs = [Pair(f"stl {way}", FLOAT) for way in WAYS]
        pairs += [Pair(f"stl {way}, bfloat16", BFLOAT, "ratio >= 1.0" if way == AUTO[device] else None) for way in WAYS]
        values = setting.take_turns(sides(setting, data, device), threads)
        yield from rows(
            values, pairs, "samples x branches / s", device=device, threads=threads, data=data.origin,
            steps=data.n // plain.BATCH,
        )  # fmt: skip


def sides(setting: Setting, data: Data, device: str) -> dict[str, Side]:
    stl = partial(arguments, setting, "cifar10.yaml", data, device, *NO_AUGMENTATION)
    ours = {f"stl {way}": training(stl(*settings), data.n) for way, settings in WAYS.items()}
    plain_loops = {FLOAT: by_plain_loops(data, device, None)}
    bfloat = {f"stl {way}, bfloat16": training(stl(*settings, BF16), data.n) for way, settings in WAYS.items()}
    bfloat[BFLOAT] = by_plain_loops(data, device, torch.bfloat16)
    return ours | plain_loops | {name: only_where(partial(no_bfloat16, device), side) for name, side in bfloat.items()}


def by_plain_loops(data: Data, device: str, dtype: torch.dtype | None) -> Side:
    def side(turn: Turn) -> None:
        slices, labels = (part.to(device) for part in data.sliced("polyphase", 2, "dct"))
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in slices]
        networks = [ConvNet((3, 16, 16), 10).to(device).to(memory_format=torch.channels_last) for _ in range(B)]
        optimizers = [plain.adam(network.parameters()) for network in networks]
        precision = partial(torch.autocast, device, dtype) if dtype else nullcontext
        while True:
            for x, network, optimizer in zip(inputs, networks, optimizers, strict=True):
                order = torch.randperm(data.n, device=device)
                plain.epoch(network, optimizer, plain.batches_of(x, labels, order), precision)
            turn.done(B * data.n / turn.seconds())

    return side
