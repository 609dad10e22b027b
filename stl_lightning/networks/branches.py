"""The networks of the branches: one class, its options the same for all or others for some."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stl_lightning.errors import ConfigError
from stl_lightning.ranges import as_ranges

NetworkFactory = Callable[[tuple[int, int, int], int], nn.Module]


@dataclass(frozen=True)
class BranchNetworks:
    """Constructs the network of any branch. `options` are those of some branches, in place of what the factory has."""

    factory: NetworkFactory
    options: Mapping[int, dict[str, Any]]

    def construct(self, in_shape: tuple[int, int, int], n_classes: int, seed: int, branch: int) -> nn.Module:
        """The weights depend on (seed, branch) alone, not on what happened before.

        Raises: ConfigError if the class refuses its options or the shape, or is no such class.
        """
        options = self.options.get(branch, {})
        setting = f"model.network_of, branch {branch}" if options else "model.network"
        # On the CPU whatever the accelerator: another device would draw other numbers.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(branch_seed(seed, branch))
            try:
                return self.factory(in_shape, n_classes, **options)
            except ConfigError as error:
                if not options:
                    raise
                raise ConfigError(f"{setting}: {error}") from error
            except TypeError as error:
                given = {**getattr(self.factory, "keywords", {}), **options}  # by settings, the factory is a partial
                call = ", ".join([str(in_shape), str(n_classes), *(f"{key}={given[key]!r}" for key in given)])
                raise ConfigError(
                    f"{setting}: expected a class that is called as network(in_shape, n_classes), "
                    f"here network({call}); it answered: {error}"
                ) from error
            except (ValueError, RuntimeError, OSError) as error:
                raise ConfigError(f"{setting}: its constructor raised {type(error).__name__}: {error}") from error

    def designs(self, n_branches: int) -> list[int]:
        """One branch of each set of options.

        Raises: ConfigError if there are options for a branch that does not exist.
        """
        unknown = [branch for branch in self.options if branch >= n_branches]
        if unknown:
            raise ConfigError(f"model.network_of: expected branches 0 to {n_branches - 1}, got {as_ranges(unknown)}")
        return list({id(options): branch for branch, options in self.options.items()}.values())


def branch_seed(seed: int, branch: int) -> int:
    """The seed of everything random in one branch that other branches must not share: weights, dropout."""
    return (seed * 1_000_003 + branch * 7_919 + 1) % 2**31
