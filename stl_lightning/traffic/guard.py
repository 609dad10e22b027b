"""The guard against process groups: whoever asks torch for one while a branch trains gets an error at that call."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from stl_lightning.errors import CommunicationError

# What is called by users, and what the functions themselves look up in their module: the inner names also stop a
# function that was imported before the guard. All of them come before the first byte is sent.
PUBLIC = ("init_process_group", "new_group", "split_group")
INNER = ("rendezvous", "_new_process_group_helper", "_new_group_with_tag")


@contextmanager
def forbid_process_groups() -> Iterator[None]:
    """While active, `torch.distributed` makes no process group; may be nested.

    Raises: CommunicationError from every call that would make one.
    """
    replaced = [(module, name, getattr(module, name)) for module in _modules() for name in _names(module)]
    for module, name, _ in replaced:
        setattr(module, name, _refusal(name))
    try:
        yield
    finally:
        for module, name, function in replaced:
            setattr(module, name, function)


def _modules() -> list[ModuleType]:
    import torch.distributed

    if not torch.distributed.is_available():
        return []
    from torch.distributed import distributed_c10d

    return [torch.distributed, distributed_c10d]


def _names(module: ModuleType) -> list[str]:
    return [name for name in (*PUBLIC, *INNER) if hasattr(module, name)]


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> None:
        raise CommunicationError(
            f"torch.distributed.{name} was called while a branch trains; branches never communicate. Remove the code "
            "that calls init_process_group or new_group (a callback, logger or network of yours?)"
        )

    return refuse
