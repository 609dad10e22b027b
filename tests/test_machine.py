"""Memory and cores that a process is granted, of control groups as the kernel writes them, and of a real one."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stl_lightning.machine import free_memory, n_cores

MB = 1024 * 1024
# Files of the limit, of what is used, and which of memory.stat are cached files; of a group without a limit.
V1, V2 = (
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ("memory.max", "memory.current", "inactive_file"),
)
UNLIMITED = {V1: 0x7FFFFFFFFFFFF000, V2: "max"}


def write_group(folder: Path, names: tuple[str, str, str], limit: object, used: int, cached: int | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 17\n" + ("" if cached is None else f"{names[2]} {cached}\n"))


def write_proc(folder: Path, available: int, group: str) -> Path:
    (folder / "self").mkdir(parents=True)
    (folder / "meminfo").write_text(f"MemTotal: 9000000 kB\nMemAvailable: {available // 1024} kB\n")
    (folder / "self/cgroup").write_text(group)
    return folder


@pytest.mark.parametrize(
    ("names", "line", "root"),
    [
        (V1, "5:cpu,cpuacct:/\n4:memory:/slurm/job_7/step_0\n0::/elsewhere\n", "memory"),
        (V2, "0::/slurm/job_7/step_0\n", ""),
    ],
    ids=["v1", "v2"],
)
def test_the_tightest_group_around_a_process_counts(
    names: tuple[str, str, str], line: str, root: str, tmp_path: Path
) -> None:
    proc, groups = write_proc(tmp_path / "proc", 8000 * MB, line), tmp_path / "cgroup"
    root_group, job, step = (groups / root / part for part in ("", "slurm/job_7", "slurm/job_7/step_0"))
    assert free_memory(proc, groups) == 8000 * MB  # a container that sees none of its groups
    write_group(step, names, UNLIMITED[names], 900 * MB, 0)
    assert free_memory(proc, groups) == 8000 * MB
    write_group(job, names, 1000 * MB, 900 * MB, 300 * MB)
    assert free_memory(proc, groups) == 400 * MB
    write_group(step, names, 700 * MB, 650 * MB, 10 * MB)
    assert free_memory(proc, groups) == 60 * MB
    write_group(root_group, names, 300 * MB, 295 * MB, None)
    assert free_memory(proc, groups) == 5 * MB


def test_memory_is_unbounded_where_the_system_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) == float("inf")


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group of 300 MB, made inside the one of this process."""
    lines = Path("/proc/self/cgroup").read_text().splitlines() if Path("/proc/self/cgroup").exists() else []
    own = {line.split(":")[1]: line.split(":")[2].lstrip("/") for line in lines}
    root, names = (Path("/sys/fs/cgroup/memory"), V1) if "memory" in own else (Path("/sys/fs/cgroup"), V2)
    group = root / own.get("memory", own.get("", "")) / f"stl-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / names[0]).write_text(str(300 * MB))
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    group.rmdir()


def test_a_process_sees_the_limit_of_its_own_group(limited: Path) -> None:
    code = (
        "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "from stl_lightning.machine import free_memory; print(free_memory())"
    )
    command = [sys.executable, "-c", code, str(limited / "cgroup.procs")]
    seen = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 200 * MB < seen <= 300 * MB
    assert free_memory() != seen


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_cores_are_those_this_process_may_use() -> None:
    code = (
        "import os; from stl_lightning.machine import n_cores\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(n_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert n_cores() >= 1
