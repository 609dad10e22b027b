"""The strategy: one device, deaf to launchers, and a guard that really fails."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning_utilities.core.rank_zero import rank_zero_only

from stl_lightning.errors import CommunicationError, ConfigError
from stl_lightning.strategy import AloneEnvironment, IndependentStrategy, alone, pick_device

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
LAUNCHERS = {
    "torchrun": {"TORCHELASTIC_RUN_ID": "x", "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "GROUP_RANK": "0"},
    "srun": {
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "2",
        "SLURM_JOB_NAME": "x",
        "SLURM_STEP_ID": "0",
    },
}


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")  # any free port
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_trainer_is_alone_under_every_launcher(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(max_steps=2, **QUIET, **alone("cpu", local_rank=2))
    trainer.fit(BoringModel())
    assert trainer.global_step == 2
    assert (trainer.world_size, trainer.global_rank, trainer.is_global_zero) == (1, 0, True)
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures("process_group")
def test_a_process_group_stops_the_training() -> None:
    with pytest.raises(CommunicationError, match="before training"):
        Trainer(max_steps=2, **QUIET, **alone("cpu", 0)).fit(BoringModel())


def test_a_process_group_that_appears_in_training_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Talker(BoringModel):
        def on_train_batch_end(self, *_: Any) -> None:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    with pytest.raises(CommunicationError, match="in the middle of training"):
        Trainer(max_steps=3, **QUIET, **alone("cpu", 0)).fit(Talker())
    monkeypatch.undo()
    strategy = IndependentStrategy("cpu")
    strategy.on_train_end()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for hook in (strategy.on_train_start, strategy.on_train_end):
        with pytest.raises(CommunicationError, match="process group"):
            hook()


def test_loggers_of_every_rank_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning silences ranks above 0, which it reads from the launcher's variables when it is imported."""
    monkeypatch.setattr(rank_zero_only, "rank", 2)
    IndependentStrategy("cpu", local_rank=2)
    assert rank_zero_only.rank == 0


def test_the_environment_knows_nobody_else() -> None:
    environment = AloneEnvironment()
    assert (environment.world_size(), environment.global_rank(), environment.node_rank()) == (1, 0, 0)
    for name in ("main_address", "main_port"):
        with pytest.raises(CommunicationError):
            getattr(environment, name)


def test_device_by_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device("auto", rank)) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert str(pick_device("cpu", 3)) == "cpu"


def test_an_absent_accelerator_is_named() -> None:
    with pytest.raises(ConfigError, match=r"trainer\.accelerator.*'tpu'"):
        pick_device("tpu", 0)
