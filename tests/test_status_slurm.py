"""What SLURM answers about jobs, and how a branch is judged by it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_status import FRESH, NOW_S, STALE, FakeCommand, fake, no_slurm, row_22

from stl_lightning.launch.judge import judge
from stl_lightning.launch.slurm import Job, ask_queue, read_queue
from stl_lightning.ranges import as_ranges, from_ranges
from stl_lightning.status import Status

__all__ = ["fake", "no_slurm"]


def as_row_23(row: dict[str, Any]) -> dict[str, Any]:
    """The same job since SLURM 23.02: a list of states, and numbers that say whether they are set."""

    def number(value: int | None, unset: object = 0) -> dict[str, Any]:
        return {"set": value is not None and value != unset, "infinite": False, "number": value or 0}

    numbers = {name: number(row[name]) for name in ("array_job_id", "time_limit", "start_time", "end_time")}
    task = {"array_task_id": number(row["array_task_id"], unset=None)}
    return row | numbers | task | {"job_state": [row["job_state"]]}


ROWS = [
    row_22(20, "RUNNING", array=17, task=0),
    row_22(21, "CANCELLED", array=17, task=1),
    row_22(17, "PENDING", array=17, tasks="2-3,8%2"),
    row_22(18, "PENDING"),
    row_22(19, "COMPLETED"),
]


NAMES = {"17_0": "running", "17_1": "over", "17_2": "waiting", "17_3": "waiting", "17_8": "waiting"}


NAMES |= {"18": "waiting", "19": "over"}


@pytest.mark.parametrize("convert", [lambda row: row, as_row_23], ids=["22.05", "23.02"])
def test_both_formats_of_squeue_say_the_same(convert: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    jobs = {job.id: job for job in read_queue(json.dumps({"jobs": [convert(row) for row in ROWS]}))}
    assert {name: job.state for name, job in jobs.items()} == NAMES
    assert jobs["17_0"] == Job("17_0", "running", "RUNNING", 3600.0, 1000, 4600)
    assert jobs["18"].limit_s == 3600.0
    assert jobs["18"].end_s is None


@pytest.mark.parametrize(
    ("states", "state"),
    [
        (["RUNNING", "COMPLETING"], "running"),
        (["CANCELLED", "COMPLETING"], "over"),
        (["PENDING", "REQUEUED"], "waiting"),
        (["NODE_FAIL", "REQUEUE_HOLD"], "waiting"),
    ],
)
def test_a_state_of_several_words(states: list[str], state: str) -> None:
    (job,) = read_queue(json.dumps({"jobs": [as_row_23(row_22(17, "RUNNING")) | {"job_state": states}]}))
    assert job.state == state


@pytest.mark.parametrize("unlimited", [4294967295, {"set": True, "infinite": True, "number": 0}, None])
def test_a_job_without_a_time_limit(unlimited: object) -> None:
    (job,) = read_queue(json.dumps({"jobs": [row_22(17, "RUNNING") | {"time_limit": unlimited}]}))
    assert job.limit_s is None


def test_squeue_is_asked_once_for_the_jobs_and_nothing_else_is_believed(fake: FakeCommand, tmp_path: Path) -> None:
    (tmp_path / "queue.json").write_text(json.dumps({"jobs": ROWS}))
    fake("squeue", f'echo "$@" >> {tmp_path}/asked; cat {tmp_path}/queue.json')
    queue = ask_queue(["17_0", "17_1", "18"])
    assert (tmp_path / "asked").read_text() == "--json --states=all --jobs=17,18\n"
    assert set(queue.jobs) == set(NAMES) - {"19"}
    assert queue.problem is None


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("sleep 60", "did not answer within 0.2 s"),
        ("echo no controller >&2; exit 1", "squeue failed: no controller"),
        ("echo '<html>'", "not understood"),
        ("echo '{\"jobs\": [{}]}'", "not understood"),
    ],
)
def test_a_squeue_that_does_not_work_is_a_problem_and_no_error(
    script: str, problem: str, fake: FakeCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stl_lightning.launch.slurm.ANSWER_S", 0.2)
    fake("squeue", f"exec {script}" if script.startswith("sleep") else script)
    found = ask_queue(["17"]).problem
    assert found is not None
    assert problem in found


def test_a_forgotten_job_is_no_problem(fake: FakeCommand) -> None:
    fake("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    queue = ask_queue(["17"])
    assert (queue.jobs, queue.problem) == ({}, None)


@pytest.mark.usefixtures("no_slurm")
def test_without_squeue_it_is_said_so() -> None:
    assert ask_queue(["17"]).problem == "there is no squeue on PATH"
    assert ask_queue([]).problem is None


@pytest.mark.parametrize("numbers", [[3, 7, 8, 9], [0], list(range(1024)), [0, 2, 4], [5, 6]])
def test_ranges_and_their_inverse(numbers: list[int]) -> None:
    assert from_ranges(as_ranges(numbers)) == numbers


def test_ranges_as_slurm_writes_them() -> None:
    assert from_ranges("[0-8:4,11%2]") == [0, 4, 8, 11]
    assert from_ranges("1,3,...") == [1, 3]


RUNS = Job("17_3", "running", start_s=NOW_S - 500)


WAITS = Job("17_3", "waiting")


OVER = Job("17_3", "over")


NEW_TASK = Job("23_3", "running", start_s=NOW_S - 5)


OF_ALL = Job("17", "running", start_s=NOW_S - 500)


@pytest.mark.parametrize(
    ("state", "age_s", "is_gone", "jobs", "n_failures", "judged"),
    [
        ("pending", 0, False, [], 0, "pending"),
        ("pending", 0, False, [WAITS], 0, "queued"),
        ("pending", 0, False, [replace(RUNS, id="17_4")], 0, "queued"),  # its job has begun, the branch has not
        ("pending", 0, False, [OVER], 0, "pending"),
        ("running", FRESH, False, [], 0, "running"),  # SLURM has forgotten the job: the file tells
        ("running", FRESH, False, [RUNS], 0, "running"),
        ("running", STALE, False, [], 0, "lost"),
        ("running", STALE, False, [RUNS], 0, "lost"),
        ("running", FRESH, True, [], 0, "lost"),
        ("running", FRESH, False, [OVER], 0, "lost"),  # the job has ended, and the process with it
        ("running", FRESH, False, [WAITS], 0, "queued"),  # requeued
        ("running", STALE, False, [WAITS], 0, "queued"),
        ("running", STALE, False, [replace(RUNS, start_s=NOW_S - 5)], 0, "queued"),  # requeued, and starting
        ("running", STALE, False, [OVER, NEW_TASK], 0, "queued"),  # resubmitted
        ("interrupted", STALE, False, [], 0, "interrupted"),
        ("interrupted", STALE, False, [WAITS], 0, "queued"),
        ("interrupted", FRESH, False, [RUNS], 0, "queued"),
        ("failed", STALE, False, [], 1, "failed"),
        ("failed", FRESH, False, [RUNS], 1, "queued"),  # its job tries again
        ("failed", FRESH, False, [RUNS], 3, "failed"),  # no more
        ("failed", FRESH, False, [RUNS, NEW_TASK], 3, "queued"),
        ("finished", STALE, True, [WAITS], 0, "finished"),
    ],
)
def test_the_judgement_of_a_branch(
    state: Any, age_s: float, is_gone: bool, jobs: Sequence[Job], n_failures: int, judged: str
) -> None:
    status = Status(3, state, job="17_3", n_failures=n_failures)
    assert judge(status, age_s, is_gone, jobs, retries=2, now_s=NOW_S) == judged


def test_a_branch_that_failed_in_a_job_of_many_stays_failed_while_its_siblings_run() -> None:
    status = Status(3, "failed", job="17", n_failures=3)
    assert judge(status, FRESH, False, [OF_ALL], retries=2, now_s=NOW_S) == "failed"
    assert judge(status, FRESH, False, [replace(OF_ALL, state="waiting")], retries=2, now_s=NOW_S) == "queued"
