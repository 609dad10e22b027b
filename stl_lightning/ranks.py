"""Which process this is and which branches it owns. The only reader of a launcher's variables."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stl_lightning.errors import ConfigError

Launcher = Literal["none", "torchrun", "srun", "slurm-array"]


@dataclass(frozen=True)
class RankInfo:
    """One process among those that a launcher started.

    `world_size` is None for a task of a SLURM array: the task's number is its branch, so an array can be sparse
    (`--array=3,7`), and its number of tasks says nothing about the number of branches.
    """

    launcher: Launcher = "none"
    rank: int = 0
    world_size: int | None = 1
    local_rank: int = 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> "RankInfo":
        """Read the launcher's variables. torchrun wins over srun (agents run inside steps), srun over an array.

        Raises: ConfigError if a variable is not a number.
        """
        env = os.environ if environ is None else environ
        if "TORCHELASTIC_RUN_ID" in env:
            return cls("torchrun", *(_integer(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        # A batch script has SLURM_PROCID and SLURM_NTASKS too; only a step has a step id.
        if "SLURM_STEP_ID" in env and _integer(env, "SLURM_NTASKS") > 1:
            return cls("srun", *(_integer(env, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")))
        if "SLURM_ARRAY_TASK_ID" in env:
            return cls("slurm-array", _integer(env, "SLURM_ARRAY_TASK_ID"), None)
        return cls()

    def branches(self, n_branches: int) -> tuple[int, ...]:
        """The branches this process owns: rank, rank + world size, ... below `n_branches`.

        Raises: ConfigError if this rank would own none.
        """
        step = n_branches if self.world_size is None else self.world_size
        if step > n_branches or self.rank >= n_branches:
            raise ConfigError(
                f"{self._what()}, but `data.block` and `data.transform` make {n_branches} branches. "
                f"Start at most {n_branches} ranks, or choose a larger `data.block`"
            )
        return tuple(range(self.rank, n_branches, step))

    def share(self, branches: Sequence[int]) -> tuple[int, ...]:
        """Of branches that were asked for by number, those of this process: as `branches`, among so many ranks or more.

        Of fewer than there are ranks, and in the task of an array, all: each was asked for its own, then.
        """
        is_divided = self.world_size is not None and len(branches) >= self.world_size
        return tuple(branches[self.rank :: self.world_size] if is_divided else branches)

    def _what(self) -> str:
        if self.world_size is None:
            return f"this is SLURM array task {self.rank}, and --array numbers the branches from 0"
        return f"{self.world_size} ranks were started ({self.launcher})"


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except (KeyError, ValueError):
        raise ConfigError(f"expected a number in the launcher's variable {name}, got {env.get(name)!r}") from None


def job_id(environ: Mapping[str, str] | None = None) -> str | None:
    """What the scheduler calls the job of this process: 17, or 17_3 for an array task; None without a scheduler.

    `stl launch --local` is a scheduler too, and names its jobs in STL_JOB.
    """
    env = os.environ if environ is None else environ
    if "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID") or env.get("STL_JOB")


def was_requeued(environ: Mapping[str, str] | None = None) -> bool:
    """Whether the scheduler has started this job before, and given that start up."""
    env = os.environ if environ is None else environ
    return _integer(env, "SLURM_RESTART_COUNT") > 0 if "SLURM_RESTART_COUNT" in env else False
