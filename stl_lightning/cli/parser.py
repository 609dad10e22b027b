"""The parser of settings: an unknown one is answered with the one that was meant."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

# What jsonargparse says of settings that it does not know: on the command line, and in a file.
UNRECOGNIZED = re.compile(r"unrecognized arguments: (.*)", re.DOTALL)
OF_GROUP = re.compile(r"Group '([\w.]+)' does not accept option '(\w+)'")
NOT_ACCEPTED = re.compile(r"Option '([\w.]+)' is not accepted")


class SettingsParser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [option.removeprefix("--") for option in self._option_string_actions if option.startswith("--")]
        super().error("; ".join([message, *suggestions(message, known)]), ex)


def suggestions(message: str, known: Iterable[str]) -> list[str]:
    """For each setting that an error calls unknown, the known one that is spelt most like it, if any is."""
    names = [".".join(found) for found in OF_GROUP.findall(message)] + NOT_ACCEPTED.findall(message)
    if matched := UNRECOGNIZED.search(message):
        names += re.findall(r"--([\w.]+)", matched[1])
    close = {name: get_close_matches(name, known, n=1, cutoff=0.8) for name in names}
    return [f"did you mean {found[0]} in place of {name}?" for name, found in close.items() if found]
