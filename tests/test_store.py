"""A slice store holds what a direct split gives, and says when it does not."""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stl_lightning.__main__ import main
from stl_lightning.errors import ConfigError, StoreError
from stl_lightning.images import as_float
from stl_lightning.sources import SPLITS, open_source
from stl_lightning.spectral import TRANSFORMS, SpectralSplit
from stl_lightning.store import DTYPES, Store, open_store, prepare_store, ranges, verify
from stl_lightning.store.encoding import LEVELS, best_scale, decode, encode

CHECKOUT = Path(__file__).resolve().parent.parent
CONFIG = ["--config", str(CHECKOUT / "configs" / "digits.yaml")]

Capture = pytest.CaptureFixture[str]


def split_of(transform: str = "dct2", block: int | tuple[int, int] = 2, **settings: Any) -> SpectralSplit:
    source = open_source("digits")
    split = SpectralSplit(source.image_shape, block, transform=transform, **settings)
    return split.fit(as_float(source.load("train").fetch(torch.arange(500))))


def prepared(folder: Path, split: SpectralSplit | None = None, dtype: str = "float32", n_workers: int = 1) -> Store:
    prepare_store(folder, open_source("digits"), split or split_of(), dtype, val_size=0.1, n_workers=n_workers)
    return open_store(folder)


def direct(split: SpectralSplit, part: str) -> list[Tensor]:
    images = open_source("digits").load(part)
    return split(as_float(images.fetch(torch.arange(len(images)))))


