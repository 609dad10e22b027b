"""What the function of a fault may wait for, without holding up the other faults of the round."""

import time
from collections.abc import Callable, Generator
from typing import Any

UNTIL_S = 60.0


class Until:
    """A condition, looked at every so often, and for how long it is waited for; it may stay unmet."""

    def __init__(self, is_met: Callable[[], Any], timeout_s: float = UNTIL_S, every_s: float = 0.05) -> None:
        self.is_met = is_met
        self.every_s = every_s
        self.deadline = time.monotonic() + timeout_s
        self.next_look = 0.0

    def is_over(self) -> bool:
        now = time.monotonic()
        if now < self.next_look:
            return False
        self.next_look = now + self.every_s
        return bool(self.is_met()) or now > self.deadline


def seconds(duration_s: float) -> Until:
    return Until(lambda: False, duration_s)


Act = Generator[Until, None, str | None]


class Wrong(Exception):
    """Something came of a fault that never may: what that was."""
