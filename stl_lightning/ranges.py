"""Numbers as ranges, 3,7-9, as SLURM writes and reads them; and tables whose keys are such ranges."""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

from stl_lightning.errors import ConfigError

Value = TypeVar("Value")

RANGES = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")


def as_ranges(numbers: Iterable[int]) -> str:
    """3,7-9 of 3, 7, 8, 9. The inverse is `from_ranges`."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def from_ranges(text: str) -> list[int]:
    """3, 7, 8, 9 of 3,7-9%2: also with steps (0-8:4), as SLURM writes them. The inverse of `as_ranges`."""
    numbers: list[int] = []
    for part in text.strip("[]").partition("%")[0].split(","):
        ends, _, step = part.partition(":")
        first, _, last = ends.partition("-")
        if first.isdigit():  # a long list ends in dots
            numbers += range(int(first), int(last or first) + 1, int(step or 1))
    return numbers


def by_number(setting: str, table: Mapping[str | int, Value]) -> dict[int, Value]:
    """The value of each number, of a table such as {"0": a, "3,7-9": b}; YAML reads a single number as an integer.

    Raises: ConfigError, which names the setting, if a key is no range, or a number is in two keys.
    """
    values: dict[int, Value] = {}
    for key, value in table.items():
        numbers = from_ranges(str(key)) if RANGES.fullmatch(str(key)) else []
        if not numbers:
            raise ConfigError(f"{setting}: expected branches as keys, such as 0 or 3,7-9; got {key!r}")
        twice = [number for number in numbers if number in values]
        if twice:
            raise ConfigError(f"{setting}: branches {as_ranges(twice)} are in {key!r} and in a key before it")
        values |= dict.fromkeys(numbers, value)
    return values
