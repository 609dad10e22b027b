"""`tools/bench`: turns, ratios and verdicts are right, and what stl is measured against trains as well as stl."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.append(str(TOOLS))

from benchmarks import packages, plain  # noqa: E402
from benchmarks.compare import (  # noqa: E402
    Missing,
    Pair,
    SideError,
    Turn,
    alternate,
    is_met,
    needs,
    only_where,
    row,
    rows,
    spread,
    steadily,
)
from benchmarks.data import generated  # noqa: E402
from benchmarks.stl import no_bfloat16  # noqa: E402
from benchmarks.subjects import SUBJECTS  # noqa: E402
from benchmarks.verdict import compared  # noqa: E402

B, N_INPUTS, N_CLASSES = 3, 24, 4


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module; what it sets for its own process is set back."""
    n_threads = torch.get_num_threads()
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    loader = SourceFileLoader("bench", str(TOOLS / "bench"))
    spec = spec_from_loader("bench", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    yield module
    torch.set_num_threads(n_threads)


def counting(log: Path, name: str) -> Callable[[Turn], None]:
    """A side that writes down when it has its turn; its values are 0, 1, 2, ..."""

    def side(turn: Turn) -> None:
        for number in range(100):
            with log.open("a") as file:
                file.write(name)
            turn.done(number)

    return side


def test_sides_take_turns_and_warm_rounds_are_not_kept(tmp_path: Path) -> None:
    log = tmp_path / "log"
    values = alternate({name: counting(log, name) for name in "abc"}, repetitions=3, threads=1)
    assert values == {name: [1, 2, 3] for name in "abc"}
    assert log.read_text() == "abc" + "cba" + "abc" + "cba"


def test_the_clock_runs_in_the_own_turn_only() -> None:
    def sleepy(seconds: float, turn: Turn) -> None:
        while True:
            time.sleep(seconds)
            turn.done(turn.seconds())

    values = alternate({"long": partial(sleepy, 0.2), "short": partial(sleepy, 0.01)}, repetitions=2, threads=1)
    assert min(values["long"]) >= 0.2
    assert max(values["short"]) < 0.15


def test_each_side_has_its_threads() -> None:
    def side(turn: Turn) -> None:
        while True:
            turn.done(torch.get_num_threads())

    assert alternate({"a": side}, repetitions=1, threads=2) == {"a": [2]}


def test_rate_of_steady_work() -> None:
    def prepare() -> Callable[[], None]:
        time.sleep(0.2)  # set-up, which is not counted, even where no round is dropped
        return lambda: time.sleep(0.01)

    values = alternate({"a": steadily(5, prepare, at_least_s=0.1)}, repetitions=1, threads=1, n_warm=0)
    assert isinstance(values["a"], list)
    assert 250 < values["a"][0] <= 500


def broken(turn: Turn) -> None:
    raise ValueError("as it happens")


def leaving(turn: Turn) -> None:
    raise SystemExit(2)


def ending(turn: Turn) -> None:
    turn.done(1.0)


@pytest.mark.parametrize(("side", "told"), [(broken, "as it happens"), (leaving, "SystemExit"), (ending, "by itself")])
def test_a_side_that_fails_is_named_with_its_error(side: Callable[[Turn], None], told: str, tmp_path: Path) -> None:
    with pytest.raises(SideError, match=rf"(?s)bad: .*{told}"):
        alternate({"good": counting(tmp_path / "log", "a"), "bad": side}, repetitions=3, threads=1)


def test_what_is_not_installed_is_skipped_with_the_reason(tmp_path: Path) -> None:
    def side(turn: Turn) -> None:
        needs("no_such_package")

    values = alternate({"a": counting(tmp_path / "log", "a"), "b": side}, repetitions=2, threads=1)
    assert values["a"] == [1, 2]
    assert "no_such_package" in row(values, Pair("a", "b"))["skipped"]
    with pytest.raises(Missing, match=r"pip install -e .*bench"):
        needs("no_such_package")


def test_bfloat16_is_skipped_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    side = only_where(partial(no_bfloat16, "cpu"), counting(tmp_path / "log", "a"))
    for has_it, expected in ((True, [1]), (False, "bfloat16 is emulated on this cpu")):
        monkeypatch.setattr("stl_lightning.training.precision.has_bfloat16", lambda _, has_it=has_it: has_it)
        assert alternate({"a": side}, repetitions=1, threads=1)["a"] == expected


def test_a_row() -> None:
    values: dict[str, Any] = {"a": [2.0, 30.0, 5.0], "b": [1.0, 10.0, 1.0]}
    (found,) = rows(values, [Pair("a", "b", "ratio >= 4")], "steps / s", device="cpu")
    # The ratios are 2, 3, 5: the machine was ten times as fast in the second round, for both.
    assert (found["ratio"], found["spread_ratio"], found["median"], found["median_against"]) == (3, 1, 5, 1)
    assert (found["n"], found["met"], found["unit"], found["device"]) == (3, False, "steps / s", "cpu")
    assert spread([1.0, 2.0, 100.0]) == 1


@pytest.mark.parametrize(
    ("goal", "met"), [("ratio >= 2", True), ("ratio >= 2.1", False), ("median <= 0.5", True), ("median <= 0.3", False)]
)
def test_goals(goal: str, met: bool) -> None:
    assert is_met(goal, {"ratio": 2.0, "median": 0.4}) is met


def measurement(ratio: float, better: str = "higher", **more: Any) -> dict[str, Any]:
    return {"subject": "s", "name": "a", "against": "b", "unit": "u", "ratio": ratio, "better": better} | more


@pytest.mark.parametrize(
    ("old", "new", "is_worse"),
    [
        (measurement(1.0), measurement(0.9), False),
        (measurement(1.0), measurement(0.84), True),
        (measurement(1.0), measurement(2.0), False),
        (measurement(1.0, "lower"), measurement(1.1, "lower"), False),
        (measurement(1.0, "lower"), measurement(1.3, "lower"), True),
        (measurement(1.0, device="cpu"), measurement(0.1, device="cuda"), False),
        ({"subject": "s", "name": "a", "against": "b", "skipped": "not here"}, measurement(0.1), False),
    ],
)
def test_what_became_worse(old: dict[str, Any], new: dict[str, Any], is_worse: bool) -> None:
    _, worse = compared([old], [new], tolerance=0.15)
    assert worse == ([new] if is_worse else [])


@pytest.mark.parametrize(("ratio", "code"), [(0.5, 1), (1.0, 0)])
def test_the_exit_code(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    ratio: float, code: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(bench, "measured", lambda given: iter([measurement(ratio)]))
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"quick": False, "rows": [measurement(1.0)]}))
    assert bench.main(["--against", str(old)]) == code
    assert ("WORSE" in capsys.readouterr().out) == bool(code)


