"""The command `stl`: a table of commands, each imported only when it is called."""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

from stl_lightning import leaving
from stl_lightning.errors import FencedError, LeaveError, STLError
from stl_lightning.exits import DONE, FAILED, FENCED, INTERRUPTED, REFUSED

# name -> (module of the package `cli` that holds a function of that name, what it does)
COMMANDS = {
    "prepare": ("store", "write the slices of a data set once, so that a rank reads only its own"),
    "verify": ("store", "compare the files of a slice store with their hashes"),
    "run": ("train", "train all branches on this machine, then make the ensemble"),
    "fit": ("fit", "train the branches that this rank owns (under torchrun, srun or a SLURM array, or alone)"),
    "baseline": ("train", "train the conventional network on the whole image"),
    "ensemble": ("ensemble", "combine the finished branches of a run and score them on the test set"),
    "report": ("report", "draw the figures of a run into RUN/report, and print its tables"),
    "cost": ("cost", "say what branches and baseline cost: parameters, multiply-adds, memory, bytes, seconds"),
    "validate": ("score", "score the branches of this rank on the validation split"),
    "test": ("score", "score the branches of this rank on the test set"),
    "predict": ("score", "write the logits of the branches of this rank to files"),
    "launch": ("launch", "submit the branches of a config and the ensemble to SLURM, or --local train them here"),
    "status": ("status", "say what each branch of a run is doing: state, epoch, host, job, time left"),
    "resubmit": ("launch", "launch again the branches of a run that are missing, failed or lost"),
    "cancel": ("status", "cancel the jobs of a run, or end its processes on this machine"),
    "completion": ("completion", "print a completion script for a shell: bash, zsh or tcsh"),
}
TRAINING = ("run", "fit", "baseline")  # these leave at the next step when a signal asks


def usage() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return (
        "usage: stl COMMAND [--config FILE.yaml] [--key.subkey VALUE ...]\n\n"
        "Train spectral tensor networks: independent branches, no communication, one ensemble.\n\n"
        f"commands:\n{rows}\n\n"
        "`stl COMMAND --help` lists all settings of a command, `--print_config` prints them as a config file."
    )


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns an exit code of `exits`."""
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return DONE
    if name == "--version":
        from importlib.metadata import version  # takes longer to import than all of `stl --help`

        print(f"stl_lightning {version('stl-lightning')}")
        return DONE
    if name not in COMMANDS:
        print(f"stl: unknown command {name!r}\n\n{usage()}", file=sys.stderr)
        return REFUSED
    try:
        with leaving.listening() if name in TRAINING else nullcontext():
            module = import_module(f"stl_lightning.cli.{COMMANDS[name][0]}")
            return getattr(module, name)(rest)
    except LeaveError as error:
        print(f"stl {name}: {error}; the same command goes on from there", file=sys.stderr)
        return INTERRUPTED
    except FencedError as error:
        print(f"stl {name}: {error}", file=sys.stderr)
        return FENCED
    except STLError as error:
        print(f"stl {name}: error: {error}", file=sys.stderr)
        return REFUSED
    except BrokenPipeError:  # `stl completion bash | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it when it ends)
        return FAILED if name in TRAINING else DONE
    except OSError as error:  # such as a folder of somebody else's
        if name in TRAINING:  # may be of the user's code, or pass
            raise
        print(f"stl {name}: error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print(f"stl {name}: interrupted; the same command resumes", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
