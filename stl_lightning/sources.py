"""Named data sets -> labelled images, uint8, split into "train" and "test".

A row of `SOURCES` turns a `Request` into a `Source`. Opening is cheap: it looks at file names and labels.
Pixels are read by `Source.load` (sets of small images, one tensor) or by `ImageFiles.fetch` (folders of
image files). Validation images are for the caller to take from "train".

Letters: n samples, c channels, h w space, k classes.
"""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stl_lightning.augment import uniform
from stl_lightning.errors import ConfigError, DataError, unknown
from stl_lightning.images import ImageArray, ImageFiles, reading

SPLITS = ("train", "test")
FOLDER_LAYOUT = "expected data.root/train/CLASS/*.jpg and data.root/test/CLASS/*.jpg (or val for test)"


@dataclass(frozen=True)
class Source:
    """A data set that was found; `fingerprint` is equal wherever the same data are, under any root."""

    name: str
    image_shape: tuple[int, int, int]
    class_names: list[str]
    fingerprint: str
    read: Callable[[str], ImageArray | ImageFiles] = field(repr=False)

    @property
    def n_classes(self) -> int:
        return len(self.class_names)

    def load(self, split: str) -> ImageArray | ImageFiles:
        """The images of "train" or "test".

        Raises: DataError for unreadable files and for labels outside 0..k-1.
        """
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        data = self.read(split)
        _check_labels(data.labels, self.n_classes, f"{self.name}, split {split}")
        return data


def _check_labels(labels: Tensor, n_classes: int, where: str) -> None:
    wrong = torch.nonzero((labels < 0) | (labels >= n_classes)).flatten().tolist()
    if wrong:
        raise DataError(
            f"{where}: expected labels in 0..{n_classes - 1}, received {len(wrong)} outside, "
            f"the first at index {wrong[0]} ({int(labels[wrong[0]])}); correct the files in data.root"
        )


@dataclass(frozen=True)
class Request:
    """What the user asked `open_source` for; `root` is absolute."""

    name: str
    root: Path
    download: bool
    image_size: int | None


def _fingerprint(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _open_digits(ask: Request) -> Source:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy(np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8))  # it has 0..16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    chosen = {"test": _test_fifth(labels), "train": ~_test_fifth(labels)}
    splits = {name: ImageArray(pixels[mask], labels[mask]) for name, mask in chosen.items()}
    mark = _fingerprint(ask.name, *(part.numpy().tobytes() for part in (labels, chosen["test"])))
    return Source(ask.name, (1, 8, 8), [str(name) for name in digits.target_names], mark, splits.__getitem__)


def _test_fifth(labels: Tensor) -> Tensor:
    """A fixed fifth of each class, (n,) bool; by our own draws, which no library version changes."""
    draws = torch.from_numpy(uniform(seed=0, epoch=0, indices=np.arange(len(labels)), n_draws=1)[:, 0])
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = torch.nonzero(labels == label).flatten()
        chosen[members[draws[members].argsort()[: round(len(members) / 5)]]] = True
    return chosen


def _open_mnist(dataset: str, ask: Request) -> Source:
    import torchvision

    kind = getattr(torchvision.datasets, dataset)
    folder = ask.root / dataset / "raw"
    files = [Path(name).stem for name, _ in kind.resources]
    _require(kind, [folder / name for name in files], ask)
    labels = ((folder / name).read_bytes() for name in files if "labels" in name)
    sizes = (str((folder / name).stat().st_size) for name in files)
    read = partial(_read_torchvision, dataset, ask.root)
    return Source(ask.name, (1, 28, 28), list(kind.classes), _fingerprint(ask.name, *sizes, *labels), read)


def _open_cifar(dataset: str, ask: Request) -> Source:
    import torchvision

    kind = getattr(torchvision.datasets, dataset)
    folder = ask.root / kind.base_folder
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    _require(kind, [folder / name for name, _ in files], ask)
    read = partial(_read_torchvision, dataset, ask.root)
    # torchvision compares every file with its hash when it loads, so the hashes are the data.
    mark = _fingerprint(ask.name, *(str(md5) for _, md5 in files))
    return Source(ask.name, (3, 32, 32), _cifar_classes(kind, folder), mark, read)


def _cifar_classes(kind: Any, folder: Path) -> list[str]:
    from torchvision.datasets.utils import check_integrity

    path = folder / kind.meta["filename"]
    if not check_integrity(path, kind.meta["md5"]):  # first the hash: unpickling a foreign file runs its code
        raise DataError(f"{path}: expected the published file, received another md5; delete the folder")
    return pickle.loads(path.read_bytes(), encoding="latin1")[kind.meta["key"]]


