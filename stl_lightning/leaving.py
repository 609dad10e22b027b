"""Asked to leave: a signal sets a flag, which training looks at between two steps.

SLURM sends SIGUSR1 before the time limit where the job asks for it (`--signal`), and SIGTERM on preemption. A handler
that saved by itself would find the weights in the middle of a step.
"""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

from stl_lightning.errors import ConfigError, LeaveError

Handler = Callable[[int, FrameType | None], None]

_asked: list[str] = []  # names of the signals that came; a list, since a handler must not wait for a lock


def asked() -> str | None:
    """The name of the first signal that asked this process to leave."""
    return _asked[0] if _asked else None


@contextmanager
def listening(environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Take the signals that ask to leave for the time being. A second SIGINT ends the process at once.

    Call it before Lightning is imported, which takes seconds.
    Raises: ConfigError as `signals`.
    """
    with handling(_on_signal, environ):
        try:
            yield
        finally:
            _asked.clear()


@contextmanager
def at_once(environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have the signals that ask to leave end what has nothing to save, where it stands.

    Raises: LeaveError when one comes, or has come before; KeyboardInterrupt at a second. ConfigError as `signals`.
    """

    def leave(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if asked():  # it is on its way out, or the first one got lost
            raise KeyboardInterrupt
        note(name)
        raise LeaveError(f"asked to leave by {name}")

    with handling(leave, environ):
        if asked():
            raise LeaveError(f"asked to leave by {asked()}")
        yield


@contextmanager
def handling(handler: Handler, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Have the signals that ask to leave call `handler`, and what they called before afterwards."""
    former = {number: signal.signal(number, handler) for number in signals(environ)}
    try:
        yield
    finally:
        for number, old in former.items():
            signal.signal(number, old)


def signals(environ: Mapping[str, str] | None = None) -> list[signal.Signals]:
    """The signals that ask to leave: SIGUSR1, SIGTERM, SIGINT, or those in STL_SIGNALS, where a library takes SIGUSR1.

    Raises: ConfigError if STL_SIGNALS names no signals.
    """
    names = (os.environ if environ is None else environ).get("STL_SIGNALS", "SIGUSR1,SIGTERM,SIGINT").split(",")
    try:
        return [signal.Signals[name.strip()] for name in names]
    except KeyError as error:
        raise ConfigError(f"STL_SIGNALS: expected names such as SIGUSR1,SIGTERM, got {error}") from None


def note(reason: str) -> None:
    """Be asked to leave for another reason than a signal."""
    if reason not in _asked:
        _asked.append(reason)


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    if name == "SIGINT" and name in _asked:
        raise KeyboardInterrupt
    if name not in _asked:
        # Not print: the signal may come in the middle of one.
        os.write(2, f"stl: {name}: saving at the next step\n".encode())
    note(name)
