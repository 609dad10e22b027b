"""Other ways to train several small networks that a user might take: Lightning itself, torchensemble, packed layers."""

import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.compare import needs
from benchmarks.plain import LR, adam


class Classifier(LightningModule):
    """A classifier as Lightning's introduction writes it; notes how long it trained, without set-up."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.trained_s = 0.0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, labels = batch
        loss = F.cross_entropy(self.network(x), labels)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adam(self.network.parameters())

    def on_train_start(self) -> None:
        self._since = time.perf_counter()

    def on_train_end(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.trained_s += time.perf_counter() - self._since


def lightning_epoch(module: Classifier, loader: DataLoader[Any], folder: str, accelerator: str) -> float:
    """Seconds of one epoch with a Trainer of its own that writes every step's loss to a CSV file."""
    trainer = Trainer(
        max_epochs=1,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        accelerator=accelerator,
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    before = module.trained_s
    trainer.fit(module, loader)
    return module.trained_s - before


def voting_classifier(member: nn.Module, n_members: int, on_gpu: bool) -> Any:
    """torchensemble's ensemble of independently trained members, with the optimiser of the others."""
    ensemble = needs("torchensemble").VotingClassifier(estimator=member, n_estimators=n_members, cuda=on_gpu)
    ensemble.set_optimizer("Adam", lr=LR, fused=True)
    return ensemble


def packed_mlp(n_members: int, n_inputs: int = 49, n_classes: int = 10, depth: int = 8) -> nn.Sequential:
    """torch-uncertainty's packed layers, as many members as wide as `plain.mlp`; all read the same input.

    Shapes: (n f) -> (n_members n, k), the members one after the other.
    """
    packed = needs("torch-uncertainty", "torch_uncertainty.layers").PackedLinear
    size = {"alpha": n_members, "num_estimators": n_members}
    first = packed(n_inputs, n_inputs, first=True, **size)
    middle = [packed(a, b, **size) for a, b in pairwise([n_inputs] * (depth - 1))]
    hidden = [part for layer in (first, *middle) for part in (layer, nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, packed(n_inputs, n_classes, last=True, **size))
