"""The parser of settings: an unknown one is answered with the one that was meant."""

import re
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pkgutil import iter_modules
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

# What jsonargparse says of settings that it does not know: on the command line, and in a file.
UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)'")
NOT_ACCEPTED = re.compile(r"Option '([\w.]+)' is not accepted")
# And of values that it cannot use.
NO_MODULE = re.compile(r"No module named '([\w.]+)'")
NO_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
NO_LIST = re.compile(r"Subtypes: \[list\[int\].*Given value: (-?\d+(?:[, ]+-?\d+)*)\Z", re.DOTALL)


class SettingsParser(LightningArgumentParser):
    _begins = False  # to parse settings, for which it is about to ask for the defaults

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        self._begins = True
        return super().parse_args(*args, **kwargs)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """Settings that are parsed begin with the name alone of a class that is a default, without its options.

        A class that takes its place would have those that it has too, and not its own defaults: AdamW the weight decay
        0 of Adam (https://github.com/mauvilsa/jsonargparse/issues/460). The options of whichever class it is in the end
        are added then.
        """
        found = super().get_defaults(*args, **kwargs)
        if self._begins:
            for key, value in found.items(branches=True):
                if isinstance(value, Namespace) and vars(value).keys() == {"class_path", "init_args"}:
                    del found[f"{key}.init_args"]
        self._begins = False
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        hints = [*suggestions(message, known), *cures(message)]
        # A parser that is not to exit comes here a second time, with what it has raised.
        super().error("; ".join([message, *(hint for hint in hints if hint not in message)]), ex)


def suggestions(message: str, known: Iterable[str]) -> list[str]:
    """For each setting that an error calls unknown, the known one that is spelt most like it, if any is."""
    names = [".".join(found) for found in OF_GROUP.findall(message)] + NOT_ACCEPTED.findall(message)
    if matched := UNRECOGNIZED.search(message):
        names += re.findall(r"--([\w.]+)", matched[1])
    return [meant for name in names for meant in _meant(name, known)]


def cures(message: str) -> list[str]:
    """What to write in place of a class that is not found, or of a list."""
    where = "in the folder that this is called from, on PYTHONPATH or installed"
    found = [f"no module {name} {where}" for name in NO_MODULE.findall(message)]
    for module, name in NO_CLASS.findall(message):
        found += _meant(name, _public(module))
    return found + [f"write [{', '.join(re.split('[, ]+', numbers))}]" for numbers in NO_LIST.findall(message)]


def _public(module: str) -> list[str]:
    """What can be found in a module that was imported, and its submodules."""
    imported = sys.modules.get(module)  # none, if the import of it has failed
    if imported is None:
        return []
    inside = [found.name for found in iter_modules(getattr(imported, "__path__", None) or ())]
    return [name for name in {*vars(imported), *inside} if not name.startswith("_")]


def _meant(name: str, known: Iterable[str]) -> list[str]:
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return [f"did you mean {found} in place of {name}?" for found in close]
