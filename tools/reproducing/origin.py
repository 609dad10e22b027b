"""Where a training was begun, and with which code: it may be recorded later, and elsewhere."""

import subprocess
from pathlib import Path

from benchmarks.machine import machine, versions

CHECKOUT = Path(__file__).resolve().parents[2]


def origin() -> dict[str, str | None]:
    """Of a training that begins here and now."""
    return {"machine": _machine(), "commit": commit()}


def _machine() -> str:
    here, of = machine(), versions()
    hardware = here["gpu"] or f"{here['cores']} cores of {here['cpu']}"
    return f"{hardware}, Python {of['python']}, torch {of['torch']}"


def commit(checkout: Path = CHECKOUT) -> str | None:
    """That is checked out, and `-dirty` if a file has changed since but results and README.

    None where git does not know the checkout.
    """

    def git(*args: str) -> str | None:
        try:
            found = subprocess.run(["git", "-C", str(checkout), *args], capture_output=True, text=True)
        except OSError:  # there is no git
            return None
        return found.stdout.strip() if found.returncode == 0 else None

    if git("rev-parse", "--show-toplevel") != str(checkout.resolve()) or not (head := git("rev-parse", "HEAD")):
        return None
    changed = git("status", "--porcelain", "--", ".", ":!tools/results", ":!README.md")
    return head[:12] + ("" if changed == "" else "-dirty")
