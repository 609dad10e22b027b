"""16 branches of the MNIST network trained in one process, against other ways to train 16 networks of that size."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import packages, plain
from benchmarks.compare import Pair, Side, Turn, rows
from benchmarks.data import Data
from benchmarks.setting import Setting
from benchmarks.stl import arguments, training

B = 16
N_EPOCH = 55_000
N_PART = 110 * plain.BATCH  # what a repetition of the slow ways trains on
STACKED, BMM = "stl", "bmm loop by hand"
PAIRS = [
    Pair(STACKED, BMM, "ratio >= 0.9"),
    Pair(STACKED, "sequential loops, DataLoader of images", "ratio >= 4"),
    Pair(STACKED, "Lightning Trainer per branch, DataLoader, CSV every step", "ratio >= 6"),
    Pair(STACKED, "torchensemble VotingClassifier"),
    Pair(STACKED, "torch-uncertainty packed layers"),
]


def measure(setting: Setting) -> Iterator[dict[str, Any]]:
    threads = setting.n_threads(2)
    whole, part = setting.data("mnist", N_EPOCH), setting.data("mnist", N_PART, n_quick=128)
    for device in setting.devices:
        ways: list[Side] = [
            training(arguments(setting, "mnist.yaml", whole, device), whole.n),
            by_bmm(whole, device),
            by_sequential_loops(part, device),
            by_lightning(part, device, str(setting.folder)),
            by_torchensemble(part, device),
            by_packed_layers(part, device),
        ]
        names = [STACKED, *(pair.against for pair in PAIRS)]
        values = setting.take_turns(dict(zip(names, ways, strict=True)), threads)
        common: dict[str, Any] = {"device": device, "threads": threads, "data": whole.origin}
        for row in rows(values, PAIRS, "samples x branches / s", **common):
            data = whole if row["against"] == BMM else part
            yield row | {"steps": whole.n // plain.BATCH, "steps_against": data.n // plain.BATCH}


def by_bmm(data: Data, device: str) -> Side:
    def side(turn: Turn) -> None:
        slices, labels = (part.to(device) for part in data.sliced("raster", 4, "dct"))
        x = slices.flatten(2)
        parameters = plain.bmm_parameters([plain.mlp().to(device) for _ in range(B)])
        optimizer = plain.adam(tensor for layer in parameters for tensor in layer)
        while True:
            plain.bmm_epoch(parameters, optimizer, x, labels, torch.randperm(data.n, device=device))
            turn.done(B * data.n / turn.seconds())

    return side


def by_sequential_loops(data: Data, device: str) -> Side:
    def side(turn: Turn) -> None:
        loader = plain.image_loader(*data.load())
        networks = [plain.mlp().to(device) for _ in range(B)]
        optimizers = [plain.adam(network.parameters()) for network in networks]
        matrix = plain.dct_matrix(B).to(device)
        while True:
            for k in range(B):
                batches = plain.slice_batches(loader, matrix, k, torch.device(device))
                plain.epoch(networks[k], optimizers[k], batches)
            turn.done(B * data.n / turn.seconds())

    return side


def by_lightning(data: Data, device: str, folder: str) -> Side:
    def side(turn: Turn) -> None:
        slices, labels = data.sliced("raster", 4, "dct")
        loaders = [plain.image_loader(x, labels) for x in slices]
        modules = [packages.Classifier(plain.mlp()) for _ in range(B)]
        while True:
            seconds = [
                packages.lightning_epoch(module, loader, folder, device)
                for module, loader in zip(modules, loaders, strict=True)
            ]
            turn.done(B * data.n / sum(seconds))

    return side


def by_torchensemble(data: Data, device: str) -> Side:
    """All members read slice 0: it trains every one on the same input."""

    def side(turn: Turn) -> None:
        ensemble = packages.voting_classifier(plain.mlp(), B, on_gpu=device == "cuda")
        slices, labels = data.sliced("raster", 4, "dct")
        loader = plain.image_loader(slices[0], labels)
        while True:
            ensemble.fit(loader, epochs=1, log_interval=10**9, save_model=False)
            turn.done(B * data.n / turn.seconds())

    return side


def by_packed_layers(data: Data, device: str) -> Side:
    """All members read slice 0: packed layers have one input."""

    def side(turn: Turn) -> None:
        network = packages.packed_mlp(B).to(device)
        optimizer = plain.adam(network.parameters())
        slices, labels = (part.to(device) for part in data.sliced("raster", 4, "dct"))
        while True:
            order = torch.randperm(data.n, device=device)
            for x, targets in plain.batches_of(slices[0], labels, order):
                loss = B * F.cross_entropy(network(x), targets.repeat(B))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            turn.done(B * data.n / turn.seconds())

    return side
