"""Shared fixtures: real data sets and a real SLURM where they can be had, skipped with the reason otherwise."""

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import Cluster, Unavailable

CHECKOUT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: begun last, one of them would go on alone while other workers idle."""
    n_slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -n_slow[item.path])


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`real_data("mnist")` -> a folder in torchvision's layout: $STL_DATA as it is, or packed data unpacked."""
    folder = os.environ.get("STL_DATA")
    packed = CHECKOUT.parent / "shared" / "data" / "unpack.py"
    unpacked = tmp_path_factory.mktemp("data")
    marks = {"mnist": "MNIST/raw", "cifar10": "cifar-10-batches-py", "imagenette": "imagenette-small"}

    def find(name: str) -> Path:
        if folder and (Path(folder) / marks[name]).exists():
            return Path(folder)
        if not packed.exists():
            pytest.skip(f"no {name}: neither $STL_DATA/{marks[name]} nor {packed} exists")
        if not (unpacked / marks[name]).exists():
            subprocess.run([sys.executable, packed, unpacked, name], check=True, capture_output=True)
        return unpacked

    return find


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running SLURM of four nodes. Who breaks a node mends it (`cluster.reset()`)."""
    try:
        started = Cluster().start()
    except Unavailable as reason:
        pytest.skip(str(reason))
    with contextlib.closing(started):
        yield started
