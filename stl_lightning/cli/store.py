"""`stl prepare` and `stl verify`: write and check a slice store. Import nothing heavy until arguments are parsed."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from stl_lightning.errors import ConfigError
from stl_lightning.machine import n_cores

REFRESH_S = 0.1


def prepare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl prepare",
        allow_abbrev=False,
        usage="stl prepare --config FILE.yaml --data.store FOLDER [--dtype NAME] [--workers N] [--key.subkey VALUE]",
        description="Write the slices of all images once, a file each, so that a rank reads its own and no image. "
        "Given again, the command goes on where it was stopped; a store that is complete is left as it is.",
        epilog="What the slices are is set as for `stl fit`, in the config or here: --data.source, --data.root, "
        "--data.download, --data.image_size, --data.reorganisation, --data.block, --data.transform, --data.pad; and "
        "where the transform depends on them, --seed_everything and --data.val_size. A store serves every other "
        "setting, seed and validation split. `stl fit --help` explains them all.",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        action="append",
        default=[],
        help="the config of the runs that will read the store",
    )
    parser.add_argument(
        "--data.store", metavar="FOLDER", dest="store", help="folder to write; it appears when it is complete"
    )
    parser.add_argument(
        "--dtype", default="float32", help="float32 (default), float16 (half the bytes) or int8 (a quarter)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode and split (default: one a core)"
    )
    return parser


def prepare(args: list[str]) -> int:
    """Write the slice store that a config describes."""
    given, settings = prepare_parser().parse_known_args(args)
    n_workers = n_cores() if given.workers is None else given.workers
    if n_workers < 1:
        raise ConfigError(f"--workers: expected 1 or more, received {n_workers}")

    from stl_lightning.cli.config import SpectralCLI
    from stl_lightning.store import open_store, prepare_store

    own = [f"--config={file}" for file in given.config]
    own += [] if given.store is None else [f"--data.store={given.store}"]
    cli = SpectralCLI([*own, *settings], "prepare")
    folder = cli.config.data.store
    if folder is None:
        raise ConfigError("data.store: expected the folder to write the slices to, received none")
    cli.config.data.store, cli.config.data.branch = None, 0  # the images are wanted here, and no branch in particular
    data = cli.data
    begin = time.monotonic()
    with progress_bar() as progress:
        is_new = prepare_store(
            folder, data.source, data.spectral, given.dtype, data.val_size, data.setup, n_workers, progress
        )
    manifest = open_store(folder).manifest
    n_bytes = sum(facts.bytes for facts in manifest.files.values())
    what = f"{len(manifest.slices)} slices of {manifest.n_train} + {manifest.n_test} images, {n_bytes / 1e9:.3f} GB"
    print(
        f"written: {folder} ({what}, {time.monotonic() - begin:.0f} s)" if is_new else f"{folder} is complete: {what}"
    )
    return 0


def verify_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stl verify",
        description="Read a slice store and compare every file with the hash in its manifest. "
        "Exits with 1 and names the files that are missing or damaged.",
    )
    parser.add_argument("store", help="folder of the store, such as stores/cifar10")
    parser.add_argument("--slices", help="numbers of the slices to check, such as 3,7 (default: all)")
    return parser


def verify(args: list[str]) -> int:
    """Check the files of a slice store against their hashes."""
    given = verify_parser().parse_args(args)
    slices = None if given.slices is None else _numbers(given.slices)

    from stl_lightning.store import verify as find_damaged

    with progress_bar() as progress:
        damaged = find_damaged(given.store, slices, progress)
    for name in damaged:
        what = "damaged" if (Path(given.store).expanduser() / name).exists() else "missing"
        print(f"{what}: {name}", file=sys.stderr)
    if damaged:
        cure = "copy these files again, or delete the store and make it again with `stl prepare`"
        print(f"{cure}; --slices checks a copy that holds only some", file=sys.stderr)
        return 1
    print(f"{given.store}: {'all files are' if slices is None else 'the files asked for are'} intact")
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--slices: expected whole numbers with commas between them, received {text!r}") from None


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function that shows what is counted, how many more are done, and of how many."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    # No thread that refreshes: it could hold a lock at the moment a worker process is forked.
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), auto_refresh=False)
    tasks: dict[str, TaskID] = {}
    shown_s = 0.0

    def advance(what: str, n_more: int, n_total: int) -> None:
        nonlocal shown_s
        if what not in tasks:
            tasks[what] = bar.add_task(what, total=n_total)
        bar.advance(tasks[what], n_more)
        if time.monotonic() - shown_s > REFRESH_S:
            shown_s = time.monotonic()
            bar.refresh()

    with bar:
        yield advance
