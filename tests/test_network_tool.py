"""`tools/network`: the model on paper, the rows, and bytes that the kernel counted on real links."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
TOOL = CHECKOUT / "tools" / "network"
KEPT = CHECKOUT / "tools" / "results" / "network.json"
sys.path.append(str(TOOL.parent))

from networking import model  # noqa: E402
from networking.cores import Share  # noqa: E402
from networking.crew import Method, spectral_config  # noqa: E402
from networking.measure import CASES, ONE_WORKER, Case, summary  # noqa: E402
from networking.nodes import LINKS, Nodes, Traffic, Unavailable, parse_traffic  # noqa: E402
from networking.rows import efficiency, rows  # noqa: E402
from networking.table import markdown  # noqa: E402
from networking.work import EpochLog, Work  # noqa: E402

NETWORK = model.Network(bytes_per_s=12.5e6, latency_s=1e-4)
WORK = {"network_bytes": 2_500_000, "bucket_mb": 1.0, "local_sgd_period": 4, "powersgd_rank": 1}
COMPUTE_S = 0.5


def ring_bytes(n_nodes: int, n_bytes: int) -> int:
    """What each node sends in a ring, found by passing the parts on until everyone has the sum of all of them."""
    part = n_bytes // n_nodes
    summed = [[{node} for _ in range(n_nodes)] for node in range(n_nodes)]  # node, part -> whose are in the sum
    n_sent = 0
    while any(len(sum_of) < n_nodes for node in summed for sum_of in node):
        passed = [(node, (node - n_sent) % n_nodes) for node in range(n_nodes)]
        news = [(node, place, set(summed[node][place])) for node, place in passed]
        for node, place, sum_of in news:
            summed[(node + 1) % n_nodes][place] |= sum_of
        n_sent += 1
    return n_sent * part


@pytest.mark.parametrize("n_nodes", [2, 4, 16])
def test_bytes_of_a_ring(n_nodes: int) -> None:
    n_bytes = 4800 * n_nodes
    assert model.ring_factor(n_nodes) * n_bytes == ring_bytes(n_nodes, n_bytes)


@pytest.mark.parametrize("n_nodes", [4, 16])
def test_the_link_is_found_from_two_all_reduces(n_nodes: int) -> None:
    seconds = NETWORK.ring_s(1_000_000, n_nodes), NETWORK.ring_s(0, n_nodes)
    found = model.Network.from_all_reduce(1_000_000, *seconds, n_nodes)
    assert (found.bytes_per_s, found.latency_s) == pytest.approx((NETWORK.bytes_per_s, NETWORK.latency_s))


def synthetic_rows(n_workers: int = 4) -> list[dict[str, Any]]:
    """Rows of workers that do nothing but what the model takes for granted."""
    n_bytes = {"spectral": 0, "ddp": 3_750_000, "powersgd": 60_000, "local-sgd": 937_500}
    found = []
    for method, sent in n_bytes.items():
        row = {"method": method, "link": "100 Mbit/s", "n_workers": n_workers, "bytes_per_step_per_worker": sent}
        exchange_s = model.exchange_of(row, WORK).seconds(NETWORK, n_workers, only_ring=True)
        found.append(row | {"step_s": COMPUTE_S + exchange_s})
    controls = ("no exchange", "spectral, one worker")
    return found + [{"method": method, "link": "unshaped", "step_s": COMPUTE_S} for method in controls]


def test_the_model_agrees_with_what_it_assumes() -> None:
    checks = model.checks(synthetic_rows(), {"100 Mbit/s": NETWORK}, WORK)
    assert [check["relative_error"] for check in checks] == pytest.approx([0] * 4)
    measured = {check["method"]: check["measured_step_s"] for check in checks}
    # 100 Mbit/s carry 3.75 MB in 0.3 s; three buckets take 6 steps of 0.1 ms each.
    assert measured["ddp"] == pytest.approx(COMPUTE_S + 0.3 + 3 * 6 * 1e-4)
    assert measured["local-sgd"] == pytest.approx(COMPUTE_S + (0.3 + 6 * 1e-4) / 4)
    assert measured["spectral"] == COMPUTE_S


def test_more_nodes_and_faster_ones_wait_longer_but_for_spectral_training() -> None:
    found = model.modelled(synthetic_rows(), {"100 Mbit/s": NETWORK}, WORK)
    for method in ("ddp", "powersgd", "local-sgd"):
        for faster in model.FASTER:
            same = [row for row in found if (row["method"], row["faster"]) == (method, faster)]
            assert [row["n_nodes"] for row in same] == list(model.N_NODES)
            efficiencies = [row["efficiency"] for row in same]
            assert efficiencies == sorted(efficiencies, reverse=True)
            assert 0 < efficiencies[-1] < efficiencies[0] < 1
            assert all(row["efficiency"] <= row["overlapped_efficiency"] <= 1 for row in same)
        at_16 = [row["efficiency"] for row in found if (row["method"], row["n_nodes"]) == (method, 16)]
        assert at_16[0] > at_16[1]
    assert {row["efficiency"] for row in found if row["method"] == "spectral"} == {1.0}


def test_the_latency_is_the_least_that_was_seen() -> None:
    busy = model.Network(NETWORK.bytes_per_s, 3 * NETWORK.latency_s)
    said = model.carried(synthetic_rows(), {"100 Mbit/s": busy, "1 Gbit/s": NETWORK}, WORK)
    assert said["modelled"] == model.modelled(synthetic_rows(), {"100 Mbit/s": NETWORK}, WORK)


def test_small_messages_take_the_tree() -> None:
    n_nodes = 1024
    small, large = model.Exchange(100, 1), model.Exchange(1e9, 1)
    assert small.seconds(NETWORK, n_nodes) == NETWORK.tree_s(100, n_nodes) < NETWORK.ring_s(100, n_nodes)
    assert large.seconds(NETWORK, n_nodes) == NETWORK.ring_s(1e9, n_nodes) < NETWORK.tree_s(1e9, n_nodes)


def test_exchange_hides_in_the_backward_pass_only_as_far_as_it_fits() -> None:
    hidden, after = model.Exchange(1, 1, overlaps=True), model.Exchange(1, 1)
    assert model.overlapped_step_s(0.3, 0.2, hidden) == pytest.approx(0.3)
    assert model.overlapped_step_s(0.3, 0.25, hidden) == pytest.approx(0.35)
    assert model.overlapped_step_s(0.3, 0.25, after) == pytest.approx(0.55)


def record(epoch_s: float, sent: float = 0.0) -> dict[str, Any]:
    numbers = {"received_per_step_per_worker": sent, "bytes_whole_process": 2 * sent, "others_cores": 0.1}
    return {"epoch_s": epoch_s, "bytes_per_step_per_worker": sent, "steps_per_epoch": 4} | numbers


def test_rows() -> None:
    case = Case(Method("ddp"), "1 Gbit/s")
    # The machine was half as fast in the third repetition, for both.
    repetitions = [{case: record(a, 15.0), ONE_WORKER: record(b)} for a, b in ((1, 3), (1.5, 3), (2, 8))]
    ddp, one = rows(repetitions)
    assert (ddp["epoch_s"], ddp["spread"], ddp["n"], ddp["step_s"]) == (1.5, 0.5, 3, 0.375)
    assert (ddp["efficiency"], ddp["spread_efficiency"]) == (0.75, 0.25)  # of 0.75, 0.5, 1
    assert ddp["bytes_per_step_per_worker"] == 15
    assert (one["efficiency"], one["n_workers"]) == (1, 1)
    assert efficiency(one_worker_s=4, seconds=1, n_workers=4) == 1


def test_counters_of_a_link() -> None:
    text = Path("/proc/self/net/dev").read_text().splitlines()[:2]
    text += ["    lo: 9 9 0 0 0 0 0 0 9 9 0 0 0 0 0 0", "  eth0: 1200 3 0 0 0 0 0 0 3400 5 0 0 0 0 0 0"]
    assert parse_traffic("\n".join(text), "eth0") == Traffic(sent=3400, received=1200)
    assert parse_traffic("\n".join(text[:3]), "eth0") == Traffic(0, 0)


def test_a_worker_takes_turns_of_two_epochs(tmp_path: Path) -> None:
    log = EpochLog(tmp_path, worker=3, epochs_per_turn=2)
    log.prepare()

    def train() -> None:
        for n_steps in (5, 6, 7):
            log.begin()
            log.end(n_steps)
            log.note({"more": 1})

    worker = threading.Thread(target=train)
    worker.start()
    try:
        for n_noted in (2, 3):
            time.sleep(0.05)
            assert len(log.read()) < n_noted
            log.pipe.open("w").close()  # lets it go
            wait_until(lambda n_noted=n_noted: len(log.read()) == n_noted)
    finally:
        worker.join(10)
    assert [epoch["n_steps"] for epoch in log.read()] == [5, 6, 7]
    assert {epoch["more"] for epoch in log.read()} == {1}


def wait_until(is_true: Callable[[], bool], timeout_s: float = 10) -> None:
    end_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_summary_of_a_turn() -> None:
    def epoch(epoch_s: float, sent: int) -> dict[str, Any]:
        cpu = {"cpu_s": 0.25 * epoch_s, "all_cpu_s": 1.5 * epoch_s}
        return {"epoch_s": epoch_s, "n_steps": 5, "sent": sent, "received": 2 * sent} | cpu

    found = summary([[epoch(2.0, 10), epoch(2.0, 10)], [epoch(1.0, 20), epoch(1.0, 20)]])
    assert (found["epoch_s"], found["steps_per_epoch"]) == (4.0, 10)  # the slower worker, both epochs
    assert (found["bytes_per_step_per_worker"], found["received_per_step_per_worker"]) == (3, 6)
    assert found["others_cores"] == pytest.approx(1.5 - 0.25 - 0.125)


def test_both_networks_have_as_many_weights(tmp_path: Path) -> None:
    """Pooling costs none, so the conventional network is as large as a branch: the same convolutions."""
    from stl_lightning.networks import ConvNet

    work = Work.quick("images.npz")
    network = spectral_config(work, tmp_path, "run", 1, 1)["model"]["network"]["init_args"]
    sizes = [
        sum(weight.numel() for weight in ConvNet((3, side, side), 10, widths).parameters())
        for side, widths in ((16, network["widths"]), (32, work.baseline_widths))
    ]
    assert sizes[0] == sizes[1]


@pytest.fixture
def tool() -> ModuleType:
    loader = SourceFileLoader("network", str(TOOL))
    spec = spec_from_loader("network", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_without_root_it_says_so(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match=r"need root.*user 1000.*sudo"):
        tool.main(["--quick"])


def test_what_was_kept(tool: ModuleType) -> None:
    kept = json.loads(KEPT.read_text())
    assert {(row["method"], row["link"]) for row in kept["rows"]} == {(case.method.name, case.link) for case in CASES}
    for row in kept["rows"]:
        silent = row["method"] not in ("ddp", "powersgd", "local-sgd")
        assert (row["bytes_per_step_per_worker"] == row["received_per_step_per_worker"] == 0) is silent
        assert row["n"] >= 3
    again = tool.kept(KEPT)  # the model has not changed since
    assert json.loads(json.dumps(again)) == kept
    lines = markdown(kept).splitlines()
    assert all(line.count("|") in (7, 9) for line in lines if line)
    assert sum("| 100 Mbit/s |" in line for line in lines) == 2 * 4


def needs_namespaces() -> None:
    try:
        with Nodes(1) as nodes:
            nodes.shape(LINKS["1 Gbit/s"])
    except Unavailable as reason:
        pytest.skip(f"no network namespaces: {reason}")


def command(*options: str) -> list[str]:
    return [sys.executable, str(TOOL), "--quick", *options]


def left_behind(pid: int) -> list[str]:
    return [path.name for path in Path("/run/netns").glob(f"stl-network-{pid}*")]


BUSY = (
    "import time; end_s = time.perf_counter() + 1\nwhile time.perf_counter() < end_s: pass\nprint(time.process_time())"
)


def test_a_part_of_a_core() -> None:
    try:
        share = Share(f"stl-network-test-{os.getpid()}")
    except OSError as reason:
        pytest.skip(f"no CPU controller: {reason}")
    try:
        share.limit(0.2)
        process = subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE)
        share.join(process.pid)
        assert 0.1 < float(process.communicate()[0]) < 0.3
    finally:
        share.remove()
    assert not share.folder.exists()


@pytest.fixture(scope="module")
def quick(
    tmp_path_factory: pytest.TempPathFactory, real_data: Callable[[str], Path]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What a trial measured: the rows by method and link, and the whole record."""
    needs_namespaces()
    out = tmp_path_factory.mktemp("network") / "network.json"
    process = subprocess.Popen(
        command("--data-root", str(real_data("cifar10")), "--out", str(out)),
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said, _ = process.communicate(timeout=400)
    assert process.returncode == 0, said
    assert left_behind(process.pid) == []
    found = json.loads(out.read_text())
    return {(row["method"], row["link"]): row for row in found["rows"]} | {("all", ""): found}


LINK = "1 Gbit/s"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spectral", "spectral, one worker", "no exchange", "one worker"])
def test_who_exchanges_nothing_sends_not_a_byte(quick: dict[tuple[str, str], dict[str, Any]], method: str) -> None:
    row = quick[method, LINK if method == "spectral" else "unshaped"]
    counters = ("bytes_per_step_per_worker", "received_per_step_per_worker", "bytes_whole_process")
    assert [row[counter] for counter in counters] == [0, 0, 0]
    assert row["steps_per_epoch"] == (16 if method == "spectral, one worker" else 4)


@pytest.mark.slow
def test_ddp_sends_what_a_ring_sends(quick: dict[tuple[str, str], dict[str, Any]]) -> None:
    """Theory: 2 (N - 1) / N of the gradients' bytes, and a few percent of headers and acknowledgements."""
    n_bytes = model.ring_factor(4) * quick["all", ""]["work"]["network_bytes"]
    row = quick["ddp", LINK]
    assert n_bytes < row["bytes_per_step_per_worker"] < 1.06 * n_bytes
    assert n_bytes < row["received_per_step_per_worker"] < 1.06 * n_bytes


@pytest.mark.slow
def test_compression_and_local_steps_send_less(quick: dict[tuple[str, str], dict[str, Any]]) -> None:
    sent = {method: quick[method, LINK]["bytes_per_step_per_worker"] for method in ("ddp", "powersgd", "local-sgd")}
    assert sent["local-sgd"] == pytest.approx(sent["ddp"] / WORK["local_sgd_period"], rel=0.03)
    assert 0 < sent["powersgd"] < sent["ddp"] / 4


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
def test_nothing_is_left_when_it_is_ended(real_data: Callable[[str], Path], tmp_path: Path, moment: str) -> None:
    needs_namespaces()
    process = subprocess.Popen(
        command("--data-root", str(real_data("cifar10"))),
        env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    marks = {"starting": "*/*/worker-3.log", "training": "*/*/epochs-3.jsonl"}
    try:
        wait_until(
            lambda: any(mark.stat().st_size or moment == "starting" for mark in tmp_path.glob(marks[moment])), 200
        )
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 4
        assert len(left_behind(process.pid)) >= 5
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert left_behind(process.pid) == []
    assert not [worker for worker in workers if worker.is_running()]
    assert list(tmp_path.glob("tmp*")) == []