def _read_torchvision(dataset: str, root: Path, split: str) -> ImageArray:
    import torchvision

    with reading(root, f"delete its {dataset} files and set data.download=true"):
        data = getattr(torchvision.datasets, dataset)(root, train=split == "train")
    pixels = torch.as_tensor(data.data)
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return ImageArray(pixels.contiguous(), torch.as_tensor(data.targets))


def _require(kind: Any, files: list[Path], ask: Request) -> None:
    """Download if that was asked for; raise a DataError if a file is missing then."""
    if ask.download:
        _download(kind, files, ask)
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise DataError(
            f"{ask.name}: expected {', '.join(missing)} in {files[0].parent}; "
            "set data.root to the folder above it, or data.download=true"
        )


def _download(kind: Any, files: list[Path], ask: Request) -> None:
    from filelock import FileLock

    # The lock is taken before looking: a file that exists may still be growing under another process.
    try:
        ask.root.mkdir(parents=True, exist_ok=True)
        with FileLock(ask.root / f".{ask.name}.lock"):
            if not all(file.exists() for file in files):
                kind(ask.root, download=True)
    except (OSError, RuntimeError) as error:
        if not all(file.exists() for file in files):  # complete data on a read-only disk need no lock
            raise DataError(
                f"{ask.name}: the download into {ask.root} failed ({error}); "
                f"set data.root to a writable folder, or copy the files into {files[0].parent} by hand"
            ) from error


def _open_folders(ask: Request, default_size: int | None = None, n_classes: int | None = None) -> Source:
    """Class folders of image files, as torchvision's ImageFolder reads them.

    Also for ImageNet: torchvision.datasets.ImageNet wants the archive of the development kit beside the
    images, and unpacks archives when it is constructed, which several processes must not do at once. Its
    order of classes is the same.
    """
    from torchvision.datasets.folder import find_classes

    size = default_size if ask.image_size is None else ask.image_size
    if size is None or size < 1:
        raise ConfigError(f"data.image_size: expected a side in pixels for {ask.name}, received {size}")
    with reading(ask.root, FOLDER_LAYOUT):
        classes, class_to_label = find_classes(ask.root / "train")
        test = _test_folder(ask.root, find_classes)
    if n_classes not in (None, len(classes)):
        expected = f"expected {n_classes} class folders, received {len(classes)}"
        raise DataError(f"{ask.root / 'train'}: {expected}; complete them, or set data.source to imagefolder")
    folders = {"train": ask.root / "train", "test": test}
    found = {split: _list_images(folders[split], class_to_label) for split in SPLITS}
    splits = {split: ImageFiles(paths, torch.tensor(labels), size) for split, (paths, labels) in found.items()}
    names = (split + path.removeprefix(str(folders[split])) for split in SPLITS for path in found[split][0])
    mark = _fingerprint(ask.name, str(size), *names)
    return Source(ask.name, (3, size, size), classes, mark, splits.__getitem__)


def _test_folder(root: Path, find_classes: Callable[[Path], tuple[list[str], Any]]) -> Path:
    """root/test where it has class folders, else root/val: ImageNet's own test images have no labels."""
    test = root / "test"
    has_classes = test.is_dir() and any(entry.is_dir() for entry in os.scandir(test))
    folder = test if has_classes else root / "val"
    strangers = sorted(set(find_classes(folder)[0]) - set(find_classes(root / "train")[0]))
    if strangers:
        received = f"received also {', '.join(strangers)}; remove them"
        raise DataError(f"{folder}: expected no classes but those of {root / 'train'}, {received}")
    return folder


