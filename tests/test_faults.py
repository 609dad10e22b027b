"""`tools/faults`: its plan, what it does to ranks, what it would call lost or wrong, and a handful of faults."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

CHECKOUT = Path(__file__).resolve().parent.parent
TOOLS = CHECKOUT / "tools"
sys.path.append(str(TOOLS))
sys.path.append(str(TOOLS / "faulting" / "ranks"))

import tamper  # noqa: E402
from faulting.campaign import line, plans, record, shares  # noqa: E402
from faulting.check import Keeper, Outcome, wrong_branches  # noqa: E402
from faulting.kinds import KINDS  # noqa: E402
from faulting.waiting import Until  # noqa: E402

from stl_lightning.attempts import begin_attempt  # noqa: E402
from stl_lightning.checkpoint import load_checkpoint  # noqa: E402
from stl_lightning.errors import CheckpointError  # noqa: E402
from stl_lightning.paths import RunPaths  # noqa: E402
from stl_lightning.status import Status, read_status, write_status  # noqa: E402

# --- the plan


@pytest.mark.parametrize("missing", [{}, {"slurm": "no sbatch"}])
def test_all_faults_are_planned_where_they_can_be_done(missing: dict[str, str]) -> None:
    planned = plans(200, list(KINDS), 0, missing, {})
    assert sum(map(len, planned.values())) == 200
    for where, kinds in planned.items():
        assert all(where in KINDS[kind].where for kind in kinds)
    if missing:
        assert planned["slurm"] == []


def test_200_faults_are_ten_of_every_kind() -> None:
    counts = shares(200, list(KINDS))
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 10


def test_what_was_done_is_not_done_again() -> None:
    planned = plans(30, list(KINDS), 0, {}, {})
    done = {f"{where} {kind}": planned[where].count(kind) for where in planned for kind in planned[where]}
    assert plans(30, list(KINDS), 0, {}, done) == {"local": [], "slurm": []}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_function(kind: str) -> None:
    assert callable(KINDS[kind].function())


def test_the_record_counts_rows_and_rounds() -> None:
    row = {"kind": "requeue", "where": "slurm", "branches": [0], "at": {"step": 3}, "happened": "x"}
    rows = [row | {"recovered": True}, row | {"recovered": False, "problems": ["branch 0 has not finished"]}]
    made = record([{"lost_branches": 1, "wrong_results": 2, "notes": ["x"], "resubmitted": 3}], rows)
    figures = ("injected", "recovered", "lost_branches", "wrong_results", "resubmitted")
    assert [made[name] for name in figures] == [2, 1, 1, 3, 3]
    assert "has not finished" in line(rows[1])


def test_a_condition_that_stays_unmet_is_given_up() -> None:
    assert Until(lambda: True).is_over()
    wait = Until(lambda: False, timeout_s=0.05, every_s=0.01)
    assert not wait.is_over()
    time.sleep(0.06)
    assert wait.is_over()


# --- what ranks feel


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])
def test_a_rename_fails_before_or_after_it_is_done(before: float, after: float, tmp_path: Path) -> None:
    plan = tmp_path / "rename.json"
    plan.write_text(json.dumps({"where": "branches/01/", "before": before, "after": after}))
    rename = tamper.failing(os.replace, plan)
    for branch in ("01", "02"):
        source, target = tmp_path / branch, tmp_path / "branches" / branch / "last.ckpt"
        target.parent.mkdir(parents=True)
        source.touch()
        if branch == "01" and before + after:
            with pytest.raises(OSError, match=str(target)) as error:
                rename(source, target)
            assert error.value.errno in (errno.ESTALE, errno.EIO)
        else:
            rename(source, target)
        assert target.exists() == (branch == "02" or not before)


def test_a_clock_is_shifted_while_a_file_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tamper, "LOOK_EVERY_S", 0.0)
    file = tmp_path / "clock.json"
    clock = tamper.shifted(time.time, file)
    for said, shift_s in (("{}", 0), ('{"*": -7200}', -7200), ('{"elsewhere": 60}', 0)):
        file.write_text(said)
        assert clock() - time.time() == pytest.approx(shift_s, abs=5)


# --- what is called lost or wrong


@pytest.fixture
def scene(tmp_path: Path) -> Any:
    """A run of one branch that has finished."""
    paths = RunPaths(tmp_path)
    branch = paths.branch(0)
    number, desk = begin_attempt(branch, 0)
    weights = {"weight": torch.arange(6.0, dtype=torch.float64)}
    for path in (branch.best, branch.last):
        torch.save({"state_dict": weights, "global_step": 5}, path)
    branch.config.write_text("x: 1")
    write_status(desk, Status(0, "finished", number, epoch=2, loss=0.5))
    return SimpleNamespace(
        paths=paths, branch=paths.branch, finished=lambda: [0], status=lambda b: read_status(paths.branch(b), b)
    )


def test_a_single_bit_makes_a_result_wrong(scene: Any) -> None:
    expected = [Outcome.of(scene.branch(0), 0)]
    assert wrong_branches(scene, expected) == {}
    for name in ("best", "last"):
        path = getattr(scene.branch(0), name)
        kept = path.read_bytes()
        content = load_checkpoint(path)
        content["state_dict"]["weight"][3] = torch.nextafter(content["state_dict"]["weight"][3], torch.tensor(9.0))
        torch.save(content, path)
        assert wrong_branches(scene, expected) == {0: f"the weights of {name}.ckpt"}
        path.write_bytes(kept[:-1])
        assert "truncated" in wrong_branches(scene, expected)[0]
        path.write_bytes(kept)


def test_a_finished_branch_that_changes_is_lost(scene: Any) -> None:
    keeper = Keeper(scene)
    assert keeper.look() == [0]
    assert keeper.lost() == {}
    number, desk = begin_attempt(scene.branch(0), 0)
    write_status(desk, Status(0, "finished", number, epoch=2, loss=0.5))
    assert "status" in keeper.lost()[0]
    scene.branch(0).best.unlink()
    assert "best.ckpt" in keeper.lost()[0]


def test_a_checkpoint_that_was_cut_anywhere_says_what_to_delete(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.ckpt", tmp_path / "cut.ckpt"
    torch.save({f"{i}": torch.zeros(200, dtype=torch.float64) for i in range(80)}, whole)
    content = whole.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 2, 3, len(content) - 1, *(rng.randrange(len(content)) for _ in range(150))]:
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="Delete it"):
            load_checkpoint(cut)


# --- faults


@pytest.mark.slow
def test_a_handful_of_faults(tmp_path: Path) -> None:
    private = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True)
    if private.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {private.stderr.decode().strip()}")
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, TOOLS / "faults", "--quick", "--out", out], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads(out.read_text())
    figures = ("injected", "recovered", "lost_branches", "wrong_results")
    assert [made[name] for name in figures] == [5, 5, 0, 0], done.stdout
    assert len(made["kinds"]) == 5
