"""What is done to a run: a function a kind of fault that does the harm, and heals what has to be healed.

A function yields what to wait for, seconds or a condition, and returns what happened; None if it found nothing to harm.
Meanwhile the round goes on, with other faults. It raises `Wrong` where something came of the fault that never may.
"""

import json
import os
import random
import signal
import time
from collections.abc import Generator

from faulting import cluster_acts
from faulting.local import FitScene, LaunchScene, LocalScene
from faulting.scene import Scene
from faulting.waiting import UNTIL_S, Act, Until, Wrong, seconds
from stl_lightning.exits import FENCED, REFUSED
from stl_lightning.paths import BranchPaths

REFUSALS = ("at work already", "is in training by", "newer attempt", "was begun by")
RESTARTED_S = 300.0  # in which a branch is tried again, if its launcher was killed by when the others are through
WRITING_S = 1.5  # in which a rank begins to write a checkpoint


def kill_rank(scene: Scene, branch: int, rng: random.Random) -> Act:
    file = _writes(scene.branch(branch)) if scene.where == "local" and rng.random() < 0.5 else None
    return (yield from _signal_rank(scene, branch, signal.SIGKILL, f" while it wrote {file}" if file else ""))


def terminate_rank(scene: Scene, branch: int, rng: random.Random) -> Act:
    return (yield from _signal_rank(scene, branch, signal.SIGTERM))


def warn_rank(scene: Scene, branch: int, rng: random.Random) -> Act:
    """SLURM's warning before the time limit reaches the rank, and where the site sends it there its supervisor."""
    if rng.random() < 0.5:
        return (yield from _signal_rank(scene, branch, signal.SIGUSR1))
    return (yield from _signal_supervisor(scene, branch, signal.SIGUSR1))


def kill_supervisor(scene: Scene, branch: int, rng: random.Random) -> Act:
    return (yield from _signal_supervisor(scene, branch, signal.SIGKILL))


def terminate_supervisor(scene: Scene, branch: int, rng: random.Random) -> Act:
    return (yield from _signal_supervisor(scene, branch, signal.SIGTERM))


def _signal_rank(scene: Scene, branch: int, number: int, when: str = "") -> Act:
    rank = scene.rank(branch)
    if rank is None or not scene.signal_rank(branch, number):
        return None
    yield scene.end_of(rank)
    return f"{signal.Signals(number).name} to the rank{when}"


def _signal_supervisor(scene: Scene, branch: int, number: int) -> Act:
    """The workers of a launcher that is killed train on; a supervisor's only child leaves with it."""
    rank = scene.rank(branch)
    if not scene.signal_supervisor(branch, number):
        return None
    name = signal.Signals(number).name
    if isinstance(scene, LaunchScene) and number == signal.SIGKILL:
        return f"{name} to the launcher, whose workers train on"
    if rank is not None:
        yield scene.end_of(rank)
    return f"{name} to the {'launcher' if isinstance(scene, LaunchScene) else 'supervisor'}"


def _writes(paths: BranchPaths) -> str | None:
    """Wait for the moment at which a checkpoint is being written; its name."""
    deadline = time.monotonic() + WRITING_S
    while time.monotonic() < deadline:
        for desk in paths.attempts.iterdir() if paths.attempts.exists() else ():
            for name in os.listdir(desk) if not desk.suffix else ():
                if ".ckpt." in name:
                    return name.strip(".").rpartition(".")[0]
    return None


def fill_disk(scene: Scene, branch: int, rng: random.Random) -> Act:
    filler = scene.folder / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except OSError:
        pass
    held_s = rng.uniform(0.5, 8)
    yield seconds(held_s)
    filler.unlink()
    return f"the disk was full for {held_s:.1f} s"


def truncate(scene: Scene, branch: int, rng: random.Random) -> Act:
    """Cut a checkpoint. The message of who finds it out is followed, here or, of `best.ckpt`, when the run is over."""
    paths, rank = scene.branch(branch), scene.rank(branch)
    file = paths.best if scene.is_finished(branch) or rng.random() < 0.5 else paths.last
    if not file.exists() or (rank is None and not scene.is_finished(branch)):
        return None
    if rank is not None:
        scene.signal_rank(branch, signal.SIGSTOP)  # so that it does not write the file again
    size = file.stat().st_size
    length = rng.randrange(size)
    os.truncate(file, length)
    what = f"{file.name} was cut from {size} to {length} bytes"
    scene.damaged.add(file)
    if rank is not None:
        scene.signal_rank(branch, signal.SIGKILL)
        yield scene.end_of(rank)
    if file == paths.best:
        return what
    step = scene.progress(branch).step
    is_told = lambda: "Delete it" in (scene.status(branch).error or "")  # noqa: E731
    yield Until(lambda: is_told() or scene.progress(branch).step > step, RESTARTED_S)
    error = scene.status(branch).error or ""
    if str(file) not in error:
        raise Wrong(f"{what}, and the branch went on: {error or 'no error'}")
    file.unlink()  # as the message says
    scene.damaged.discard(file)
    return f"{what}; `{error}` was followed"


