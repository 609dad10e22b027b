"""All faults of a campaign: how many of each kind and where, done by two processes at once, and the record of them."""

import json
import os
import random
import selectors
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from faulting.kinds import KINDS

HERE = Path(__file__).resolve().parent
RANKS = HERE / "ranks"
RANKS_ARE = {
    "local": "processes forked from one that has imported everything",
    "slurm": "new interpreters that leave out torchvision, torch's compiler and FSDP",
}
# Of a kind that is done in both places, the part that is done on SLURM, where it costs more time.
SLURM_PART = 0.1
QUICK = {"local": ["sigkill_rank", "truncated_checkpoint", "rename_failure", "two_launches", "disk_full"], "slurm": []}
QUICK_SETTINGS = ("--trainer.max_epochs=8",)


def shares(count: int, kinds: Sequence[str]) -> dict[str, int]:
    """How often each kind is done: those that only SLURM can do two times for three of the others."""
    turns = [kind for kind in kinds for _ in range(2 if KINDS[kind].where == ("slurm",) else 3)]
    return dict(Counter(turns[i % len(turns)] for i in range(count)))


def plans(
    count: int, kinds: Sequence[str], seed: int, missing: dict[str, str], done: Mapping[str, int]
) -> dict[str, list[str]]:
    """The kinds for SLURM and for this machine, in the order they are done; none for a place that is missing.

    `done` says how often each was done before, as "slurm link_cut".
    """
    rng = random.Random(seed)
    there = [kind for kind in kinds if any(where not in missing for where in KINDS[kind].where)]
    planned: dict[str, list[str]] = {"local": [], "slurm": []}
    for kind, n in shares(count, there).items():
        n_slurm = n if KINDS[kind].where == ("slurm",) else round(SLURM_PART * n) if "slurm" in KINDS[kind].where else 0
        n_slurm = 0 if "slurm" in missing else n_slurm
        for where, n_there in (("slurm", n_slurm), ("local", n - n_slurm)):
            planned[where] += [kind] * (n_there - done.get(f"{where} {kind}", 0))
    for order in planned.values():
        rng.shuffle(order)
    return planned


def missing_places() -> dict[str, str]:
    """Where faults cannot be done on this machine, and why."""
    sys.path.append(str(HERE.parent.parent / "tests"))
    from cluster import missing, namespaces_permitted

    reason = missing() or ("" if namespaces_permitted() else "nodes need namespaces, which take root")
    return {"slurm": reason} if reason else {}


def environ() -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "STL_"))}
    path = f"{HERE.parent}:{RANKS}:{HERE.parent.parent}"
    return clean | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def campaign(
    planned: dict[str, list[str]],
    seed: int,
    limit_s: float,
    keep: Path | None,
    report: Callable[[dict[str, Any]], None],
    per_round: int = 8,
    settings: Sequence[str] = (),
) -> None:
    """Do the faults; `report` is called with what came of each round: {"round": ..., "rows": [...]}."""
    with tempfile.TemporaryDirectory(prefix="stl-faults-") as folder, selectors.DefaultSelector() as selector:
        reference = _reference(Path(folder) / "reference", settings)
        lanes = []
        try:
            for name, where, kinds in _lanes(planned, 2 * per_round):
                plan = {
                    "name": name, "where": where, "kinds": kinds, "seed": seed, "folder": folder, "limit_s": limit_s,
                    "reference": str(reference), "per_round": per_round, "settings": list(settings),
                    "keep": keep and str(keep.absolute()),
                }  # fmt: skip
                file = Path(folder) / f"{name}.json"
                file.write_text(json.dumps(plan))
                command = [*PRIVATE, sys.executable, "-m", "faulting.lane", str(file)]
                lanes.append(subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, text=True))
                selector.register(lanes[-1].stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
            while selector.get_map():
                for key, _ in selector.select():
                    line = key.fileobj.readline()  # type: ignore[union-attr]
                    if line:
                        report(json.loads(line))
                    else:
                        selector.unregister(key.fileobj)
            if any([lane.wait() for lane in lanes]):
                raise SystemExit("tools/faults: a process that does the faults has failed")
        finally:
            for lane in lanes:
                lane.terminate()
            for lane in lanes:
                lane.wait()


def _lanes(planned: dict[str, list[str]], n_enough: int) -> Iterator[tuple[str, str, list[str]]]:
    """One or two processes for each place, those for SLURM each with a cluster of its own: faults make one wait."""
    for where, kinds in planned.items():
        n_lanes = min(len(kinds), 2 if len(kinds) > n_enough else 1)
        for i in range(n_lanes):
            yield f"{where}{i}", where, kinds[i::n_lanes]


PRIVATE = ("unshare", "--mount", "--propagation=private")  # mounts of a campaign are seen by itself only


def _reference(folder: Path, settings: Sequence[str]) -> Path:
    """Train once without faults, in one new process that waits for nothing."""
    folder.mkdir()
    args = ["fit", f"--config={HERE / 'config.yaml'}", f"--run.root={folder}", "--model.network.init_args.step_s=0"]
    args += settings
    command = [sys.executable, "-m", "stl_lightning", *args]
    subprocess.run(command, env=environ(), check=True, stdout=subprocess.DEVNULL)
    return folder / "digits"


def record(rounds: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all rounds so far."""
    return {
        "injected": len(rows),
        "recovered": sum(row["recovered"] for row in rows),
        "lost_branches": sum(each["lost_branches"] for each in rounds),
        "wrong_results": sum(each["wrong_results"] + len(each["notes"]) for each in rounds),
        "kinds": dict(sorted(Counter(row["kind"] for row in rows).items())),
        "where": dict(sorted(Counter(row["where"] for row in rows).items())),
        "resubmitted": sum(each["resubmitted"] for each in rounds),
        "rounds": list(rounds),
        "rows": list(rows),
    }


def write(file: Path, content: dict[str, Any]) -> None:
    """Complete or not at all."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(file)


def line(row: dict[str, Any]) -> str:
    """One fault in one line."""
    verdict = "recovered" if row["recovered"] else f"NOT RECOVERED: {'; '.join(row['problems'])}"
    took = f" {row['recovery_s']:6.1f} s" if "recovery_s" in row else ""
    target = ",".join(map(str, row["branches"]))
    what = f"{row['where']:5} {row['kind']:20} {target:7} at step {row['at']['step']:3}"
    return f"{what}: {row['happened']}: {verdict}{took}"
