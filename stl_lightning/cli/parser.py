"""The parser of settings: an unknown one is answered with the one that was meant."""

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

# What jsonargparse says of settings that it does not know: on the command line, and in a file.
UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)'")
NOT_ACCEPTED = re.compile(r"Option '([\w.]+)' is not accepted")
# And of values that it cannot use.
NO_MODULE = re.compile(r"No module named '([\w.]+)'")
NO_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
NO_LIST = re.compile(r"Expected a <class 'list'>.*Given value: ([\w.-]+)", re.DOTALL)


class SettingsParser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        super().error("; ".join([message, *suggestions(message, known), *cures(message)]), ex)


def suggestions(message: str, known: Iterable[str]) -> list[str]:
    """For each setting that an error calls unknown, the known one that is spelt most like it, if any is."""
    names = [".".join(found) for found in OF_GROUP.findall(message)] + NOT_ACCEPTED.findall(message)
    if matched := UNRECOGNIZED.search(message):
        names += re.findall(r"--([\w.]+)", matched[1])
    return [meant for name in names for meant in _meant(name, known)]


def cures(message: str) -> list[str]:
    """What to write: for a class that is not found, which there are or where they are looked for; for a list, one."""
    found = [
        f"no {name} in the folder that this is called from, or on PYTHONPATH" for name in NO_MODULE.findall(message)
    ]
    for module, name in NO_CLASS.findall(message):
        classes = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        found += _meant(name, classes) or [f"{module} has the classes {', '.join(sorted(classes))}"]
    return found + [f"write [{value}]" for value in NO_LIST.findall(message)]


def _meant(name: str, known: Iterable[str]) -> list[str]:
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return [f"did you mean {found} in place of {name}?" for found in close]


@contextlib.contextmanager
def own_classes_found() -> Iterator[None]:
    """Classes of the user's own are found in the folder that the command is called from, while a config is read.

    jsonargparse reads a config from within its folder, and the "" of `sys.path` is that folder then.
    """
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