def hashes(store: Store) -> dict[str, str]:
    return {name: facts.sha256 for name, facts in store.manifest.files.items()}


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that even digits are many ranges, whose workers finish in any order."""
    monkeypatch.setattr(ranges, "RANGE_BYTES", 100 * 4 * 64)


# What is stored


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_store_holds_the_slices_of_a_direct_split(transform: str, tmp_path: Path, short_ranges: None) -> None:
    split = split_of(transform, (2, 4))
    store = prepared(tmp_path / "store", split, n_workers=2)
    for part in SPLITS:
        for k, expected in enumerate(direct(split, part)):
            stored = store.slice(part, k)
            torch.testing.assert_close(stored.values, expected, atol=1e-6, rtol=0)
            assert torch.equal(stored.gather(torch.tensor([7, 3, 3])), stored.values[[7, 3, 3]])
            assert len(stored) == store.manifest.n_images(part)
        assert torch.equal(store.labels(part), open_source("digits").load(part).labels)
    assert torch.equal(store.matrix, split.matrix)
    assert store.source.class_names == open_source("digits").class_names


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_is_as_near_as_its_steps_allow(dtype: str, tmp_path: Path) -> None:
    split = split_of()
    store = prepared(tmp_path / "store", split, dtype)
    for k, expected in enumerate(direct(split, "train")):
        stored = store.slice("train", k)
        read = stored.gather(torch.arange(len(expected)))
        assert read.dtype == torch.float32
        assert stored.values.dtype == DTYPES[dtype]
        if stored.scale is None:
            torch.testing.assert_close(read, expected, atol=1e-6, rtol=torch.finfo(DTYPES[dtype]).eps)
            continue
        clipped = expected.abs() > (LEVELS + 0.5) * stored.scale
        assert (read - expected)[~clipped].abs().max() <= 0.5001 * stored.scale.max()
        assert torch.equal(stored.values[clipped].abs(), torch.full_like(stored.values[clipped], LEVELS))


def test_the_step_of_int8_is_the_best_there_is() -> None:
    """No step nearby loses less; and heavy tails are worth clipping: the largest value would cost much more."""
    sample = torch.randn(200, 2, 30, 30, generator=torch.Generator().manual_seed(0)) ** 3
    sample *= torch.tensor([1.0, 50.0])[:, None, None]

    def loss(scale: Tensor) -> Tensor:
        return (decode(encode(sample, torch.int8, scale), scale) - sample).square().mean((0, 2, 3))

    chosen = best_scale(sample)
    for factor in (0.5, 0.8, 1.25, 2.0):
        assert (loss(chosen * factor) > loss(chosen)).all()
    by_peak = sample.abs().amax((0, 2, 3))[:, None, None] / LEVELS
    assert (loss(by_peak) > 1.2 * loss(chosen)).all()
    assert chosen[1] == pytest.approx(50 * chosen[0], rel=0.3)


def test_statistics_are_those_of_the_training_slices(tmp_path: Path, short_ranges: None) -> None:
    split = split_of("dft", (1, 4))
    facts = prepared(tmp_path / "store", split, "int8", n_workers=2).manifest.slices
    slices = direct(split, "train")
    for row, x in zip(facts, slices, strict=True):
        torch.testing.assert_close(torch.tensor(row.mean), x.mean((0, 2, 3)), atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(row.std), x.std((0, 2, 3), correction=0), atol=1e-5, rtol=0)
    pixels = as_float(open_source("digits").load("train").pixels)
    assert sum(row.energy for row in facts) == pytest.approx(float(pixels.square().sum()) / len(pixels), rel=1e-5)
    clipped = sum(
        int((x.abs() > (LEVELS + 0.5) * torch.tensor(row.scale)[:, None, None]).sum())
        for part in SPLITS
        for row, x in zip(facts, direct(split, part), strict=True)
    )
    assert sum(row.n_clipped for row in facts) == clipped


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, short_ranges: None) -> None:
    one, two = (prepared(tmp_path / f"{n}", n_workers=n) for n in (1, 2))
    assert one.manifest.files == two.manifest.files
    assert one.manifest.slices == two.manifest.slices


def test_writing_to_a_tensor_does_not_reach_the_file(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.slice("train", 0).values.fill_(3)
    assert verify(store.paths.folder) == []
    assert not torch.equal(store.slice("train", 0).values[:1], torch.full((1, 1, 4, 4), 3.0))


# What is refused


def flip_byte(path: Path, offset: int = 5000) -> None:
    """One bit, with size and time of the file as they were."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_flipped_byte_is_found(tmp_path: Path, capsys: Capture) -> None:
    store = prepared(tmp_path / "store")
    flip_byte(store.paths.slice("train", 2))
    flip_byte(store.paths.labels("test"), 200)
    assert verify(store.paths.folder) == ["test/labels.npy", "train/slice-02.npy"]
    assert verify(store.paths.folder, [0]) == ["test/labels.npy"]
    with pytest.raises(StoreError, match=r"slice-02\.npy.*damaged.*stl prepare"):
        store.slice("train", 2)
    store.slice("train", 1)
    assert main(["verify", str(store.paths.folder), "--slices", "1,2"]) == 1
    assert "damaged: train/slice-02.npy" in capsys.readouterr().err
    flip_byte(store.paths.labels("test"), 200)
    assert main(["verify", str(store.paths.folder), "--slices", "0,1"]) == 0


