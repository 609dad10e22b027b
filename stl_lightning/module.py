"""The branches that a process trains together, as one LightningModule: networks, loss, metrics, optimiser, schedule.

Letters: s branches, n samples, c channels, h w space, k classes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stl_lightning.averaging import Averages, check_averaging
from stl_lightning.errors import ConfigError, DivergedError
from stl_lightning.loaders import Chunk
from stl_lightning.networks import MLP, BranchNetworks, NetworkFactory
from stl_lightning.ranges import by_number
from stl_lightning.stacked import clip_gradients, stack, stacked_forward

IDENTITY = "stl_lightning"  # key of the identities inside a checkpoint
TOTALS = "train_totals"  # of the sums since the epoch began
AVERAGES = "averages"  # and of the averaged weights, beside the weights themselves

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

HALF_MAX = torch.finfo(torch.float16).max
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")


def _make(setting: str, factory: Callable[[Any], Any], of: Any) -> Any:
    """What a factory of the settings makes. Raises: ConfigError with what torch says against its arguments."""
    try:
        return factory(of)
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        raise ConfigError(f"{setting}: {error}") from error


class BranchModule(LightningModule):
    """Trains the networks of one branch or of several, stacked, with cross-entropy on the slices of each.

    A batch of Lightning's is a chunk of minibatches; the module makes the steps itself, so that Lightning's cost of a
    step is paid once a chunk.

    Args:
        network: Class of the branch network, called as network(in_shape, n_classes) with in_shape = (c, h, w).
        optimizer: Class of the optimiser, called with the parameters.
        lr_scheduler: Class of the learning-rate schedule, called with the optimiser; null keeps the rate constant.
        lr_interval: Whether the schedule advances every `epoch` or every `step`.
        label_smoothing: Share of the target spread over all classes, as in torch.nn.CrossEntropyLoss.
        channels_last: Keep images and filters with their channels last in memory, where branches train one by one.
        compile: Mode of torch.compile: default, reduce-overhead (CUDA graphs) or max-autotune; null is off.
        averaging: Decay of a moving average of the weights, which is validated and kept as the best; null is off.
        network_of: Options (init_args) of the network of some branches, in place of those in `network`; the keys are
            branches, such as 0 or 1-3,7.

    Raises: DivergedError that names the step, once the training loss of every branch is no longer finite.
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
        channels_last: bool = False,
        compile: str | None = None,
        averaging: float | None = None,
        network_of: dict[str | int, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if lr_interval not in ("epoch", "step"):
            raise ConfigError(f"model.lr_interval: expected epoch or step, got {lr_interval!r}")
        if not 0.0 <= label_smoothing < 1.0:
            raise ConfigError(f"model.label_smoothing: expected a share below 1, got {label_smoothing}")
        check_averaging(averaging)
        if compile not in (None, *COMPILE_MODES):
            raise ConfigError(f"model.compile: expected null or one of {', '.join(COMPILE_MODES)}, got {compile!r}")
        self.automatic_optimization = False
        self.networks = BranchNetworks(network, by_number("model.network_of", network_of or {}))
        self.optimizer_factory = optimizer
        self.scheduler_factory = lr_scheduler
        self.lr_interval = lr_interval
        self.label_smoothing = label_smoothing
        self.averaging = averaging
        self.channels_last = channels_last
        self.compile_mode = compile
        self.network = None
        self.averages: Averages | None = None  # in training only
        self._loaded_averages: dict[str, Tensor] | None = None  # of the checkpoint that training goes on from
        self._validating = ExitStack()
        self.identities: list[dict[str, Any]] = [{}]  # whose weights these are: run, branch, number of branches
        self.gradient_clip: tuple[float, str] | None = None  # limit, and norm or value
        self.accumulate = 1  # minibatches a step
        self.n_kept_logits = 0  # of the first validation images
        self.is_leaving: Callable[[], bool] = lambda: False  # asked between two steps, also in the middle of a chunk
        self.leave: Callable[[], None] = lambda: None  # called there, if so
        self.has_stepped = True  # after the last minibatch

    def build(
        self, in_shape: tuple[int, int, int], n_classes: int, seed: int, branches: Sequence[int]
    ) -> "BranchModule":
        """Create the networks. The weights of a branch depend on (seed, branch) alone, not on what happened before."""
        networks = [self.networks.construct(in_shape, n_classes, seed, branch) for branch in branches]
        self.n_branches = len(networks)
        self.network = networks[0] if len(networks) == 1 else stack(networks)
        # Stacked filters have five dimensions, and a layout that vmap decides.
        self.is_channels_last = self.channels_last and self.n_branches == 1
        if self.is_channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)
        # Loss sum, correct answers and images since the epoch began. No buffer, which bf16-true would round; but in the
        # checkpoint, so that an epoch that was resumed in the middle reports the same mean as an undisturbed one.
        self.train_totals = torch.zeros(self.n_branches, 3)
        self.val_totals = torch.zeros(self.n_branches, 3)  # the same of the last validation
        self.register_buffer("diverged_at", torch.full((self.n_branches,), -1), persistent=False)
        self._forward = (
            self._run_network if self.compile_mode is None else torch.compile(self._run_network, mode=self.compile_mode)
        )
        return self

    def check_output(self, in_shape: tuple[int, int, int], n_classes: int) -> None:
        """Raises: ConfigError unless two slices (2 c h w) give logits (2 k)."""
        expected = f"model.network: expected logits {(2, n_classes)} for slices {(2, *in_shape)}"
        try:
            with torch.no_grad():
                received = tuple(self.eval()(torch.zeros(2, *in_shape)).shape)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"{expected}, received an error: {error}") from error
        if received != (2, n_classes):
            raise ConfigError(f"{expected}, received {received}")

    def forward(self, x: Tensor) -> Tensor:
        """Logits of standardised slices: (n c h w) -> (n k) for one branch, (s n c h w) -> (s n k) for several."""
        if self.is_channels_last:
            x = x.to(memory_format=torch.channels_last)
        return self._forward(x)

    def _run_network(self, x: Tensor) -> Tensor:
        assert self.network is not None, "build() comes before forward()"
        return self.network(x) if self.n_branches == 1 else stacked_forward(self.network, x)

    def configure_optimizers(self) -> Any:
        assert self.network is not None, "build() comes before configure_optimizers()"
        optimizer = _make("model.optimizer", self.optimizer_factory, self.network.parameters())
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ConfigError("model.optimizer: LBFGS evaluates the loss several times a step; expected SGD, Adam, ...")
        if self.scheduler_factory is None:
            return optimizer
        scheduler = _make("model.lr_scheduler", self.scheduler_factory, optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ConfigError(
                "model.lr_scheduler: ReduceLROnPlateau acts after an epoch's checkpoint is written, so a run that was "
                "killed could not resume exactly; expected a schedule of steps or epochs, such as CosineAnnealingLR"
            )
        return [optimizer], [scheduler]

    def on_train_start(self) -> None:
        self.train_totals = self.train_totals.to(self.device)
        self._take_averages()

    def _take_averages(self) -> None:
        if self.averaging is not None and self.averages is None:
            assert self.network is not None, "build() comes before training"
            self.averages = Averages(self.network, self.averaging, self._loaded_averages)

    def validated_weights(self) -> AbstractContextManager[None]:
        """Inside, the network has the weights that are validated and kept as the best: the averages, if there are."""
        if self._loaded_averages is not None:  # of a training that had come to its end: none starts
            self._take_averages()
        return nullcontext() if self.averages is None else self.averages.in_place()

    def on_train_epoch_start(self) -> None:
        self.train_totals.zero_()

    def training_step(self, batch: Chunk | tuple[Tensor, Tensor], batch_index: int) -> None:
        """Make a step on each minibatch of a chunk, up to `trainer.max_steps`."""
        losses, answers, labels, steps = [], [], [], []
        n_left = len(batch) if isinstance(batch, Chunk) else 1
        for x, targets in self._minibatches(batch):
            steps.append(self.trainer.global_step)
            loss_sum, loss, logits = self._loss(x, targets)
            (loss_sum if self.accumulate == 1 else loss_sum / self.accumulate).backward()
            # Autocast keeps its copies of the weights until its context ends, which Lightning leaves after the chunk.
            torch.clear_autocast_cache()
            losses.append(loss)
            answers.append(logits.argmax(-1))
            labels.append(targets)
            self._step_if_due()
            n_left -= 1
            if self.has_stepped and self.is_leaving():
                break
        if self._has_all_steps():
            self.trainer.should_stop = True  # has Lightning validate the last weights, wherever a chunk ends
        self._note(torch.stack(losses), answers, labels, torch.tensor(steps))
        if n_left and self.is_leaving() and not self.trainer.should_stop:
            self.leave()  # here, where Lightning holds the chunk for begun and not for done

    def _minibatches(self, batch: Chunk | tuple[Tensor, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        device, convert = self.device, self.trainer.precision_plugin.convert_input
        for x, targets in batch if isinstance(batch, Chunk) else [batch]:
            yield convert(x.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
            if self._has_all_steps():
                return

    def _has_all_steps(self) -> bool:
        return 0 <= self.trainer.max_steps <= self.trainer.global_step

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of the branches' mean losses, to go backward from; beside it the losses (s,) and logits (s n k)."""
        logits = self.forward(x)
        if self.n_branches == 1:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing)
            return loss, loss.detach()[None], logits.detach()[None]
        repeated = targets.repeat(self.n_branches, *[1] * (targets.ndim - 1))
        losses = F.cross_entropy(logits.flatten(0, 1), repeated, reduction="none", label_smoothing=self.label_smoothing)
        of_branches = losses.detach().view(self.n_branches, -1).mean(1)
        return losses.sum() / len(targets), of_branches, logits.detach()

    def _step_if_due(self) -> None:
        self.has_stepped = self._is_due()
        if not self.has_stepped:
            return
        assert self.network is not None, "build() comes before training"
        if self.gradient_clip is not None:
            clip_gradients(list(self.network.parameters()), *self.gradient_clip, self.n_branches)
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if self.averages is not None:
            self.averages.update(self.trainer.global_step)
        # Lightning counts the steps that go through its wrapper of the optimiser, which takes longer than a small step.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        if self.lr_interval == "step":
            self._advance_schedule()

    def _is_due(self) -> bool:
        """Whether the gradients of `accumulate` minibatches, or of the last ones of an epoch, are there."""
        if self.accumulate == 1:
            return True
        loader: Any = self.trainer.train_dataloader
        n_batches = self.trainer.num_training_batches if loader.chunk is None else loader.n_batches
        return loader.position % self.accumulate == 0 or loader.position == n_batches

    def on_validation_model_zero_grad(self) -> None:
        """Keep the gradients that are being accumulated; others are gone already."""

    def _advance_schedule(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            try:
                config.scheduler.step()  # type: ignore[call-arg]
            except (ValueError, ZeroDivisionError) as error:
                name = type(config.scheduler).__name__
                raise ConfigError(
                    f"model.lr_scheduler: {name} came to its end in step {self.trainer.global_step}: {error}; expected "
                    f"init_args for the whole training, which has {self.lr_interval}s as its unit (model.lr_interval)"
                ) from error

    def _note(self, losses: Tensor, answers: list[Tensor], targets: list[Tensor], steps: Tensor) -> None:
        """Add up a chunk of m minibatches: losses (m s), answers (s n) to targets (n,) or (n k), after `steps` (m,)."""
        sizes = [len(of_batch) for of_batch in targets]
        # One after the other, so that the rounding does not depend on where chunks begin.
        for loss, n_images in zip(losses.float(), sizes, strict=True):
            self.train_totals[:, 0] += loss * n_images
        self.train_totals[:, 1] += (torch.cat(answers, 1) == _labels(torch.cat(targets))).sum(1)
        self.train_totals[:, 2] += sum(sizes)
        bad = ~losses.isfinite()
        if bad.any():
            first = steps.to(bad.device)[bad.int().argmax(0)]
            self.diverged_at = torch.where(bad.any(0) & (self.diverged_at < 0), first, self.diverged_at)
            self.stop_if_diverged()

    def train_scores(self) -> dict[str, Tensor]:
        """Mean loss and accuracy of each branch (s,) since the epoch began."""
        return _means("train", self.train_totals)

    @property
    def lr(self) -> float:
        return self.optimizers(use_pl_optimizer=False).param_groups[0]["lr"]  # type: ignore[union-attr]

    def on_train_epoch_end(self) -> None:
        if self.lr_interval == "epoch":
            self._advance_schedule()
        # For callbacks of the user's; the scores of each branch go to its own loggers.
        self.log_dict({name: values.mean() for name, values in self.train_scores().items()}, logger=False)

    def on_validation_start(self) -> None:
        self._validating.enter_context(self.validated_weights())

    def on_validation_end(self) -> None:
        """After that of the callbacks, which save the best weights."""
        self._validating.close()

    def on_validation_epoch_start(self) -> None:
        self.val_totals = torch.zeros(self.n_branches, 3, device=self.device)
        self._kept_logits: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        totals, logits = self._score("val", batch)
        self.val_totals += totals
        n_wanted = self.n_kept_logits - sum(kept.shape[1] for kept in self._kept_logits)
        if n_wanted > 0:
            self._kept_logits.append(logits[:, :n_wanted].clamp(-HALF_MAX, HALF_MAX).half())

    def kept_logits(self) -> Tensor:
        """Logits (s n k), float16, of the first images in the last validation."""
        return torch.cat(self._kept_logits, 1)

    def val_scores(self) -> dict[str, Tensor]:
        """Mean loss and accuracy of each branch (s,) in the last validation."""
        return _means("val", self.val_totals)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self._score("test", batch)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> tuple[Tensor, Tensor]:
        x, labels = batch
        return self(x), labels

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY] = self.identities
        checkpoint[TOTALS] = self.train_totals
        if self.averages is not None and not self.averages.are_in_place:  # where they are the state dict
            checkpoint[AVERAGES] = self.averages.values

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.train_totals = checkpoint[TOTALS]
        self._loaded_averages = checkpoint.get(AVERAGES)

    def is_alive(self, i: int) -> bool:
        """Whether the training loss of the i-th branch has been finite so far."""
        return int(self.diverged_at[i]) < 0

    def divergence(self, i: int) -> DivergedError:
        return DivergedError(
            f"the training loss is not finite at step {int(self.diverged_at[i])}; lower model.optimizer.init_args.lr, "
            "or set trainer.gradient_clip_val"
        )

    def stop_if_diverged(self) -> None:
        """Raises: DivergedError if no branch is left to train."""
        if not any(self.is_alive(i) for i in range(self.n_branches)):
            raise self.divergence(0)

    def _score(self, split: str, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss sum, correct answers and images of each branch (s 3), logits (s n k); logs means over the branches."""
        x, labels = batch
        logits = self(x).float().view(self.n_branches, len(labels), -1)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(self.n_branches), reduction="none")
        hits = (logits.argmax(-1) == labels).sum(-1)
        totals = torch.stack(
            [losses.view(self.n_branches, -1).sum(1), hits, hits.new_tensor(len(labels)).expand_as(hits)], 1
        )
        scores = {name: values.mean() for name, values in _means(split, totals).items()}
        # In training, the scores of each branch go to its own loggers.
        to_logger = self.trainer.state.fn != TrainerFn.FITTING
        self.log_dict(scores, on_epoch=True, on_step=False, batch_size=len(labels), prog_bar=True, logger=to_logger)
        return totals, logits


def _means(split: str, totals: Tensor) -> dict[str, Tensor]:
    loss_sum, n_correct, n_images = totals.T
    return {f"{split}/loss": loss_sum / n_images, f"{split}/acc": n_correct / n_images}


def _labels(targets: Tensor) -> Tensor:
    """Labels (n,), or of mixed targets (n k) the class with the largest share."""
    return targets if targets.ndim == 1 else targets.argmax(1)
