"""From single trainings to rows: medians over the repetitions, and efficiency against one worker."""

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.compare import spread

from networking.measure import Case, Repetition
from networking.work import N_WORKERS, Record

DEFINITION = {
    "share of a core": "while it trains, each worker has `cores_per_worker` of a core, never more and never less: a "
    "CPU quota in periods of 4 ms, with precedence before other work; worker i is pinned to core i mod (number of "
    "cores), with one thread. All four run at once in every row: for `one worker` four independent copies each do "
    "the work of one, so that caches and memory are shared as elsewhere",
    "memory": "glibc gives none back (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_): page faults depend on chance",
    "epoch": "one pass over all images. Conventional network: each of four workers trains on its quarter, with a "
    "quarter of the batch (strong scaling). Spectral: all four branches, each on all images, a branch a worker; the "
    "one worker trains the branches one after the other. Without validation, checkpoints and evaluation",
    "turns": "all methods are set up at once, each on four nodes of its own, and take turns of an epoch; in each of n "
    "repetitions each has one turn on each link. The first turn warms up and is not counted: an epoch of a branch, "
    "n_warm_steps of the conventional network, in which PowerSGD and local SGD exchange all gradients, as torch's "
    "hooks do until they start",
    "epoch_s": "wall-clock seconds of the slowest worker, the median of n repetitions; `spread` is the median absolute "
    "deviation",
    "efficiency": "epoch_s of one worker / (number of workers x epoch_s), in each repetition, then the median",
    "bytes_per_step_per_worker": "sent: growth of tx_bytes of the worker's eth0 from the beginning to the end of the "
    "epoch, divided by the steps; mean over the workers, median of n repetitions. received_...: the same of rx_bytes. "
    "They include Ethernet, IP and TCP headers (a packet may be larger than a frame: segmentation is offloaded), "
    "acknowledgements and ARP; IPv6 and multicast are off, so that an unused link counts exactly 0. Not in it: file "
    "system, loopback",
    "bytes_whole_process": "sent and received by a worker from before its process was started until it had ended, on "
    "all links: with the rendezvous, the warm-up and, of ddp, the all-reduces that are timed for the model",
    "others_cores": "cores that were busy with something else, by the kernel's counters; its work for the network is "
    "in it",
}
MEDIANS = (
    "epoch_s", "bytes_per_step_per_worker", "received_per_step_per_worker", "bytes_whole_process", "others_cores",
)  # fmt: skip


def efficiency(one_worker_s: float, seconds: float, n_workers: int) -> float:
    """Of four workers, 1 means that they are four times as fast as one."""
    return one_worker_s / (n_workers * seconds)


def rows(repetitions: Sequence[Repetition]) -> list[Record]:
    return [row(case, repetitions) for case in repetitions[0]]


def row(case: Case, repetitions: Sequence[Repetition]) -> Record:
    records = [repetition[case] for repetition in repetitions]
    n_workers = 1 if case.method.alone else N_WORKERS
    ones = [repetition[case.one_worker]["epoch_s"] for repetition in repetitions]
    seconds = [record["epoch_s"] for record in records]
    efficiencies = [efficiency(one, s, n_workers) for one, s in zip(ones, seconds, strict=True)]
    medians: dict[str, Any] = {name: statistics.median(record[name] for record in records) for name in MEDIANS}
    return {
        "method": case.method.name,
        "link": case.link,
        "n_workers": n_workers,
        **medians,
        "spread": spread(seconds),
        "efficiency": statistics.median(efficiencies),
        "spread_efficiency": spread(efficiencies),
        "n": len(records),
        "steps_per_epoch": records[0]["steps_per_epoch"],
        "step_s": medians["epoch_s"] / records[0]["steps_per_epoch"],
    }
