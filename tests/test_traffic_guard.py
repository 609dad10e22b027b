"""Nobody gets a process group while a branch trains."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from test_traffic import lonely
from torch.distributed import HashStore, init_process_group, new_group
from torch.distributed.device_mesh import init_device_mesh

from stl_lightning.errors import CommunicationError
from stl_lightning.traffic import forbid_process_groups
from stl_lightning.traffic.guard import INNER, PUBLIC

__all__ = ["lonely"]

WAYS: dict[str, Callable[[Path], object]] = {
    "public name": lambda folder: torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1),
    "imported before": lambda folder: init_process_group("gloo", store=HashStore(), rank=0, world_size=1),
    "imported before, by the environment": lambda folder: init_process_group("gloo"),
    "imported before, by a file": lambda folder: init_process_group("gloo", f"file://{folder}/x", rank=0, world_size=1),
    "fake": lambda folder: init_process_group("fake", rank=0, world_size=2),
    "device mesh": lambda folder: init_device_mesh("cpu", (1,)),
}


@pytest.mark.usefixtures("lonely")
@pytest.mark.parametrize("way", WAYS)
def test_a_process_group_is_refused_and_made_again_later(way: str, tmp_path: Path) -> None:
    with forbid_process_groups():
        with forbid_process_groups():
            pass
        with pytest.raises(CommunicationError, match="branches never communicate"):
            WAYS[way](tmp_path)
        assert not torch.distributed.is_initialized()
    WAYS[way](tmp_path)
    assert torch.distributed.is_initialized()


@pytest.mark.usefixtures("lonely")
def test_a_further_group_is_refused() -> None:
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    for function in (new_group, torch.distributed.new_group):
        with forbid_process_groups(), pytest.raises(CommunicationError, match=r"new_group(_with_tag)? was called"):
            function([0])
        assert function([0]) is not None


def test_nobody_is_called_before_the_refusal() -> None:
    with forbid_process_groups(), pytest.raises(CommunicationError):
        init_process_group("gloo", "tcp://127.0.0.1:1", rank=1, world_size=2, timeout=timedelta(seconds=2))


def test_an_error_inside_restores_too() -> None:
    before = [getattr(torch.distributed, name) for name in PUBLIC]
    with pytest.raises(KeyError), forbid_process_groups():
        raise KeyError
    assert [getattr(torch.distributed, name) for name in PUBLIC] == before


def test_torch_still_has_the_names_that_are_guarded() -> None:
    assert all(hasattr(torch.distributed.distributed_c10d, name) for name in (*PUBLIC, *INNER))


def test_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    before = torch.distributed.init_process_group
    with forbid_process_groups():
        assert torch.distributed.init_process_group is before
