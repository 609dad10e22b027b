"""A model on paper: what was measured on four nodes, carried to more.

Weak scaling: each node keeps its batch, its share of a core and its link, so it computes as long as before in each
step, and what it exchanges takes longer. Nothing is said of accuracy, nor of how many branches an image can be split
into: spectral training has a branch a node.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]

N_NODES = (4, 16, 64, 256, 1024)
FASTER = (1, 50)  # as measured, and a worker that computes so many times as fast
# Two of the three matrix products of each layer are in the backward pass, during which DDP can exchange gradients.
BACKWARD = 2 / 3
ASSUMPTIONS = {
    "scaling": "weak: each node keeps its batch, its share of a core and its link; compute_s a step is that of four "
    "workers without exchange (spectral: of one worker that trains the branches in turn), at every number of nodes",
    "all-reduce": "of S bytes on N nodes, the faster of a ring, 2 (N - 1) / N S / bandwidth + 2 (N - 1) latency, and a "
    "tree, 2 log2(N) (S / bandwidth + latency); on four nodes the ring, which is gloo's",
    "bandwidth": "of a node's link, whatever the others do: the switch never limits; from an all-reduce of the size "
    "of the network, measured with nothing else to do",
    "latency": "of a step of the ring: that of an all-reduce of 4 bytes on four nodes, divided by 6; the least of all "
    "links, since the wait for a busy processor is in it and the link's rate is not",
    "step": "compute_s + exchange; overlapped, where gradients are exchanged in the backward pass: "
    "compute_s / 3 + max(2/3 compute_s, exchange). The truth lies between: step_s is the upper bound",
    "faster": "compute_s is divided by it: 1 is the worker that was measured, 50 about a node of 16 cores instead of "
    "0.3 of a core, that divides its batch among them without loss",
    "efficiency": "compute_s / step_s",
    "spectral": "exchanges nothing",
}


@dataclass(frozen=True)
class Network:
    """What connects the nodes: the bandwidth of each link, and the seconds that a message takes besides."""

    bytes_per_s: float
    latency_s: float

    @classmethod
    def from_all_reduce(cls, n_bytes: float, all_reduce_s: float, tiny_all_reduce_s: float, n_nodes: int) -> "Network":
        """From the seconds of an all-reduce of `n_bytes` and of one of next to nothing, both in a ring."""
        bytes_per_s = ring_factor(n_nodes) * n_bytes / (all_reduce_s - tiny_all_reduce_s)
        return cls(bytes_per_s, tiny_all_reduce_s / (2 * (n_nodes - 1)))

    def ring_s(self, n_bytes: float, n_nodes: int) -> float:
        """Seconds of an all-reduce in a ring: each node sends its neighbour 2 (N - 1) parts of S / N bytes."""
        return ring_factor(n_nodes) * n_bytes / self.bytes_per_s + 2 * (n_nodes - 1) * self.latency_s

    def tree_s(self, n_bytes: float, n_nodes: int) -> float:
        """Seconds of an all-reduce up and down a binary tree."""
        return 2 * math.log2(n_nodes) * (n_bytes / self.bytes_per_s + self.latency_s)


@dataclass(frozen=True)
class Exchange:
    """What a method all-reduces in one step: S bytes of each node's in `n_calls` calls (both may be fractions).

    `overlaps`: in the backward pass, and not after it.
    """

    n_bytes: float = 0.0
    n_calls: float = 0.0
    overlaps: bool = False

    def seconds(self, network: Network, n_nodes: int, only_ring: bool = False) -> float:
        if self.n_calls == 0:
            return 0.0
        each = self.n_bytes / self.n_calls
        ring = network.ring_s(each, n_nodes)
        return self.n_calls * (ring if only_ring else min(ring, network.tree_s(each, n_nodes)))


def ring_factor(n_nodes: int) -> float:
    """Bytes that each node sends, per byte that is all-reduced in a ring."""
    return 2 * (n_nodes - 1) / n_nodes


def step_s(compute_s: float, exchange_s: float) -> float:
    """Nothing is exchanged while anything is computed."""
    return compute_s + exchange_s


def overlapped_step_s(compute_s: float, exchange_s: float, exchange: Exchange) -> float:
    """As much is exchanged in the backward pass as fits into it, where the method can."""
    if not exchange.overlaps:
        return step_s(compute_s, exchange_s)
    return (1 - BACKWARD) * compute_s + max(BACKWARD * compute_s, exchange_s)


def exchange_of(row: Row, work: Row) -> Exchange:
    """From the bytes that a method was seen to send in a step, in a ring of the measured number of workers."""
    n_buckets = math.ceil(work["network_bytes"] / (work["bucket_mb"] * 2**20))
    # PowerSGD exchanges both factors of all matrices, and what is not a matrix.
    n_calls = {"ddp": n_buckets, "powersgd": 3, "local-sgd": 1 / work["local_sgd_period"]}
    if row["method"] not in n_calls:
        return Exchange()
    n_bytes = row["bytes_per_step_per_worker"] / ring_factor(row["n_workers"])
    return Exchange(n_bytes, n_calls[row["method"]], overlaps=row["method"] != "local-sgd")


def carried(rows: Sequence[Row], networks: Mapping[str, Network], work: Row) -> dict[str, Any]:
    """All that the model says, and what it takes for granted; `work`: as in `network.json`."""
    latency_s = min(network.latency_s for network in networks.values())
    networks = {name: Network(network.bytes_per_s, latency_s) for name, network in networks.items()}
    return {
        "assumptions": ASSUMPTIONS,
        "checks": checks(rows, networks, work),
        "modelled": modelled(rows, networks, work),
    }


def checks(rows: Sequence[Row], networks: Mapping[str, Network], work: Row) -> list[dict[str, Any]]:
    """Predicted against measured seconds of a step, with as many workers; errors relative to what was measured."""
    return [check(row, networks[row["link"]], compute_s_of(row, rows), work) for row in rows if row["link"] in networks]


def check(row: Row, network: Network, compute_s: float, work: Row) -> dict[str, Any]:
    exchange = exchange_of(row, work)
    exchange_s = exchange.seconds(network, row["n_workers"], only_ring=True)
    predicted = step_s(compute_s, exchange_s), overlapped_step_s(compute_s, exchange_s, exchange)
    return {
        "method": row["method"],
        "link": row["link"],
        "measured_step_s": row["step_s"],
        "step_s": predicted[0],
        "overlapped_step_s": predicted[1],
        "relative_error": predicted[0] / row["step_s"] - 1,
        "overlapped_relative_error": predicted[1] / row["step_s"] - 1,
    }


def modelled(rows: Sequence[Row], networks: Mapping[str, Network], work: Row) -> list[dict[str, Any]]:
    """Seconds of a step and efficiency of every measured method, on each number of nodes, for each link and speed."""
    return [
        modelled_row(row, networks[row["link"]], compute_s_of(row, rows), work, n_nodes, faster)
        for row in rows
        if row["link"] in networks
        for faster in FASTER
        for n_nodes in N_NODES
    ]


def modelled_row(
    row: Row, network: Network, compute_s: float, work: Row, n_nodes: int, faster: float = 1
) -> dict[str, Any]:
    exchange, compute_s = exchange_of(row, work), compute_s / faster
    exchange_s = exchange.seconds(network, n_nodes)
    steps = step_s(compute_s, exchange_s), overlapped_step_s(compute_s, exchange_s, exchange)
    return {
        "method": row["method"],
        "link": row["link"],
        "n_nodes": n_nodes,
        "faster": faster,
        "compute_s": compute_s,
        "exchange_s": exchange_s,
        "step_s": steps[0],
        "overlapped_step_s": steps[1],
        "efficiency": compute_s / steps[0],
        "overlapped_efficiency": compute_s / steps[1],
    }


def compute_s_of(row: Row, rows: Sequence[Row]) -> float:
    """Seconds that a method computes in a step: those of the same workers when they exchange nothing."""
    without = "spectral, one worker" if row["method"] == "spectral" else "no exchange"
    return next(other["step_s"] for other in rows if other["method"] == without)