def _list_images(folder: Path, class_to_label: dict[str, int]) -> tuple[list[str], list[int]]:
    """Paths and labels, in the order of class and file names."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    with reading(folder, FOLDER_LAYOUT):
        # Every class must have training images; a test set may lack some.
        found = make_dataset(str(folder), class_to_label, IMG_EXTENSIONS, allow_empty=folder.name != "train")
    if not found:
        raise DataError(f"{folder}: expected image files, received none; {FOLDER_LAYOUT}")
    return [path for path, _ in found], [label for _, label in found]


OVERSHOOT = 0.01  # of floats that are to be in [0, 1]
NPZ_ARRAYS = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))
NPZ_LAYOUT = (
    "expected data.root to be one file with train_images (n, h, w) or (n, h, w, c), train_labels (n,), "
    "test_images and test_labels"
)


def _open_npz(ask: Request) -> Source:
    """The user's own arrays in one file, laid out as MedMNIST's are; `data.root` is the file."""
    with reading(ask.root, NPZ_LAYOUT), np.load(ask.root, allow_pickle=False) as arrays:
        missing = [name for name in NPZ_ARRAYS if name not in arrays.files]
        if missing:
            raise DataError(f"{ask.root}: {NPZ_LAYOUT}, received a file without {', '.join(missing)}")
        labels = arrays["train_labels"].reshape(-1)
        images, test_labels = arrays["test_images"], arrays["test_labels"].reshape(-1)
    if labels.dtype.kind not in "iu" or not len(labels) or labels.min() != 0:
        received = f"{labels.dtype} from {labels.min()}" if labels.dtype.kind in "iu" and len(labels) else labels.dtype
        raise DataError(f"{ask.root}: expected train_labels to be whole numbers from 0, received {received}")
    if len(images) != len(test_labels):
        received = f"received {len(test_labels)} and {len(images)}"
        raise DataError(f"{ask.root}: expected as many test_labels as test_images, {received}")
    n_classes = int(labels.max()) + 1
    _check_labels(torch.from_numpy(test_labels.astype(np.int64)), n_classes, f"{ask.name}, split test")
    shape = _to_planes(images[:1], where := f"{ask.root}: test_images").shape[1:]
    _check_range(images, where)  # before any training, where they are not looked at
    mark = _fingerprint(ask.name, str(ask.root.stat().st_size), _checksums(ask.root))
    read = partial(_read_npz, ask.root)
    return Source(ask.name, (shape[0], shape[1], shape[2]), [str(k) for k in range(n_classes)], mark, read)


def _checksums(path: Path) -> bytes:
    """Of the arrays in a file, which its directory has: nothing else is read."""
    with zipfile.ZipFile(path) as file:
        return b"".join(f"{entry.filename} {entry.CRC}\n".encode() for entry in file.infolist())


def _read_npz(path: Path, split: str) -> ImageArray:
    with reading(path, NPZ_LAYOUT), np.load(path, allow_pickle=False) as arrays:
        pixels = _to_planes(arrays[f"{split}_images"], f"{path}: {split}_images")
        labels = torch.from_numpy(arrays[f"{split}_labels"].reshape(-1).astype(np.int64))
    if not pixels.isfinite().all():
        n_bad = int((~pixels.isfinite()).flatten(1).any(1).sum())
        raise DataError(f"{path}: expected finite images, received {n_bad} of {split}_images with NaN or infinity")
    _check_range(pixels.numpy(), f"{path}: {split}_images")
    return ImageArray(pixels, labels)


def _check_range(images: np.ndarray, where: str) -> None:
    """What resizing has left a little outside is taken as it is."""
    if images.dtype.kind != "f" or not images.size:
        return
    low, high = images.min(), images.max()
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        received = f"received {low:.4g} to {high:.4g}"
        raise DataError(f"{where}: expected floats in [0, 1], {received}; scale them, or store them as uint8")


def _to_planes(images: np.ndarray, where: str) -> Tensor:
    """(n, h, w) or (n, h, w, c) -> (n, c, h, w), 8 bits or float32."""
    if images.ndim not in (3, 4) or not (images.dtype == np.uint8 or images.dtype.kind == "f"):
        received = f"received {images.dtype} {images.shape}"
        raise DataError(f"{where}: {NPZ_LAYOUT}, images of uint8 or of floats in [0, 1]; {received}")
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] > 4:
        raise DataError(f"{where}: expected (n, h, w, c), channels last; received {images.shape}")
    planes = torch.from_numpy(images if images.dtype == np.uint8 else images.astype(np.float32))
    return planes[:, None] if planes.ndim == 3 else planes.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Opener:
    """One row of `SOURCES`: how to open it, and which options it takes."""

    open: Callable[[Request], Source]
    takes: tuple[str, ...] = ()


SOURCES = {
    "digits": Opener(_open_digits),
    "mnist": Opener(partial(_open_mnist, "MNIST"), takes=("download",)),
    "fashionmnist": Opener(partial(_open_mnist, "FashionMNIST"), takes=("download",)),
    "cifar10": Opener(partial(_open_cifar, "CIFAR10"), takes=("download",)),
    "cifar100": Opener(partial(_open_cifar, "CIFAR100"), takes=("download",)),
    "imagefolder": Opener(_open_folders, takes=("image_size",)),
    "imagenet": Opener(partial(_open_folders, default_size=224, n_classes=1000), takes=("image_size",)),
    "npz": Opener(_open_npz),
}


def open_source(name: str, root: str | Path = "data", download: bool = False, image_size: int | None = None) -> Source:
    """Find a data set: check that its files exist and list them, but read no pixels.

    Units: image_size in pixels. Several processes may call this at once, with download too.
    Raises: ConfigError for an unknown name or an option the source does not take; DataError for missing data.
    """
    if name not in SOURCES:
        raise unknown("data.source", name, SOURCES)
    given = {"download": download or None, "image_size": image_size}
    for option, value in given.items():
        if value is not None and option not in SOURCES[name].takes:
            raise ConfigError(f"data.{option}: expected nothing for the source {name}, received {value}")
    return SOURCES[name].open(Request(name, Path(root).expanduser().absolute(), download, image_size))
