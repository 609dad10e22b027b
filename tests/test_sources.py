"""Every source opens, loads and fails as promised; folders decode as torchvision decodes them."""

import itertools
import pickle
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from torchvision.transforms import functional as reference

from stl_lightning.augment import Augment, box_draws, resized_crop_box, uniform
from stl_lightning.augment.draws import BOX, FLIP
from stl_lightning.errors import ConfigError, DataError
from stl_lightning.images import ImageArray, ImageFiles
from stl_lightning.sources import SOURCES, Source, open_source

N_TRAIN, N_TEST, SIZE = 24, 10, 32


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def write_mnist(root: Path, dataset: str = "MNIST", n_classes: int = 10) -> None:
    random = np.random.default_rng(0)
    for split, n in (("train", N_TRAIN), ("t10k", N_TEST)):
        write_idx(root / dataset / "raw" / f"{split}-images-idx3-ubyte", random.integers(0, 256, (n, 28, 28)))
        write_idx(root / dataset / "raw" / f"{split}-labels-idx1-ubyte", np.arange(n) % n_classes)


def write_cifar(root: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few images in the published format; torchvision is told not to expect the published hashes."""
    label_key = kind.meta["key"].replace("label_names", "labels")
    files = {name: N_TRAIN // len(kind.train_list) for name, _ in kind.train_list}
    files |= {name: N_TEST for name, _ in kind.test_list}
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    for name, n in files.items():
        pixels = np.random.default_rng(n).integers(0, 256, (n, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, label_key: list(range(n))[::-1]}))
    n_classes = 100 if label_key == "fine_labels" else 10
    names = {kind.meta["key"]: [f"class {k}" for k in range(n_classes)]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(names))
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(kind, table, [[name, None] for name, _ in getattr(kind, table)])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": None})


def write_folders(root: Path, n_classes: int = 3, test: str = "val") -> None:
    random = np.random.default_rng(0)
    for split, n in (("train", 4), (test, 2)):
        for k in range(n_classes):
            folder = root / split / f"n{k:04d}"
            folder.mkdir(parents=True)
            for i in range(n):
                height, width = random.integers(40, 90, 2)
                pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.jpg")


def write_npz(path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", N_TRAIN), ("test", N_TEST)):
        arrays[f"{split}_images"] = random.integers(0, 256, (n, 12, 10, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n)[:, None] % 3  # MedMNIST's labels are a column
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory) -> Path:
    """1000 classes with one photograph each, all of them one file."""
    root = tmp_path_factory.mktemp("imagenet")
    write_folders(root, n_classes=1)
    for split, k in itertools.product(("train", "val"), range(1, 1000)):
        (root / split / f"n{k:04d}").symlink_to("n0000")
    return root


@pytest.fixture
def opened(tmp_path, monkeypatch, imagenet):
    """`opened(name, folder)` writes a tiny data set of that name and opens it."""

    def open_tiny(name: str, folder: str = "data") -> Source:
        root = tmp_path / folder
        write = {
            "digits": lambda: None,
            "mnist": lambda: write_mnist(root),
            "fashionmnist": lambda: write_mnist(root, "FashionMNIST"),
            "cifar10": lambda: write_cifar(root, torchvision.datasets.CIFAR10, monkeypatch),
            "cifar100": lambda: write_cifar(root, torchvision.datasets.CIFAR100, monkeypatch),
            "imagefolder": lambda: write_folders(root),
            "npz": lambda: write_npz(root),
            "imagenet": lambda: (root.parent.mkdir(exist_ok=True), root.symlink_to(imagenet)),
        }
        write[name]()
        return open_source(name, root, image_size=SIZE if "image_size" in SOURCES[name].takes else None)

    return open_tiny


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_yields_labelled_uint8_images(name, opened):
    source = opened(name)
    assert len(source.class_names) == source.n_classes
    for split in ("train", "test"):
        data = source.load(split)
        images = data.fetch(torch.tensor([0, len(data) - 1]))
        assert images.dtype == torch.uint8
        assert images.shape == (2, *source.image_shape)
        assert images.is_contiguous()
        assert data.labels.dtype == torch.int64
        assert data.labels.shape == (len(data),)
        assert data.fetch(torch.arange(0)).shape == (0, *source.image_shape)


@pytest.mark.parametrize("name", SOURCES)
def test_fetched_images_do_not_depend_on_the_batching(name, opened):
    data = opened(name).load("train")
    order = torch.randperm(min(len(data), 12), generator=torch.Generator().manual_seed(0))
    scale = (0.3, 1.0) if isinstance(data, ImageFiles) else None
    augment = Augment(crop_pad=2, flip=True, resized_crop=scale)
    whole = data.fetch(order, augment, seed=3, epoch=2)
    parts = torch.cat([data.fetch(part.numpy(), augment, seed=3, epoch=2) for part in order.split(5)])
    assert torch.equal(parts, whole)
    assert not torch.equal(data.fetch(order, augment, seed=3, epoch=3), whole)


@pytest.mark.parametrize("name", SOURCES)
def test_fingerprint_is_that_of_the_data_not_of_the_place(name, opened):
    assert opened(name, "here").fingerprint == opened(name, "there/deeper").fingerprint


@pytest.mark.parametrize("name", SOURCES)
def test_a_loaded_source_travels_to_worker_processes(name, opened):
    source = opened(name)
    data = pickle.loads(pickle.dumps(source)).load("test")
    assert torch.equal(data.fetch(torch.arange(2)), source.load("test").fetch(torch.arange(2)))


def test_fingerprints_differ_between_data_sets(tmp_path):
    write_folders(tmp_path)
    marks = [open_source("imagefolder", tmp_path, image_size=size).fingerprint for size in (8, 9)]
    (tmp_path / "train" / "n0000" / "0.jpg").unlink()
    marks.append(open_source("imagefolder", tmp_path, image_size=8).fingerprint)
    write_mnist(tmp_path)
    marks.append(open_source("mnist", tmp_path).fingerprint)
    write_mnist(tmp_path, n_classes=9)
    marks.append(open_source("mnist", tmp_path).fingerprint)
    assert len(set(marks)) == len(marks)


def test_digits_are_split_by_class_once_and_for_all():
    source = open_source("digits")
    train, test = source.load("train"), source.load("test")
    assert (len(train), len(test)) == (1438, 359)
    share = test.labels.bincount() / (test.labels.bincount() + train.labels.bincount())
    assert (share - 0.2).abs().max() < 0.005
    assert test.pixels.max() == 255
    both = torch.cat([train.pixels, test.pixels]).flatten(1)
    original = torch.from_numpy((load_digits().data * 255 / 16).round().astype(np.uint8))
    assert sorted(both.tolist()) == sorted(original.tolist())  # none lost, none doubled
    assert source.fingerprint == "4703c9369a305285"


def test_array_sources_hold_the_images_of_torchvision(tmp_path, opened):
    ours = opened("cifar10").load("train")
    theirs = torchvision.datasets.CIFAR10(tmp_path / "data")
    assert torch.equal(ours.pixels, torch.stack([reference.pil_to_tensor(image) for image, _ in theirs]))
    assert ours.labels.tolist() == theirs.targets


def test_real_mnist(real_data):
    source = open_source("mnist", real_data("mnist"))
    train, test = source.load("train"), source.load("test")
    assert (len(train), len(test), source.n_classes) == (60_000, 10_000, 10)
    assert abs(float(train.pixels.double().mean()) / 255 - 0.1307) < 1e-4


@pytest.mark.slow
def test_real_cifar10(real_data):
    source = open_source("cifar10", real_data("cifar10"))
    assert (len(source.load("train")), len(source.load("test"))) == (50_000, 10_000)
    assert source.class_names[:2] == ["airplane", "automobile"]


def test_real_photographs(real_data):
    source = open_source("imagefolder", real_data("imagenette") / "imagenette-small", image_size=64)
    train, test = source.load("train"), source.load("test")
    assert (source.n_classes, len(train) + len(test)) == (10, 2000)
    assert train.fetch(torch.arange(0, len(train), 400)).float().std() > 20


@pytest.mark.parametrize("size", [32, 224])
def test_files_are_resized_and_cropped_as_in_torchvision(tmp_path, size):
    write_folders(tmp_path)
    data = open_source("imagefolder", tmp_path, image_size=size).load("train")
    usual = Compose([Resize(round(size * 256 / 224)), CenterCrop(size), PILToTensor()])
    expected = [usual(Image.open(path.decode())) for path in data.paths]
    assert torch.equal(data.fetch(torch.arange(len(data))), torch.stack(expected))


def test_files_are_cropped_at_full_resolution_with_the_shared_draws(tmp_path):
    write_folders(tmp_path)
    data = open_source("imagefolder", tmp_path, image_size=SIZE).load("train")
    indices = torch.tensor([7, 2, 11])
    result = data.fetch(indices, Augment(flip=True, resized_crop=(0.2, 0.9)), seed=1, epoch=6)
    flips = uniform(1, 6, indices, BOX)[:, FLIP] < 0.5
    for image, index, draws, flip in zip(result, indices, box_draws(1, 6, indices), flips, strict=True):
        original = Image.open(data.paths[index].decode())
        box = resized_crop_box(draws, original.height, original.width, (0.2, 0.9))
        expected = reference.pil_to_tensor(reference.resized_crop(original, *box, [SIZE, SIZE]))
        assert torch.equal(image, expected.flip(-1) if flip else expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P"])
def test_every_colour_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.png" if mode != "CMYK" else "image.jpg")
    grey = Image.new("RGB", (20, 20), (80, 80, 80))
    (grey.quantize() if mode == "P" else grey.convert(mode)).save(path)
    image = ImageFiles([str(path)], torch.zeros(1, dtype=torch.int64), 16).fetch(torch.arange(1))
    assert (image.int() - 80).abs().max() <= 3


@pytest.mark.parametrize("damage", ["truncated", "text", "gone"])
def test_a_damaged_image_is_named(tmp_path, damage):
    write_folders(tmp_path)
    data = open_source("imagefolder", tmp_path, image_size=SIZE).load("train")
    path = Path(data.paths[5].decode())
    {
        "truncated": lambda: path.write_bytes(path.read_bytes()[:-60]),
        "text": lambda: path.write_text("<html>"),
        "gone": path.unlink,
    }[damage]()
    with pytest.raises(DataError, match=str(path)):
        data.fetch(torch.arange(12))


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "digits"])
def test_missing_data_are_reported_with_the_folder_and_the_cure(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = 8 if "image_size" in SOURCES[name].takes else None
    layout = "train_images" if name == "npz" else "train/CLASS"
    cure = "data.download=true" if "download" in SOURCES[name].takes else layout
    with pytest.raises(DataError, match=rf"{tmp_path}/nowhere.*data\.root.*{cure}"):
        open_source(name, "nowhere", image_size=size)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    write_folders(tmp_path)
    with pytest.raises(DataError, match="expected 1000 class folders, received 3"):
        open_source("imagenet", tmp_path)
    (tmp_path / "val" / "stranger").mkdir()
    with pytest.raises(DataError, match="stranger"):
        open_source("imagefolder", tmp_path, image_size=8)
    (tmp_path / "val" / "stranger").rmdir()
    (tmp_path / "train" / "z-empty").mkdir()
    with pytest.raises(DataError, match="z-empty"):
        open_source("imagefolder", tmp_path, image_size=8)


def test_a_test_folder_without_classes_gives_way_to_val(tmp_path):
    write_folders(tmp_path)
    expected = open_source("imagefolder", tmp_path, image_size=8).load("test").paths.tolist()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "unlabelled.jpg").touch()
    assert open_source("imagefolder", tmp_path, image_size=8).load("test").paths.tolist() == expected


def test_labels_out_of_range_are_counted_and_located(tmp_path):
    write_mnist(tmp_path, n_classes=12)
    with pytest.raises(DataError, match=r"0\.\.9, received 4 outside, the first at index 10 \(10\)"):
        open_source("mnist", tmp_path).load("train")


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("length", [0, 3, 30])
def test_damaged_array_files_are_reported(tmp_path, file, length):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=f"{tmp_path}.*MNIST"):
        open_source("mnist", tmp_path).load("train")


def test_images_and_labels_of_different_sets_are_refused():
    with pytest.raises(DataError, match="3 labels and 2 images"):
        ImageArray(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_a_foreign_cifar_file_is_not_unpickled(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    kind = torchvision.datasets.CIFAR10
    for name, _ in [*kind.train_list, *kind.test_list, ["batches.meta", None]]:
        (folder / name).write_bytes(b"foreign")
    with pytest.raises(DataError, match=r"batches\.meta: expected the published file"):
        open_source("cifar10", tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "setting"),
    [
        ("flowers", {}, "data.source"),
        ("digits", {"download": True}, "data.download"),
        ("digits", {"image_size": 8}, "data.image_size"),
        ("mnist", {"image_size": 8}, "data.image_size"),
        ("imagefolder", {"download": True, "image_size": 8}, "data.download"),
        ("imagefolder", {}, "data.image_size"),
        ("imagenet", {"image_size": 0}, "data.image_size"),
    ],
)
def test_an_option_a_source_does_not_take_is_refused(name, options, setting, tmp_path):
    with pytest.raises(ConfigError, match=setting):
        open_source(name, tmp_path, **options)


def test_resized_crop_of_an_array_is_refused():
    with pytest.raises(ConfigError, match=r"data.augment.resized_crop"):
        open_source("digits").load("train").fetch(torch.arange(2), Augment(resized_crop=(0.5, 1.0)))


def test_an_unknown_split_is_refused():
    with pytest.raises(ConfigError, match="split"):
        open_source("digits").load("validation")


def test_simultaneous_downloads_happen_once(tmp_path, monkeypatch):
    downloads = []

    def download(self) -> None:
        downloads.append(threading.get_ident())
        write_idx(Path(self.raw_folder) / "train-images-idx3-ubyte", np.zeros((0, 28, 28)))  # exists, not complete
        write_mnist(Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    marks: list[str] = []
    threads = [
        threading.Thread(target=lambda: marks.append(open_source("mnist", tmp_path, download=True).fingerprint))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 1
    assert len(marks) == 6
    assert len(set(marks)) == 1


def test_a_failed_download_is_reported(tmp_path, monkeypatch):
    def download(self) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    with pytest.raises(DataError, match=f"(?s)no network.*{tmp_path}/MNIST/raw"):
        open_source("mnist", tmp_path, download=True)
