"""A scheduler for this machine: branches over worker processes, which may fail or be killed without harm to others.

A worker is `stl fit --run.branches=[...]`, which trains its branches stacked. It prints into a file, so that it does
not depend on this process.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from stl_lightning import leaving
from stl_lightning.attempts import desk_of, process_started
from stl_lightning.errors import STLError, say
from stl_lightning.exits import DONE, FAILED, FENCED, INTERRUPTED, REFUSED
from stl_lightning.launch.record import Launch, Process, launching, read_launches, write_launch
from stl_lightning.machine import n_cores
from stl_lightning.paths import RunPaths
from stl_lightning.ranges import as_ranges
from stl_lightning.status import Status, read_status, write_status
from stl_lightning.supervisor import N_LOG_LINES, Ended, how_it_ended, record_end

POLL_S = 0.1
STL = (sys.executable, "-m", "stl_lightning")


@dataclass
class Child:
    """A process that was started, the branches it trains (none: it prepares, or makes the ensemble), and its log."""

    process: subprocess.Popen[bytes]
    log: Path
    slot: int = 0
    branches: tuple[int, ...] = ()
    n_printed: int = 0  # bytes of the log

    def __post_init__(self) -> None:
        self.started = process_started(self.process.pid)

    def print_new(self) -> None:
        """Pass on the lines that came into the log since the last time."""
        with self.log.open("rb") as file:
            file.seek(self.n_printed)
            text = file.read()
        if self.process.returncode is None:
            text = text[: text.rfind(b"\n") + 1]  # the rest of a line is still to come
        self.n_printed += len(text)
        prefix = f"[{','.join(map(str, self.branches))}] " if self.branches else ""
        with contextlib.suppress(OSError):  # such as a full disk, or a terminal that is gone; the log has it all
            for line in text.decode(errors="replace").splitlines():
                print(prefix + line, flush=True)

    def log_tail(self) -> list[str]:
        return list(deque(self.log.read_text(errors="replace").splitlines(), maxlen=N_LOG_LINES))


@dataclass
class LocalScheduler:
    """Trains the branches of a launch over `launch.n_workers` processes. One object is one launch."""

    launch: Launch
    paths: RunPaths
    waiting: deque[list[int]] = field(default_factory=deque)  # groups of branches that train together
    children: list[Child] = field(default_factory=list)
    n_bad_ends: dict[int, int] = field(default_factory=dict)  # of a branch that trained alone
    killed: set[tuple[int, ...]] = field(default_factory=set)  # groups whose worker was
    asked_to_leave: bool = False
    n_started: int = 0

    @property
    def job(self) -> str:
        return self.launch.jobs["branches"]

    def run(self) -> int:
        """Prepare, train, make the ensemble, as far as each is wanted; returns an exit code of `exits`."""
        config = [f"--config={self.launch.config}", *self.launch.settings]
        with leaving.handling(self._hand_on):
            if self.launch.prepares and (code := self._wait_for("prepare", *config)):
                return self._left() if self.asked_to_leave else code
            self._train(config)
            if self.asked_to_leave:
                return self._left()
            finished = [branch for branch in range(self.launch.n_branches) if self._status(branch).state == "finished"]
            made = DONE
            if self.launch.has_ensemble and finished:
                made = self._wait_for("ensemble", str(self.paths.folder))
        if self.asked_to_leave:
            return self._left()
        return made if set(self.launch.branches) <= set(finished) else FAILED

    def _train(self, config: Sequence[str]) -> None:
        assert self.launch.n_workers is not None, "a launch on this machine has workers"
        unfinished = [branch for branch in self.launch.branches if self._status(branch).state != "finished"]
        self.waiting.extend(first_groups(unfinished, self.launch.n_workers))
        while self.children or (self.waiting and not self.asked_to_leave):
            taken = {child.slot for child in self.children}
            for slot in range(self.launch.n_workers):
                if slot not in taken and self.waiting and not self.asked_to_leave:
                    self._start_worker(slot, self.waiting.popleft(), config)
            time.sleep(POLL_S)
            for child in list(self.children):
                has_ended = child.process.poll() is not None
                child.print_new()
                if has_ended:
                    self.children.remove(child)
                    self._take_back(child)

    def _start_worker(self, slot: int, group: Sequence[int], config: Sequence[str]) -> None:
        self._start(slot, group, *worker_args(config, group))
        self.launch.workers = [Process.of(child.process.pid) for child in self.children]
        # Such as a full disk: `stl cancel` still ends this process.
        with contextlib.suppress(STLError), launching(self.paths):
            write_launch(self.paths, self.launch)

    def _start(self, slot: int, branches: Sequence[int], *args: str) -> Child:
        """A process in a session of its own: a terminal's Ctrl-C reaches only this one, which hands it on."""
        log = self.paths.logs / f"{self.job}-{args[0]}-{self.n_started}.out"
        log.parent.mkdir(parents=True, exist_ok=True)
        self.n_started += 1
        environ = worker_environ(os.environ, self.job, slot, self.launch.n_workers or 1)
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*STL, *args],
                env=environ,
                cwd=self.launch.folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        child = Child(process, log, slot, tuple(branches))
        self.children.append(child)
        if self.asked_to_leave:  # in between
            process.terminate()
        return child

    def _wait_for(self, *args: str) -> int:
        child = self._start(0, (), *args)
        while child.process.poll() is None:
            time.sleep(POLL_S)
            child.print_new()
        child.print_new()
        self.children.remove(child)
        return child.process.returncode

    def _take_back(self, child: Child) -> None:
        """Put the branches that a worker leaves unfinished back into the queue, or give them up."""
        code = child.process.returncode
        if self.asked_to_leave or code == DONE:
            return
        if code < 0 or code == FAILED:
            self._record(child)
        if len(child.branches) == 1 and code != INTERRUPTED:
            self.n_bad_ends[child.branches[0]] = 1 + self.n_bad_ends.get(child.branches[0], 0)
        statuses = {branch: self._status(branch) for branch in child.branches}
        n_failures = {branch: self._n_failures(branch, status) for branch, status in statuses.items()}
        again = to_try_again(code, statuses, n_failures, self.launch.retries, child.branches in self.killed)
        self.killed |= {child.branches} if code < 0 else set()
        self.waiting.extend(again)
        kept = {branch for group in again for branch in group}
        if kept and code != INTERRUPTED:
            say(f"worker of branches {as_ranges(child.branches)} {how_it_ended(code)}; {as_ranges(kept)} go on")
        for branch in child.branches:
            if branch not in kept and statuses[branch].state != "finished":
                say(f"branch {branch}: given up (exit code {code}); see {child.log}")

    def _record(self, child: Child) -> None:
        """Note in the status files how a worker ended that could not. Whose fault it was is known where it had one."""
        tail = child.log_tail()
        for branch in child.branches:
            paths = self.paths.branch(branch)
            if len(child.branches) == 1:
                process = child.process
                record_end(Ended(process.pid, child.started, process.returncode, [(paths, branch)], tail))
                return
            with contextlib.suppress(STLError):  # such as a newer attempt elsewhere
                status = read_status(paths, branch)
                if status.pid == child.process.pid and status.state == "running":
                    status.state = "interrupted"
                    write_status(desk_of(paths, status.attempt), status)

    def _n_failures(self, branch: int, status: Status) -> int:
        """In this launch: those in its status, or the ends of a process that did not get as far as to write one."""
        return max(self.n_bad_ends.get(branch, 0), status.n_failures if status.job == self.job else 0)

    def _status(self, branch: int) -> Status:
        """An unreadable file is that of a branch still to train: `stl fit` says what is wrong with it."""
        try:
            return read_status(self.paths.branch(branch), branch)
        except STLError:
            return Status(branch)

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_leave = True
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, number)

    def _left(self) -> int:
        say(f"interrupted; `stl resubmit {self.paths.folder}` goes on")
        return INTERRUPTED


