"""What is wrong with the machine of a rank: its clock, its network drive, its name. In force while a file says so."""

import errno
import json
import os
import random
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "STL_FAULTS"  # the folder with the files that say what is wrong
HOST = "STL_FAULTS_HOST"  # what `socket.gethostname` answers, in place of the truth
CLOCK, RENAME = "clock.json", "rename.json"
LOOK_EVERY_S = 0.2


def install(environ: Mapping[str, str] | None = None) -> None:
    """Make this process feel the faults of the folder that its environment names, if any."""
    env = os.environ if environ is None else environ
    if FOLDER not in env:
        return
    folder = Path(env[FOLDER])
    if HOST in env:
        socket.gethostname = lambda: env[HOST]
    time.time = shifted(time.time, folder / CLOCK)
    os.replace = failing(os.replace, folder / RENAME)
    os.rename = failing(os.rename, folder / RENAME)


def shifted(clock: Callable[[], float], file: Path) -> Callable[[], float]:
    """A clock that is wrong by as many seconds as the file says for this host, or for all (*)."""
    looked_at, shift_s = 0.0, 0.0

    def read() -> float:
        nonlocal looked_at, shift_s
        if time.monotonic() - looked_at > LOOK_EVERY_S:
            looked_at, said = time.monotonic(), _read(file)
            shift_s = float(said.get(socket.gethostname(), said.get("*", 0.0)))
        return clock() + shift_s

    return read


def failing(rename: Callable[..., None], file: Path) -> Callable[..., None]:
    """A rename that fails now and then as the file says, before or after it was done: {"where", "before", "after"}.

    `where` is a part of the path, `before` and `after` are probabilities. So does a network drive whose server comes
    back: what it did before it went is done, and its client hears of an error.
    """
    draws = random.Random(os.urandom(8))

    def replace(source: Any, target: Any, **options: Any) -> None:
        said = _read(file)
        if not said or said["where"] not in str(target):
            return rename(source, target, **options)
        draw = draws.random()
        number = draws.choice((errno.ESTALE, errno.EIO))
        if draw < said["before"] + said["after"]:
            if draw >= said["before"]:
                rename(source, target, **options)
            raise OSError(number, os.strerror(number), str(source), None, str(target))
        return rename(source, target, **options)

    return replace


def _read(file: Path) -> dict[str, Any]:
    """Nothing where there is no file."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