def fail_renames(scene: Scene, branch: int, rng: random.Random) -> Act:
    before, after, held_s = rng.uniform(0.05, 0.6), rng.uniform(0.05, 0.4), rng.uniform(1, 6)
    said = {"where": f"branches/{branch:02d}/", "before": before, "after": after}
    file = scene.faults / "rename.json"
    if file.exists():
        return None
    file.write_text(json.dumps(said))
    yield seconds(held_s)
    file.unlink()
    return f"for {held_s:.1f} s renames failed, {before:.0%} before and {after:.0%} after they were done"


def launch_twice(scene: Scene, branch: int, rng: random.Random) -> Act:
    if not isinstance(scene, LocalScene):
        return (yield from cluster_acts.launch_twice(scene, branch, rng))
    if isinstance(scene, FitScene) and rng.random() < 0.5:
        return (yield from _race(scene, branch))
    is_launch = isinstance(scene, LaunchScene)
    second = scene.begin(*(scene.launch_args() if isinstance(scene, LaunchScene) else scene.fit_args(branch)))
    yield Until(second.is_over, 120)
    code = second.process.returncode
    is_refused = any(words in second.text() for words in REFUSALS)
    if not is_refused and scene.supervisor_lives(branch) and not scene.is_finished(branch):
        raise Wrong(f"a second launch was not refused (exit code {code}): {second.text()[-300:]}")
    return f"a second {'launch' if is_launch else '`stl fit`'} ended with exit code {code}"


def _race(scene: FitScene, branch: int) -> Act:
    """Two that begin a branch in the same moment: one trains it, the other leaves."""
    rank = scene.rank(branch)
    if rank is None:
        return None
    scene.signal_supervisor(branch, signal.SIGKILL)
    scene.signal_rank(branch, signal.SIGKILL)
    yield scene.end_of(rank)
    both = [scene.begin(*scene.fit_args(branch)) for _ in range(2)]
    scene.fits[branch] = both[0]
    yield Until(lambda: any(one.is_over() for one in both))
    loser = both[0] if both[0].is_over() else both[1]
    scene.fits[branch] = both[0] if loser is both[1] else both[1]
    code = loser.process.returncode
    if code not in (REFUSED, FENCED) and not scene.is_finished(branch):
        raise Wrong(f"of two that began at once, one ended with exit code {code}: {loser.text()[-300:]}")
    return f"of two that began at once, one ended with exit code {code}"


def shift_clock(scene: Scene, branch: int, rng: random.Random) -> Act:
    """`stl status` must call a rank running that lives, and not call it so long after it died, whatever its clock."""
    hours = rng.choice((-1, 1)) * rng.uniform(1, 48)
    file = scene.faults / "clock.json"
    if file.exists():
        return None
    file.write_text(json.dumps({scene.host_of(branch): hours * 3600}))
    try:
        yield Until(lambda: abs(scene.status(branch).heartbeat - time.time()) > 1800 or scene.is_finished(branch), 30)
        yield from _judged(scene, branch, "running", 20)
        happened = f"the clocks of the ranks were {hours:+.1f} h off; status: running"
        if rng.random() < 0.5 and (rank := scene.rank(branch)) is not None and not isinstance(scene, LaunchScene):
            scene.signal_supervisor(branch, signal.SIGKILL)
            scene.signal_rank(branch, signal.SIGKILL)
            yield scene.end_of(rank)
            scene.held.add(branch)
            try:
                yield from _judged(scene, branch, "lost", 60)
            finally:
                scene.held.discard(branch)
            happened += ", and lost after SIGKILL"
    finally:
        file.unlink()
    return happened


def _judged(scene: Scene, branch: int, wanted: str, within_s: float) -> Generator[Until, None, None]:
    """Raises: Wrong if `stl status` does not come to call the branch `wanted`, and nobody else has taken it."""
    deadline, attempt = time.monotonic() + within_s, scene.attempt(branch)
    said = ""
    while time.monotonic() < deadline:
        said, age_s = scene.judged(branch)
        is_young = age_s is not None and age_s < UNTIL_S
        if said == "finished" or scene.attempt(branch) > attempt or (said == wanted and is_young):
            return
        yield seconds(1)
    raise Wrong(f"`stl status` called branch {branch} {said}, expected {wanted}")