def first_groups(branches: Sequence[int], n_workers: int) -> list[list[int]]:
    """One group of branches for each worker, as equal as can be."""
    return [list(group) for i in range(n_workers) if (group := branches[i::n_workers])]


def worker_args(config: Sequence[str], group: Sequence[int]) -> list[str]:
    """The command of a worker, after `stl`. A progress bar fills a log; who sets one wins, as the later setting."""
    return ["fit", "--trainer.enable_progress_bar=false", *config, f"--run.branches=[{','.join(map(str, group))}]"]


def to_try_again(
    code: int, statuses: Mapping[int, Status], n_failures: Mapping[int, int], retries: int, was_killed: bool = True
) -> list[list[int]]:
    """The groups in which the unfinished branches of a worker go on, after it ended with an exit code.

    A branch that failed by itself goes on alone. A group that is killed for the first time goes on whole, for that may
    be an accident. What it dies of again (`was_killed`) may be the fault of one of them, so its halves go on, down to
    the one that fails alone: no sibling is counted a failure that is not its own.
    """
    unfinished = [branch for branch, status in statuses.items() if status.state != "finished"]
    if code == INTERRUPTED:
        return [unfinished] if unfinished else []
    if len(statuses) == 1:
        is_final = code in (REFUSED, FENCED)  # it would end so again
        return [[branch] for branch in unfinished if n_failures[branch] <= retries and not is_final]
    failed = [branch for branch in unfinished if statuses[branch].state == "failed"]
    others = [branch for branch in unfinished if branch not in failed]
    middle = (len(others) + 1) // 2 if code >= 0 or was_killed else len(others)
    alone = [[branch] for branch in failed if n_failures[branch] <= retries]
    return [half for half in (others[:middle], others[middle:]) if half] + alone


def worker_environ(environ: Mapping[str, str], job: str, slot: int, n_workers: int) -> dict[str, str]:
    """The variables of a worker: the name of the job, its share of the cores, one GPU of several."""
    n_threads = max(1, n_cores() // n_workers)
    gpus = [gpu for gpu in environ.get("CUDA_VISIBLE_DEVICES", ",".join(_gpus())).split(",") if gpu]
    one_gpu = {"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else {}
    return {"OMP_NUM_THREADS": str(n_threads)} | outside_slurm(environ) | one_gpu | {"STL_JOB": job}


def outside_slurm(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables, without those of a SLURM job."""
    return {name: value for name, value in environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def _gpus() -> list[str]:
    """Numbers of the NVIDIA GPUs, without asking their driver, which would take memory on them."""
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.exists() else []


def main(run: str) -> int:
    """Carry out that launch of a run which this process was recorded for."""
    paths, me = RunPaths(Path(run)), Process.of(os.getpid())
    launch = next(launch for launch in read_launches(paths) if launch.launcher == me)
    # What `record_end` notes for a killed worker is of its job, and not of one of SLURM's that this was called in.
    mine = outside_slurm(os.environ) | {"STL_JOB": launch.jobs["branches"]}
    os.environ.clear()
    os.environ.update(mine)
    return LocalScheduler(launch, paths).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
