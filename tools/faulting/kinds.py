"""The kinds of faults. Imports nothing heavy: the functions are imported where faults are done."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Kind:
    """One row of `KINDS`.

    `whole`: it does harm to all branches; `to_supervisor`: so it does where they have one supervisor; `to_node`: to all
    on the node; `early`: also to a branch that has not begun yet, `late`: also to one that has finished.
    """

    act: str  # module of this package, and function in it
    where: tuple[str, ...]
    whole: bool = False
    to_supervisor: bool = False
    to_node: bool = False
    early: bool = False
    late: bool = False

    def function(self) -> Callable[..., Any]:
        module, name = self.act.split(".")
        return getattr(import_module(f"faulting.{module}"), name)


BOTH, LOCAL, SLURM = ("local", "slurm"), ("local",), ("slurm",)
KINDS = {
    "sigkill_rank": Kind("acts.kill_rank", BOTH, early=True),
    "sigterm_rank": Kind("acts.terminate_rank", BOTH, early=True),
    "sigusr1": Kind("acts.warn_rank", BOTH, to_supervisor=True, early=True),
    "sigkill_supervisor": Kind("acts.kill_supervisor", BOTH, to_supervisor=True, early=True),
    "sigterm_supervisor": Kind("acts.terminate_supervisor", BOTH, to_supervisor=True, early=True),
    "requeue": Kind("cluster_acts.requeue", SLURM),
    "slurmd_killed": Kind("cluster_acts.kill_slurmd", SLURM, to_node=True),
    "power_cut": Kind("cluster_acts.cut_power", SLURM, to_node=True),
    "link_cut": Kind("cluster_acts.cut_link", SLURM, to_node=True),
    "node_down": Kind("cluster_acts.set_node_down", SLURM, to_node=True),
    "disk_full": Kind("acts.fill_disk", LOCAL, whole=True),
    "truncated_checkpoint": Kind("acts.truncate", LOCAL, late=True),
    "rename_failure": Kind("acts.fail_renames", LOCAL),
    "two_launches": Kind("acts.launch_twice", BOTH),
    "clock_skew": Kind("acts.shift_clock", BOTH),
}
