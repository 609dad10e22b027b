"""`stl completion SHELL`: a completion script for all commands, as jsonargparse and shtab make it."""

import argparse

from stl_lightning.__main__ import COMMANDS
from stl_lightning.errors import unknown

SHELLS = ("bash", "zsh", "tcsh")


def completion(args: list[str]) -> int:
    """Print the script of one shell."""
    import shtab

    parser = argparse.ArgumentParser(prog="stl completion", description=COMMANDS["completion"][1])
    parser.add_argument("shell", help=", ".join(SHELLS))
    shell = parser.parse_args(args).shell
    if shell not in SHELLS:
        raise unknown("shell", shell, SHELLS)
    print(shtab.complete(full_parser(), shell))
    return 0


def full_parser() -> argparse.ArgumentParser:
    """Every command with every option. Only completion needs them all at once."""
    from stl_lightning.cli.config import SpectralCLI
    from stl_lightning.cli.cost import cost_parser
    from stl_lightning.cli.ensemble import ensemble_parser
    from stl_lightning.cli.launch import launch_parser, resubmit_parser
    from stl_lightning.cli.report import report_parser
    from stl_lightning.cli.status import cancel_parser, status_parser
    from stl_lightning.cli.store import prepare_parser, verify_parser

    parser = argparse.ArgumentParser(prog="stl")
    commands = parser.add_subparsers()
    with_config = SpectralCLI([], "fit").parser
    own = {
        "ensemble": [ensemble_parser()],
        "report": [report_parser()],
        # Parsers of their own: `resolve` takes the options that are there twice away from the one that came first.
        "cost": [SpectralCLI([], "cost").parser, cost_parser()],
        "prepare": [SpectralCLI([], "prepare").parser, prepare_parser()],
        "launch": [SpectralCLI([], "launch").parser, launch_parser()],
        "status": [status_parser()],
        "resubmit": [resubmit_parser()],
        "cancel": [cancel_parser()],
        "verify": [verify_parser()],
    }
    for name, (_, what) in COMMANDS.items():
        options = own.get(name, [with_config])
        commands.add_parser(name, help=what, parents=options, add_help=False, conflict_handler="resolve")
    return parser
