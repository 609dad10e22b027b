"""Where and with what a measurement was made."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("stl-lightning", "torch", "lightning", "numpy", "torchensemble", "torch-uncertainty")


def machine() -> dict[str, Any]:
    """The hardware, and how busy it was; memory in bytes."""
    return {
        "cpu": _first(r"model name\s*: (.*)", "/proc/cpuinfo") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": _gpu(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg(),
    }


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first(pattern: str, file: str) -> str | None:
    found = re.search(pattern, Path(file).read_text()) if Path(file).exists() else None
    return found[1] if found else None


def _gpu() -> str | None:
    # Not by torch: a process that has touched CUDA cannot fork others that use it.
    try:
        listed = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True)
    except FileNotFoundError:
        return None
    return listed.stdout.decode().strip().replace("\n", ", ") or None
