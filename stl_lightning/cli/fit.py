"""`stl fit`: train the branches of this rank, in this process or in a child that is started again when it fails.

Imports nothing heavy: the supervisor waits for days beside the child.
"""

from stl_lightning.errors import ConfigError


def fit(args: list[str]) -> int:
    """Train the branches this rank owns; with `--retries N`, under a supervisor."""
    retries, rest = take_retries(args)
    if retries:
        from stl_lightning.supervisor import supervise

        return supervise(rest, retries)
    from stl_lightning.cli.train import fit_rank

    return fit_rank(rest)


def take_retries(args: list[str]) -> tuple[int, list[str]]:
    """The number behind `--retries`, and the other arguments, which are settings of a config.

    Raises: ConfigError if it is no number.
    """
    rest, retries = [], "0"
    remaining = iter(args)
    for arg in remaining:
        if arg == "--retries":
            retries = next(remaining, "")
        elif arg.startswith("--retries="):
            retries = arg.removeprefix("--retries=")
        else:
            rest.append(arg)
    if not (retries.isascii() and retries.isdigit()):
        raise ConfigError(f"--retries: expected how often a branch that failed is tried again, got {retries!r}")
    return int(retries), rest
