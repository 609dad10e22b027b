"""What SLURM is asked: to queue a job, to cancel one, how jobs are doing. Pure functions read the answers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from stl_lightning.errors import ConfigError, RunError
from stl_lightning.launch.compose import Submission
from stl_lightning.ranges import from_ranges

ANSWER_S = 3.0  # after which `squeue` counts as hanging; a busy controller takes one
OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING"}
NEVER = 0xFFFFFFFE  # and the number after it: not set, infinite
HINTS = {
    "Invalid job array specification": "The number of branches may be above this cluster's MaxArraySize (see `scontrol "
    "show config`); --method srun needs no array",
}


@dataclass(frozen=True)
class Job:
    """One job or array task: 17 or 17_3. Times are in seconds since 1970 by SLURM's clock."""

    id: str
    state: Literal["waiting", "running", "over"]
    said: str = ""  # SLURM's own word
    limit_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None  # at the latest
    held: str | None = None  # why it waits until somebody releases it


@dataclass(frozen=True)
class Queue:
    """What SLURM knows of the jobs it was asked for; `problem` says why it does not answer."""

    jobs: Mapping[str, Job] = field(default_factory=dict)
    problem: str | None = None

    def of(self, job_id: str) -> list[Job]:
        """The job of this id; of an array, its tasks."""
        return [job for name, job in self.jobs.items() if job_id in (name, base(name))]

    def active(self, job_id: str) -> list[Job]:
        return [job for job in self.of(job_id) if job.state != "over"]


def base(job_id: str) -> str:
    """17 of 17_3."""
    return job_id.partition("_")[0]


def ask_queue(job_ids: Iterable[str]) -> Queue:
    """Ask SLURM once about jobs. It answers or not: this never raises, and returns after `ANSWER_S` at the latest."""
    wanted = sorted({base(job_id) for job_id in job_ids}, key=lambda job_id: (len(job_id), job_id))
    if not wanted:
        return Queue()
    command = ["squeue", "--json", "--states=all", f"--jobs={','.join(wanted)}"]
    environ = os.environ | {"SLURM_BITSTR_LEN": "0"}  # the whole list of an array's waiting tasks, not its beginning
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, env=environ)
    except FileNotFoundError:
        return Queue(problem="there is no squeue on PATH")
    except subprocess.TimeoutExpired:
        return Queue(problem=f"squeue did not answer within {ANSWER_S:g} s")
    if asked.returncode and "Invalid job id" not in asked.stderr:  # of jobs that SLURM has forgotten
        return Queue(problem=f"squeue failed: {_last_line(asked.stderr)}")
    try:
        jobs = read_queue(asked.stdout)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return Queue(problem=f"the answer of `squeue --json` is not understood: {error!r}")
    return Queue({job.id: job for job in jobs if base(job.id) in wanted})  # old versions tell of all jobs


def read_queue(text: str) -> list[Job]:
    """The jobs in the output of `squeue --json`; the waiting tasks of an array, which it lists as one, one by one.

    A state is a word in SLURM 22 and a list of words since 23.02; a number is one, or says whether it is set.
    """
    return [job for row in (json.loads(text)["jobs"] if text.strip() else []) for job in _jobs(row)]


def _jobs(row: Mapping[str, Any]) -> list[Job]:
    words = [row["job_state"]] if isinstance(row["job_state"], str) else list(row["job_state"])
    state: Literal["waiting", "running", "over"] = "running"
    if WAITING & set(words):
        state = "waiting"
    elif OVER & set(words):
        state = "over"
    limit_min, start_s, end_s = (_number(row.get(name)) for name in ("time_limit", "start_time", "end_time"))
    array, task = _number(row.get("array_job_id")), _number(row.get("array_task_id"), zero=True)
    names = [str(row["job_id"])]
    if array is not None:
        tasks = from_ranges(row.get("array_task_string") or "") if task is None else [task]
        names = [f"{array}_{number}" for number in tasks]
    limit_s = None if limit_min is None else 60.0 * limit_min
    reason = str(row.get("state_reason"))
    held = reason if state == "waiting" and re.search("hold|held", reason, re.IGNORECASE) else None
    return [Job(name, state, "+".join(words), limit_s, start_s, end_s, held) for name in names]


def _number(value: Any, zero: bool = False) -> int | None:
    """A number in both formats; None where it is not set. Zero means that too, but for the number of a task."""
    if isinstance(value, Mapping):
        value = value["number"] if value.get("set") and not value.get("infinite") else None
    return None if value is None or value >= NEVER or (value == 0 and not zero) else int(value)


def find_sbatch() -> None:
    """Raises: ConfigError if there is none, saying where it was looked for."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            f"no sbatch on PATH, looked for in {os.environ.get('PATH', '')}. On a cluster, call this on a node that "
            "submits jobs; on this machine, --local N trains in N processes without SLURM"
        )


def submit(command: Submission, ids: Mapping[str, str], folder: str) -> str:
    """Queue a job from a folder; returns its id.

    Raises: RunError with SLURM's own words.
    """
    environ = os.environ | dict(command.environ)
    asked = subprocess.run(command.argv(ids), capture_output=True, text=True, env=environ, cwd=folder)
    if asked.returncode:
        reason = asked.stderr.strip()
        hints = [hint for words, hint in HINTS.items() if words in reason]
        raise RunError("\n".join([f"sbatch refused the job of the {command.role}: {reason}", *hints]))
    sys.stderr.write(asked.stderr)
    return asked.stdout.strip().partition(";")[0]  # where clusters are federated: id;name


def cancel_jobs(job_ids: Sequence[str]) -> None:
    """Raises: RunError with SLURM's own words."""
    try:
        asked = subprocess.run(["scancel", *job_ids], capture_output=True, text=True)
    except FileNotFoundError:
        raise RunError("there is no scancel on PATH; call this on a node that submits jobs") from None
    if asked.returncode:
        raise RunError(f"scancel failed: {_last_line(asked.stderr)}")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]
