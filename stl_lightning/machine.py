"""What this process may use of its machine, if not all: cores by affinity, memory by control groups.

Not seen are shares of the time of all cores (the quota of `docker --cpus`): torch does not see them either.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

# Files of a control group, version 1 and 2 (Linux, admin-guide/cgroup-v1/memory and admin-guide/cgroup-v2): its limit,
# what is used, and in memory.stat the cached files that give way when memory is asked for. All in bytes.
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def n_cores() -> int:
    """The cores this process may use: under SLURM, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that this process can take without swapping, or being killed by SLURM or a container for taking more.

    Infinite where the system does not say. proc, groups: where the kernel shows processes and control groups.
    """
    return min([_of_machine(proc), *_of_groups(proc, groups)])


def _of_machine(proc: Path) -> float:
    try:
        lines = (proc / "meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable"))
    return 1024 * int(available)


def _of_groups(proc: Path, groups: Path) -> Iterator[float]:
    """What is left of the limit of each control group this process is in, those that enclose another included."""
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            names, root = VERSION_1, groups / "memory"
        elif not controllers:
            names, root = VERSION_2, groups
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield _of_group(folder, *names)
            if folder == root:
                break


def _of_group(folder: Path, limit: str, used: str, cached: str) -> float:
    """Infinite for a group without a limit, and for one that a container does not see."""
    try:
        n_limit, n_used = (folder / limit).read_text().strip(), int((folder / used).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return math.inf
    return math.inf if n_limit == "max" else int(n_limit) - n_used + int(statistics.get(cached, 0))
