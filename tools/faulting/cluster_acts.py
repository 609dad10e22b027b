"""The faults of a cluster: of its nodes, their daemons and cables, and of what one asks SLURM."""

import random
from typing import Any

from faulting.scene import CONFIG
from faulting.waiting import Act, Until, Wrong, seconds

REQUEUED_S = 180.0  # in which a task begins again; on a busy machine its imports alone take a minute
CLEAN_S = 30.0  # in which SLURM ends what a lost node still runs, once it has it back
NOTICED_S = 60.0  # in which a rank that was replaced leaves; on a busy machine the end of its interpreter takes longest


def requeue(scene: Any, branch: int, rng: random.Random) -> Act:
    rank, job = scene.rank(branch), scene.status(branch).job
    if rank is None or scene.cluster.run("scontrol", "requeue", job, check=False).returncode:
        return None
    yield scene.end_of(rank)
    return f"scontrol requeue {job}"


def kill_slurmd(scene: Any, branch: int, rng: random.Random) -> Act:
    """Its tasks go on. Where SLURM takes the node for down meanwhile, they are requeued all the same."""
    node = scene.take_node(branch)
    if node is None:
        return None
    old = scene.ranks_on(node)
    scene.cluster.kill_slurmd(node)
    is_noticed = rng.random() < 0.5
    yield seconds(rng.uniform(0.5, 3))
    happened = f"slurmd of {node} was killed"
    if is_noticed:
        scene.cluster.set_down(node)
        n_fenced = yield from _stale_ranks_leave(scene, old)
        happened += f" and {node} set down; of its branches {sorted(old)}, {n_fenced} ranks found themselves replaced"
    yield seconds(rng.uniform(0.5, 3))
    scene.cluster.start_slurmd(node)
    if is_noticed:
        yield from _clean(scene, node)
        scene.resume(node)
    scene.nodes_in_use.discard(node)
    return happened


def cut_power(scene: Any, branch: int, rng: random.Random) -> Act:
    node = scene.take_node(branch)
    if node is None:
        return None
    hit = sorted(scene.ranks_on(node))
    scene.cluster.power_off(node)
    off_s = rng.uniform(0.5, 6)
    if rng.random() < 0.5:
        scene.cluster.set_down(node)
    yield seconds(off_s)
    scene.cluster.power_on(node)
    scene.nodes_in_use.discard(node)
    return f"{node} with branches {hit} had no power for {off_s:.1f} s"


def cut_link(scene: Any, branch: int, rng: random.Random) -> Act:
    """The ranks on the node go on, while SLURM starts their tasks elsewhere; the link comes back after that."""
    node = scene.take_node(branch)
    if node is None:
        return None
    old = scene.ranks_on(node)
    scene.cluster.cut_link(node)
    yield seconds(rng.uniform(0.5, 2))
    if rng.random() < 0.75:
        scene.cluster.set_down(node)  # what the controller does by itself after half a minute
    n_fenced = yield from _stale_ranks_leave(scene, old)
    scene.cluster.heal_link(node)
    yield from _clean(scene, node)
    scene.resume(node)
    scene.nodes_in_use.discard(node)
    return f"the link of {node} was cut; of its branches {sorted(old)}, {n_fenced} ranks found themselves replaced"


def set_node_down(scene: Any, branch: int, rng: random.Random) -> Act:
    node = scene.take_node(branch)
    if node is None:
        return None
    old = scene.ranks_on(node)
    scene.cluster.set_down(node)
    for rank, _ in old.values():
        yield scene.end_of(rank)
    yield seconds(rng.uniform(0.5, 5))
    scene.resume(node)
    scene.nodes_in_use.discard(node)
    return f"{node} with branches {sorted(old)} was set down"


def _stale_ranks_leave(scene: Any, old: dict[int, Any]) -> Any:
    """Wait until the tasks run elsewhere, then that the ranks which they replaced leave; how many said that they did.

    Raises: Wrong if one stays although a newer attempt owns its branch.
    """
    n_before = scene.n_fenced()
    for branch, (rank, attempt) in old.items():
        yield _replaced(scene, branch, attempt)
        yield scene.end_of(rank, NOTICED_S, every_s=0.5)
        if scene.attempt(branch) > attempt and scene.lives(rank):
            raise Wrong(f"the rank of branch {branch} on {rank.host} goes on although attempt {attempt} was replaced")
    return scene.n_fenced() - n_before


def _clean(scene: Any, node: str) -> Any:
    """Wait until nothing of the old jobs is left on a node, as an administrator does before it is put into service.

    SLURM drains a node on which it wants to start a requeued task whose first start still ends there, and holds the
    task.
    """
    yield Until(lambda: not scene.steps_on(node), CLEAN_S, every_s=1)
    if steps := scene.steps_on(node):
        scene.cluster.run("kill", "-KILL", *steps, node=node, check=False)


def _replaced(scene: Any, branch: int, attempt: int) -> Until:
    return Until(lambda: scene.attempt(branch) > attempt or scene.is_finished(branch), REQUEUED_S)


def launch_twice(scene: Any, branch: int, rng: random.Random) -> Act:
    """A second array trains the same branch: its task has to leave, or to take the branch over entirely."""
    rank = scene.rank(branch)
    if rank is None:
        return None
    log = scene.folder / f"second-{branch}-{scene.attempt(branch)}.out"
    options = [*scene.options, f"--array={branch}", f"--output={log}", "--chdir", scene.checkout]
    job = scene.cluster.submit(*options, "slurm/array.sbatch", CONFIG, *scene.settings, env=scene.ours())
    yield Until(lambda: scene.is_over(job), 120, 1.5)
    text = log.read_text(errors="replace") if log.exists() else ""
    refusals = ("is in training by", "newer attempt", "was begun by", "finished")
    if not any(words in text for words in refusals) and scene.lives(rank) and not scene.is_finished(branch):
        raise Wrong(f"a second array task was not refused: {text[-300:]}")
    said = next((words for words in refusals if words in text), "nothing")
    return f"a second array task of the branch ended, saying: {said}"
