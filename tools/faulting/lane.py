"""Rounds one after the other, on SLURM or on this machine. A process of its own, since it forks the ranks.

python -m faulting.lane PLAN.json    # prints a line of JSON a round
"""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faulting.check import Outcome
from faulting.local import FitScene, LaunchScene
from faulting.processes import adopt_orphans, end_with_parent
from faulting.rounds import Round
from faulting.scene import N_BRANCHES, Scene, remove
from faulting.slurm import SlurmScene
from stl_lightning.paths import RunPaths

ROUND_S = 600.0  # after which a run that is not complete counts as not recovered
SLOW_STEP_S = {"local": 0.08, "slurm": 0.4}
DISK_BYTES = 24 << 20


def main(plan: dict[str, Any]) -> None:
    """Do the kinds of faults that a plan lists, some a round, until all are done or its time is over."""
    end_with_parent()
    if plan["where"] == "local":
        adopt_orphans()  # not those of a cluster: a node cannot end before who adopts its processes buries them
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    import stl_lightning.cli.train  # noqa: F401  (what the forked ranks need)

    paths = RunPaths(Path(plan["reference"]))
    expected = [Outcome.of(paths.branch(branch), branch) for branch in range(N_BRANCHES)]
    rng = random.Random(f"{plan['seed']} {plan['name']}")
    waiting, deadline = list(plan["kinds"]), time.monotonic() + plan["limit_s"]
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(_cluster()) if plan["where"] == "slurm" else None
        for number in range(10 * len(waiting)):
            if not waiting or time.monotonic() > deadline:
                break
            kinds, waiting = waiting[: plan["per_round"]], waiting[plan["per_round"] :]
            undone = one_round(plan, number, kinds, expected, rng, cluster)
            waiting = [*undone, *waiting]


def one_round(
    plan: dict[str, Any], number: int, kinds: list[str], expected: list[Outcome], rng: random.Random, cluster: Any
) -> list[str]:
    """Print what came of a round; returns the kinds for which it found no time."""
    folder = Path(plan["folder"]) / f"{plan['name']}-{number:03d}"
    began = time.monotonic()
    with small_disk(folder) if "disk_full" in kinds else contextlib.nullcontext():
        scene = _scene(plan, folder, rng, cluster, "clock_skew" in kinds)
        try:
            course = Round(scene, kinds, expected, rng)
            rows = course.run(ROUND_S)
        finally:
            scene.close()
        if plan["keep"] and not all(row["recovered"] for row in rows):
            shutil.copytree(folder, Path(plan["keep"]) / folder.name, dirs_exist_ok=True)
    remove(folder)
    record = {
        "where": plan["where"],
        "by": type(scene).__name__.removesuffix("Scene").lower(),
        "host": getattr(scene, "host", None),
        "wall_s": round(time.monotonic() - began, 1),
        "resubmitted": scene.n_resubmitted,
        "released": getattr(scene, "n_released", 0),
        "lost_branches": len(course.lost),
        "wrong_results": len(course.wrong),
        "notes": course.notes,
    }
    print(json.dumps({"round": record, "rows": rows}), flush=True)
    return course.undone


def _scene(plan: dict[str, Any], folder: Path, rng: random.Random, cluster: Any, has_skew: bool) -> Scene:
    settings = [f"--model.network.init_args.step_s={SLOW_STEP_S[plan['where']]}", *plan["settings"]]
    if plan["where"] == "slurm":
        return SlurmScene(folder, rng, settings, cluster)
    if rng.random() < 0.5:
        return LaunchScene(folder, rng, settings)
    # With wrong clocks, half of the ranks are on another host for who asks how they are: only their heart tells.
    return FitScene(folder, rng, settings, "elsewhere" if has_skew and rng.random() < 0.5 else None)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of a few MB in the folder. Nobody else sees it: the process has a mount namespace of its own."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def _cluster() -> Any:
    sys.path.append(str(Path(__file__).resolve().parent.parent.parent / "tests"))
    from cluster import Cluster

    return Cluster("namespaces")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