def test_files_of_another_size_and_missing_ones(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.paths.slice("train", 3).unlink()
    open_store(store.paths.folder).slice("train", 0)  # a rank needs no slice but its own
    assert verify(store.paths.folder) == ["train/slice-03.npy"]
    with pytest.raises(StoreError, match=r"slice-03\.npy"):
        store.slice("train", 3)
    with store.paths.slice("train", 1).open("ab") as file:
        file.write(b"more")
    with pytest.raises(StoreError, match=r"sizes.*slice-01\.npy"):
        open_store(store.paths.folder)


def test_a_damaged_manifest_and_one_of_another_version(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    path = store.paths.manifest
    text = path.read_text()
    path.write_text(text.replace('"n_test": 3', '"n_test": 2'))
    assert path.read_text() != text
    with pytest.raises(StoreError, match="damaged"):
        open_store(store.paths.folder)
    path.write_text(text[:1000])
    with pytest.raises(StoreError, match="damaged"):
        open_store(store.paths.folder)
    path.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(StoreError, match="version 1, received 99"):
        open_store(store.paths.folder)


def test_no_store_and_no_such_slice(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"data\.store.*stl prepare"):
        open_store(tmp_path / "nowhere")
    store = prepared(tmp_path / "store")
    with pytest.raises(ConfigError, match=r"0\.\.3"):
        store.slice("train", 4)
    with pytest.raises(ConfigError, match="test, train"):
        store.slice("val", 0)
    with pytest.raises(ConfigError, match="--slices"):
        verify(store.paths.folder, [4])
    with pytest.raises(StoreError, match=r"data\.store=null"):
        store.source.load("train")


SETTINGS = {"source": "digits", "block": 2, "transform": "dct2", "reorganisation": "polyphase", "pad": None}
OTHER = {
    "source": "mnist", "block": (1, 4), "transform": "dct", "reorganisation": "tiles", "pad": "zeros", "image_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER)
def test_a_run_of_other_settings_is_told_which(key: str, tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    store.check(SETTINGS | {"seed": 3, "val_size": 0.3, "batch_size": 9})  # a store serves every seed and split
    with pytest.raises(StoreError, match=rf"settings: {key} is .* there and .* here.*data\.store") as raised:
        store.check(SETTINGS | {key: OTHER[key]})
    assert str(raised.value).count(" there and ") == 1


@pytest.mark.parametrize(
    ("transform", "matters"), [("random", {"seed"}), ("klt", {"seed", "val_size"}), ("dct", set())]
)
def test_what_the_matrix_depends_on_must_agree(transform: str, matters: set[str], tmp_path: Path) -> None:
    store = prepared(tmp_path / "store", split_of(transform, seed=1))
    same = SETTINGS | {"transform": transform, "seed": 1, "val_size": 0.1}
    store.check(same)
    for key, other in {"seed": 2, "val_size": 0.2}.items():
        if key in matters:
            with pytest.raises(StoreError, match=key):
                store.check(same | {key: other})
            with pytest.raises(StoreError, match=f"{key} is .* there and None here"):
                store.check({name: value for name, value in same.items() if name != key})
        else:
            store.check(same | {key: other})


def test_other_settings_for_the_same_folder(tmp_path: Path) -> None:
    store = prepared(tmp_path / "store")
    with pytest.raises(StoreError, match="transform is 'dct2' there and 'haar' here"):
        prepared(tmp_path / "store", split_of("haar"))
    with pytest.raises(StoreError, match="dtype is 'float32' there and 'int8' here"):
        prepared(tmp_path / "store", dtype="int8")
    with pytest.raises(ConfigError, match="float16, float32, int8"):
        prepared(tmp_path / "other", dtype="int4")
    assert verify(store.paths.folder) == []
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose this")
    with pytest.raises(StoreError, match="received other files"):
        prepared(tmp_path / "mine")


# Killed, filled up, at once


# The commands


def test_the_commands(tmp_path: Path, capfd: Capture) -> None:
    folder = str(tmp_path / "store")
    args = [*CONFIG, "--data.transform=klt", "--data.store", folder, "--workers=1", "--dtype=float16"]
    assert main(["prepare", *args]) == 0
    assert re.search(r"written: .*store \(4 slices of \d+ \+ \d+ images, 0\.000 GB", capfd.readouterr().out)
    assert main(["prepare", *args]) == 0
    assert "is complete" in capfd.readouterr().out
    assert main(["prepare", *args, "--data.val_size=77"]) == 2
    assert "val_size is" in capfd.readouterr().err
    store = open_store(folder)
    assert store.dtype == "float16"
    assert (store.matrix @ store.matrix.T - torch.eye(4)).abs().max() < 1e-5
    assert main(["verify", folder]) == 0
    assert "all files are intact" in capfd.readouterr().out
    for bad, said in {"--workers=0": "--workers", "--dtype=bf16": "float16, float32, int8"}.items():
        assert main(["prepare", *args, bad]) == 2
        assert said in capfd.readouterr().err
    assert main(["prepare", *CONFIG]) == 2
    assert "data.store" in capfd.readouterr().err
    assert main(["verify", folder, "--slices=a"]) == 2


@pytest.mark.parametrize("command", ["prepare", "verify"])
def test_help_needs_nothing_heavy(command: str) -> None:
    code = f"""
        import contextlib
        from stl_lightning.__main__ import main
        with contextlib.suppress(SystemExit):
            main([{command!r}, "--help"])
        sys.exit("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", "import sys" + textwrap.dedent(code)], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert f"usage: stl {command}" in done.stdout
