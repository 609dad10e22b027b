"""All methods in turns, on each link: what a turn took."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from networking.crew import Crew, Method
from networking.nodes import LINKS
from networking.work import Record, Work


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    method: Method
    link: str

    @property
    def one_worker(self) -> "Case":
        """What this is compared with."""
        return ONE_WORKER_SPECTRAL if self.method.is_spectral else ONE_WORKER


SHAPED = tuple(name for name, link in LINKS.items() if link.shaping)
ONE_WORKER = Case(Method("one worker", alone=True), "unshaped")
ONE_WORKER_SPECTRAL = Case(Method("spectral, one worker", alone=True), "unshaped")
CASES = (
    *(Case(Method(name), link) for name in ("spectral", "ddp", "powersgd", "local-sgd") for link in SHAPED),
    Case(Method("ddp"), "unshaped"),
    Case(Method("no exchange"), "unshaped"),
    ONE_WORKER,
    ONE_WORKER_SPECTRAL,
)
QUICK_CASES = tuple(case for case in CASES if case.link == "1 Gbit/s") + CASES[-3:]
Repetition = Mapping[Case, Record]


def in_turns(cases: Sequence[Case], work: Work, folder: Path, n: int, cores: float | None) -> list[Repetition]:
    """Each case in each of `n` repetitions. Every other one goes backwards, so that a machine that slows down steadily
    favours nobody.

    Raises: Unavailable where there can be no namespaces, MeasurementError if a training fails.
    """
    methods = list(dict.fromkeys(case.method for case in cases))
    with ExitStack() as running:
        crews = {}
        for number, method in enumerate(methods):
            n_turns = 1 + n * sum(case.method == method for case in cases)
            crew = Crew(method, work, folder / f"crew{number}", n_turns, cores)
            crews[method] = running.enter_context(crew)
        for crew in sorted(crews.values(), key=lambda crew: crew.method.is_spectral):  # those first that start faster
            crew.turn("unshaped")  # warms up
        repetitions = [repetition(crews, cases[:: (-1) ** number]) for number in range(n)]
        n_bytes = {method: crew.finish() for method, crew in crews.items()}
    return [
        {case: measured[case] | {"bytes_whole_process": n_bytes[case.method]} for case in cases}
        for measured in repetitions
    ]


def repetition(crews: Mapping[Method, Crew], cases: Iterable[Case]) -> dict[Case, Record]:
    found = {}
    for case in cases:
        found[case] = summary(crews[case.method].turn(case.link))
        print(progress(case, found[case]), flush=True)
    return found


def progress(case: Case, record: Record) -> str:
    n_bytes, seconds, others = (record[name] for name in ("bytes_per_step_per_worker", "epoch_s", "others_cores"))
    what = f"{n_bytes:,.0f} bytes a step and worker, {seconds:.2f} s an epoch"
    return f"{case.method.name}, {case.link}: {what}, {others:.1f} cores busy otherwise"


def summary(workers: Sequence[Sequence[Record]]) -> Record:
    """Of a turn: the seconds of the slowest worker, and means over the workers of what went through their links."""
    n_steps = sum(epoch["n_steps"] for epoch in workers[0])
    sent, received = (
        statistics.fmean(sum(epoch[direction] for epoch in epochs) for epochs in workers)
        for direction in ("sent", "received")
    )
    more = {name: value for name, value in workers[0][0].items() if name.endswith(("all_reduce_s", "network_bytes"))}
    return {
        # The first epoch of a branch takes longer; of a turn with several, each branch's was the first in one only.
        "epoch_s": max(len(epochs) * statistics.median(epoch["epoch_s"] for epoch in epochs) for epochs in workers),
        "steps_per_epoch": n_steps,
        "bytes_per_step_per_worker": sent / n_steps,
        "received_per_step_per_worker": received / n_steps,
        "others_cores": others_cores(workers),
    } | more


def others_cores(workers: Sequence[Sequence[Record]]) -> float:
    """How many cores were busy with other work than these workers', while the first of them trained."""
    ours_s = sum(epoch["cpu_s"] for epochs in workers for epoch in epochs)
    all_s, wall_s = (sum(epoch[name] for epoch in workers[0]) for name in ("all_cpu_s", "epoch_s"))
    return max(0.0, (all_s - ours_s) / wall_s)
