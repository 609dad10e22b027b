"""One branch as a LightningModule: network, loss, metrics, optimiser, schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stl_lightning.errors import ConfigError, DivergedError
from stl_lightning.networks import MLP

IDENTITY = "stl_lightning"  # key of the identity inside a checkpoint

NetworkFactory = Callable[[tuple[int, int, int], int], nn.Module]
OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

# On a GPU, reading the loss stops the queue of kernels: the step is noted on the device and read this often.
LOSS_CHECK_STEPS = 50


class BranchModule(LightningModule):
    """Trains one network on the slices of one branch with cross-entropy.

    Args:
        network: Class of the branch network, called as network(in_shape, n_classes) with in_shape = (c, h, w).
        optimizer: Class of the optimiser, called with the parameters.
        lr_scheduler: Class of the learning-rate schedule, called with the optimiser; null keeps the rate constant.
        lr_interval: Whether the schedule advances every `epoch` or every `step`.
        label_smoothing: Share of the target spread over all classes, as in torch.nn.CrossEntropyLoss.

    Raises: DivergedError that names the step, once the training loss is no longer finite.
    """

    network: nn.Module | None
    train_totals: Tensor
    diverged_at: Tensor

    def __init__(
        self,
        network: NetworkFactory = MLP,
        optimizer: OptimizerFactory = torch.optim.Adam,
        lr_scheduler: SchedulerFactory | None = None,
        lr_interval: str = "epoch",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        if lr_interval not in ("epoch", "step"):
            raise ConfigError(f"model.lr_interval: expected epoch or step, got {lr_interval!r}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"model.label_smoothing: expected a share below 1, got {label_smoothing}")
        self.network_factory = network
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.network = None
        self.identity: dict[str, Any] = {}  # whose weights these are: run, branch, number of branches
        # Loss sum, correct answers and images since the epoch began. In the state, so that an epoch that was resumed
        # in the middle reports the same mean as an undisturbed one.
        self.register_buffer("train_totals", torch.zeros(3))
        self.register_buffer("diverged_at", torch.tensor(-1), persistent=False)

    def build(self, in_shape: tuple[int, int, int], n_classes: int, seed: int, branch: int) -> "BranchModule":
        """Create the network. Its weights depend on (seed, branch) alone, not on what the process did before."""
        # On the CPU whatever the accelerator: another device would draw other numbers.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(branch_seed(seed, branch))
            self.network = self._construct(in_shape, n_classes)
        return self

    def _construct(self, in_shape: tuple[int, int, int], n_classes: int) -> nn.Module:
        try:
            return self.network_factory(in_shape, n_classes)
        except TypeError as error:
            raise ConfigError(
                f"model.network: expected a class that is called as network(in_shape, n_classes), here "
                f"{in_shape}, {n_classes}; it answered: {error}"
            ) from error

    def check_output(self, in_shape: tuple[int, int, int], n_classes: int) -> None:
        """Raises: ConfigError unless two slices (2 c h w) give logits (2 k)."""
        expected = f"model.network: expected logits {(2, n_classes)} for slices {(2, *in_shape)}"
        try:
            with torch.no_grad():
                received = tuple(self.eval()(torch.zeros(2, *in_shape)).shape)
        except RuntimeError as error:
            raise ConfigError(f"{expected}, received an error: {error}") from error
        if received != (2, n_classes):
            raise ConfigError(f"{expected}, received {received}")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n k) of standardised slices (n c h w)."""
        assert self.network is not None, "build() comes before forward()"
        return self.network(x)

    def configure_optimizers(self) -> Any:
        assert self.network is not None, "build() comes before configure_optimizers()"
        optimizer = self.optimizer_factory(self.network.parameters())
        if self.scheduler_factory is None:
            return optimizer
        scheduler = self.scheduler_factory(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "model.lr_scheduler: ReduceLROnPlateau acts after an epoch's checkpoint is written, so a run that was "
                "killed could not resume exactly; expected a schedule of steps or epochs, such as CosineAnnealingLR"
            )
        return [optimizer], [{"scheduler": scheduler, "interval": self.lr_interval}]

    def on_train_epoch_start(self) -> None:
        self.train_totals.zero_()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        x, labels = batch
        logits = self(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        self._note(logits.detach(), labels, loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        self.stop_if_diverged()
        loss_sum, n_correct, n_images = self.train_totals.tolist()
        lr = self.optimizers().param_groups[0]["lr"]  # type: ignore[union-attr]
        self.log_dict({"train/loss": loss_sum / n_images, "train/acc": n_correct / n_images, "lr": lr})

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._log_scores("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._log_scores("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> tuple[Tensor, Tensor]:
        x, labels = batch
        return self(x), labels

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY] = self.identity

    def stop_if_diverged(self) -> None:
        step = int(self.diverged_at)
        if step >= 0:
            raise DivergedError(
                f"the training loss is not finite at step {step}; lower model.optimizer.init_args.lr, or set "
                "trainer.gradient_clip_val"
            )

    def _note(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        n_correct = (logits.argmax(1) == labels).sum()
        n_images = labels.new_tensor(len(labels))
        self.train_totals.add_(torch.stack([loss.float() * n_images, n_correct, n_images]))
        if loss.device.type == "cpu":
            if not math.isfinite(loss.item()):
                self.diverged_at.fill_(self.global_step)
                self.stop_if_diverged()
            return
        is_first = ~torch.isfinite(loss) & (self.diverged_at < 0)
        self.diverged_at.masked_fill_(is_first, self.global_step)
        if self.global_step % LOSS_CHECK_STEPS == 0:
            self.stop_if_diverged()

    def _log_scores(self, split: str, batch: tuple[Tensor, Tensor]) -> None:
        x, labels = batch
        logits = self(x).float()
        scores = {
            f"{split}/loss": F.cross_entropy(logits, labels),
            f"{split}/acc": (logits.argmax(1) == labels).float().mean(),
        }
        self.log_dict(scores, on_epoch=True, on_step=False, batch_size=len(labels), prog_bar=True)


def branch_seed(seed: int, branch: int) -> int:
    """The seed of everything random in one branch that other branches must not share: weights, dropout."""
    return (seed * 1_000_003 + branch * 7_919 + 1) % 2**31
