"""A fixed part of a core for a process and its children, by the kernel's CPU controller (cgroups v1 or v2)."""

import time
from contextlib import suppress
from pathlib import Path

# Short, so that a worker is as slow as on a slow core at any moment and does not hurry after it waited for the network.
PERIOD_US = 4000
LEAST_QUOTA_US = 1000  # the kernel's limit
ROOT = Path("/sys/fs/cgroup")


class Share:
    """A control group of this name: what is in it goes before other work and, from `limit` on, has a part of a core.
    So it is as slow at one time as at another, whatever else the machine does.

    Raises: OSError where the controller is not there or may not be used.
    """

    def __init__(self, name: str) -> None:
        self.is_v2 = (ROOT / "cgroup.controllers").exists()
        self.folder = (ROOT if self.is_v2 else ROOT / "cpu") / name
        self.folder.mkdir()
        try:
            self._write("cpu.weight" if self.is_v2 else "cpu.shares", 10_000)
        except OSError:
            self.remove()
            raise

    def join(self, pid: int) -> None:
        self._write("cgroup.procs", pid)

    def limit(self, cores: float) -> None:
        period_us = max(PERIOD_US, round(LEAST_QUOTA_US / cores))
        quota_us = round(cores * period_us)
        if self.is_v2:
            self._write("cpu.max", f"{quota_us} {period_us}")
        else:
            self._write("cpu.cfs_period_us", period_us)
            self._write("cpu.cfs_quota_us", quota_us)

    def remove(self) -> None:
        """Once its processes have been killed; the kernel needs a moment until they are gone."""
        for _ in range(100):
            with suppress(OSError):
                self.folder.rmdir()
            if not self.folder.exists():
                return
            time.sleep(0.05)

    def _write(self, file: str, value: object) -> None:
        (self.folder / file).write_text(str(value))
