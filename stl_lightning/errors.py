"""The exceptions a user may see, and how the user is told of anything else.

Each message states what was expected, what was received and the setting to change.
"""

import contextlib
import sys
from collections.abc import Iterable
from typing import TextIO


class STLError(Exception):
    """Base of every error that the user can cure; the command line prints its message without a traceback."""


class ConfigError(STLError, ValueError):
    """A setting is unknown, out of range, or does not fit another setting."""


class DataError(STLError):
    """Images or labels are missing, unreadable or out of range."""


class StoreError(DataError):
    """A slice store is missing, unfinished, damaged, unwritable, or was prepared with other settings."""


class RunError(STLError):
    """A run directory is unwritable, belongs to other settings, or lacks what was asked of it."""


class CheckpointError(STLError):
    """A checkpoint is truncated, unsafe to load, or of another branch or run."""


class FencedError(STLError):
    """A newer attempt owns the branch that this process was training."""


class LeaveError(STLError):
    """The process was asked to leave by a signal, and has saved what it was training, if anything."""


class DivergedError(STLError):
    """The training loss of a branch stopped being a finite number."""


class CommunicationError(STLError, RuntimeError):
    """A rank was about to talk to another rank, which this method never does."""


def say(text: str, where: TextIO | None = None) -> None:
    """Print at once, to stderr if not told otherwise; what cannot be written must not end the training of a branch."""
    with contextlib.suppress(OSError):
        print(text, file=where or sys.stderr, flush=True)


def unknown(setting: str, received: object, valid: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a table: lists the names that are."""
    return ConfigError(f"{setting}: unknown value {received!r}; expected one of: {', '.join(sorted(valid))}")