@pytest.mark.parametrize(
    ("args", "told"), [(["rank", "ranc"], "ranc"), (["--quick", "--against", "{old}"], "without --quick")]
)
def test_what_the_command_refuses(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"quick": False, "rows": []}))
    with pytest.raises(SystemExit) as left:
        bench.main([part.format(old=old) for part in args])
    assert told in f"{left.value} {capsys.readouterr().err}"


def test_a_failed_subject_leaves_the_others_and_fails(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, rank = (import_module(f"benchmarks.subjects.{name}") for name in ("gpu", "rank"))

    def measure(setting: Any) -> Any:
        yield measurement(1.0, skipped="as an example")
        raise SideError("as it happens")

    monkeypatch.setattr(rank, "measure", measure)
    monkeypatch.setattr(gpu, "measure", lambda setting: iter([measurement(1.0, skipped="as an example")]))
    assert bench.main(["rank", "gpu", "--quick", "--out", str(tmp_path / "new.json")]) == 1
    kept = json.loads((tmp_path / "new.json").read_text())
    assert [row.get("error") for row in kept["rows"]] == [None, "as it happens", None]
    assert {"machine", "versions", "date", "quick", "spread"} <= set(kept)


def test_a_measurement_from_the_command_to_the_file(bench: ModuleType, tmp_path: Path) -> None:
    assert bench.main(["rank", "--quick", "--out", str(tmp_path / "new.json")]) == 0
    (found, *_) = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert found["ratio"] > 0
    assert (found["subject"], found["data"], found["goal"]) == ("rank", "generated", "ratio >= 0.95")


@pytest.mark.slow
def test_every_subject_runs(tmp_path: Path) -> None:
    """In a process of its own, as from the command line: a row of numbers, or why there are none."""
    command = [sys.executable, str(TOOLS / "bench"), "--quick", "--out", str(tmp_path / "new.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "new.json").read_text())["rows"]
    assert {row["subject"] for row in found} == set(SUBJECTS)
    assert all(row.get("ratio", 0) > 0 or "skipped" in row for row in found)


def test_every_subject_is_in_the_table() -> None:
    files = {path.stem for path in (TOOLS / "benchmarks" / "subjects").glob("*.py")} - {"__init__"}
    assert files == set(SUBJECTS)
    assert all(callable(import_module(f"benchmarks.subjects.{name}").measure) for name in SUBJECTS)


def branch_data() -> tuple[Tensor, Tensor]:
    """Slices (b n f) that tell their label (n,), for a few batches of `plain.BATCH`."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(N_CLASSES, (20 * plain.BATCH,), generator=generator)
    noise = torch.randn(B, len(labels), N_INPUTS, generator=generator)
    return noise + 2 * F.one_hot(labels, N_INPUTS), labels


def networks() -> list[nn.Sequential]:
    torch.manual_seed(0)
    return [plain.mlp(N_INPUTS, N_CLASSES, depth=3) for _ in range(B)]


def test_the_bmm_loop_trains_as_the_sequential_loops_do() -> None:
    x, labels = branch_data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    alone, parameters = networks(), plain.bmm_parameters(networks())
    optimizer = plain.adam(tensor for layer in parameters for tensor in layer)
    optimizers = [plain.adam(network.parameters()) for network in alone]
    losses = []
    for _ in range(4):
        losses.append(float(plain.bmm_epoch(parameters, optimizer, x, labels, order)))
        batches = [plain.batches_of(of_branch, labels, order) for of_branch in x]
        single = [plain.epoch(*of) for of in zip(alone, optimizers, batches, strict=True)]
    together = plain.bmm_logits(parameters, x)
    torch.testing.assert_close(together, torch.stack(list(map(nn.Module.__call__, alone, x))), rtol=1e-4, atol=1e-4)
    assert losses[-1] == pytest.approx(float(sum(single)), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def test_the_scripts_slices_are_those_of_the_split() -> None:
    from stl_lightning.spectral import SpectralSplit

    images, labels = torch.rand(plain.BATCH, 1, 28, 28), torch.zeros(plain.BATCH, dtype=torch.int64)
    split = SpectralSplit((1, 28, 28), 4, "raster", "dct")
    standard = (images - 0.1307) / 0.3081
    for k in (0, 5):
        ((found, _),) = plain.slice_batches([(images, labels)], plain.dct_matrix(16), k, torch.device("cpu"))
        torch.testing.assert_close(found, split.slice(standard, k).flatten(1), rtol=1e-4, atol=1e-4)


def test_all_train_networks_of_one_size() -> None:
    from stl_lightning.networks import MLP

    n_branch = sum(p.numel() for p in MLP((1, 7, 7), 10).parameters())
    assert sum(p.numel() for p in plain.mlp().parameters()) == n_branch
    assert sum(p.numel() for layer in plain.bmm_parameters([plain.mlp()] * 16) for p in layer) == 16 * n_branch
    pytest.importorskip("torch_uncertainty", reason="the extra `bench` is not installed")
    assert sum(p.numel() for p in packages.packed_mlp(16).parameters()) == 16 * n_branch


def test_lightning_trains(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    x, labels = branch_data()
    loader = plain.image_loader(x[0], labels)
    module = packages.Classifier(networks()[0])
    before = float(F.cross_entropy(module.network(x[0]), labels))
    seconds = [packages.lightning_epoch(module, loader, str(tmp_path), "cpu") for _ in range(3)]
    assert min(seconds) > 0
    assert float(F.cross_entropy(module.network(x[0]), labels)) < 0.7 * before
    assert len(list(tmp_path.rglob("metrics.csv"))) == 3


def test_torchensemble_trains() -> None:
    pytest.importorskip("torchensemble", reason="the extra `bench` is not installed")
    x, labels = branch_data()
    ensemble = packages.voting_classifier(networks()[0], B, on_gpu=False)
    ensemble.fit(plain.image_loader(x[0], labels), epochs=10, log_interval=10**9, save_model=False)
    assert ensemble.evaluate(plain.image_loader(x[0], labels)) > 60


def test_packed_members_train_apart() -> None:
    pytest.importorskip("torch_uncertainty", reason="the extra `bench` is not installed")
    network = packages.packed_mlp(B, N_INPUTS, N_CLASSES, depth=3)
    first = network(torch.randn(5, N_INPUTS)).unflatten(0, (B, -1))[0]
    first.sum().backward()
    gradient = network[-1].weight.grad
    assert gradient[0].abs().sum() > 0
    assert gradient[1:].abs().sum() == 0


def test_generated_images_are_those_of_the_data_set(tmp_path: Path) -> None:
    data = generated("cifar10", tmp_path, 32)
    pixels, labels = data.load()
    assert (tuple(pixels.shape), tuple(labels.shape)) == ((32, 3, 32, 32), (32,))
    slices, _ = data.sliced("polyphase", 2, "dct")
    assert tuple(slices.shape) == (4, 32, 3, 16, 16)
    torch.testing.assert_close(slices.mean((1, 3, 4)), torch.zeros(4, 3), atol=1e-4, rtol=0)
