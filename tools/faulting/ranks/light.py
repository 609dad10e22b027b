"""Leave out what the digits do not need, and what Lightning imports all the same: half of a rank's start.

Stand-ins take the place of torchvision, of torch's compiler and of FSDP, which nothing calls here.
"""

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

LEFT_OUT = ("torchvision", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "scipy.signal", "scipy.stats")


class StandIn(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)

    @staticmethod
    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        """What torch calls of its compiler: nothing is compiled anyway."""
        return function or (lambda wrapped: wrapped)

    @staticmethod
    def is_compiling() -> bool:
        return False


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        is_left_out = any(name == left or name.startswith(f"{left}.") for left in LEFT_OUT)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_left_out else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> StandIn:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def install() -> None:
    sys.meta_path.insert(0, Finder())
