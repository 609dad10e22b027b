"""The communication-free strategy: Lightning on one device, deaf to every launcher, guarded against collectives."""

from typing import Any

import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning_utilities.core.rank_zero import rank_zero_only

from stl_lightning.errors import CommunicationError, ConfigError


class AloneEnvironment(ClusterEnvironment):
    """A cluster of one process, whatever torchrun or SLURM put into the environment."""

    @property
    def creates_processes_externally(self) -> bool:
        return True

    @property
    def main_address(self) -> str:
        raise CommunicationError("a rank asked for the address of another rank; branches never talk to each other")

    @property
    def main_port(self) -> int:
        raise CommunicationError("a rank asked for the port of another rank; branches never talk to each other")

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return 1

    def set_world_size(self, size: int) -> None:
        """Nothing to set: the world is this process."""

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set: the world is this process."""

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0


class IndependentStrategy(SingleDeviceStrategy):
    """Trains one branch on one device and fails if a process group ever exists.

    `local_rank` picks the device, modulo the number that are visible: with `--gpus-per-task` each task sees one.

    Raises: ConfigError if the accelerator is unknown or absent; CommunicationError before, during (looked at before
    every batch) or after training if `torch.distributed` was initialised.
    """

    def __init__(self, accelerator: str = "auto", local_rank: int = 0) -> None:
        # Lightning silences loggers on ranks above 0, which it reads from the launcher's variables when imported.
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
        super().__init__(device=pick_device(accelerator, local_rank))

    def setup_environment(self) -> None:
        super().setup_environment()
        assert_no_process_group("before training")

    def on_train_start(self) -> None:
        super().on_train_start()
        assert_no_process_group("when training started")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        assert_no_process_group("in the middle of training")

    def on_train_end(self) -> None:
        super().on_train_end()
        assert_no_process_group("when training ended")


def alone(accelerator: str, local_rank: int) -> dict[str, Any]:
    """The arguments that make a `Trainer` train one branch alone: strategy, environment, device."""
    strategy = IndependentStrategy(accelerator, local_rank)
    return {
        "strategy": strategy,
        "accelerator": strategy.root_device.type,
        "devices": 1,
        "num_nodes": 1,
        "plugins": [AloneEnvironment()],
        "use_distributed_sampler": False,
    }


def pick_device(accelerator: str, local_rank: int) -> torch.device:
    """The device of this rank: `auto` takes CUDA, then MPS, then the CPU."""
    if accelerator in ("auto", "gpu"):
        names = [name for name in ("cuda", "mps") if AcceleratorRegistry.get(name).is_available()]
        accelerator = names[0] if names else "cpu" if accelerator == "auto" else accelerator
    if accelerator == "cpu":
        return torch.device("cpu")
    if accelerator not in ("cuda", "mps") or not AcceleratorRegistry.get(accelerator).is_available():
        raise ConfigError(
            f"trainer.accelerator: expected auto, cpu, or an accelerator of this machine (cuda, mps, gpu), "
            f"got {accelerator!r}, which is not available here"
        )
    count = torch.cuda.device_count() if accelerator == "cuda" else 1
    return torch.device(accelerator, local_rank % count)


def assert_no_process_group(when: str) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise CommunicationError(
            f"a torch.distributed process group exists {when}; branches never communicate. Remove the code that calls "
            "init_process_group (a callback, logger or network of yours?)"
        )
