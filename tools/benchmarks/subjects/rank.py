"""One branch of the MNIST network in a process of its own, against a plain loop with the whole slice as one tensor."""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import plain
from benchmarks.compare import Pair, Side, Turn, rows
from benchmarks.data import Data
from benchmarks.setting import Setting
from benchmarks.stl import arguments, training

N_EPOCH = 55_000
PAIR = Pair("stl", "plain loop on tensors", "ratio >= 0.95")


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(1)
    data = setting.data("mnist", N_EPOCH)
    for device in setting.devices:
        args = arguments(setting, "mnist.yaml", data, device, "--run.branches=[0]")
        sides = {PAIR.name: training(args, data.n), PAIR.against: by_plain_loop(data, device)}
        values = setting.take_turns(sides, threads)
        yield from rows(values, [PAIR], "samples / s", device=device, threads=threads, data=data.origin)


def by_plain_loop(data: Data, device: str) -> Side:
    def side(turn: Turn) -> None:
        slices, labels = (part.to(device) for part in data.sliced("raster", 4, "dct"))
        network = plain.mlp().to(device)
        optimizer = plain.adam(network.parameters())
        while True:
            order = torch.randperm(data.n, device=device)
            plain.epoch(network, optimizer, plain.batches_of(slices[0], labels, order))
            turn.done(data.n / turn.seconds())

    return side
