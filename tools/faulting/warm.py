"""Processes that begin with everything imported: forked from this one, where a new one would spend seconds on imports.

In all else they are processes like any other: a number, a parent, signals, an end of their own. Only `stl` commands are
started so; the supervisors and launchers among them start their own children the same way.
"""

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

from stl_lightning import leaving
from stl_lightning.__main__ import main

STL = [sys.executable, "-m", "stl_lightning"]
HANDLED = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class WarmPopen(subprocess.Popen):
    """`subprocess.Popen` for which the commands of `stl` need no new interpreter."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        if list(command[:3]) == STL:
            sys.stdout.flush()
            environ = options.pop("env", None) or dict(os.environ)
            options["preexec_fn"] = partial(become, list(command[3:]), environ, options.get("pass_fds", ()))
            command = ["/bin/false"]  # the child never comes to it
        super().__init__(command, **options)


def become(args: Sequence[str], environ: Mapping[str, str], kept_fds: Sequence[int]) -> NoReturn:
    """In the child, between fork and exec: run the command and end, as a new interpreter would."""
    code: Any = 1
    try:
        for fd in map(int, os.listdir("/proc/self/fd")):
            if fd > 2 and fd not in kept_fds:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(fd)  # among them the one at which the parent waits for the exec
        os.environ.clear()
        os.environ.update(environ)
        for number in HANDLED:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        leaving._asked.clear()
        subprocess.Popen = WarmPopen  # type: ignore[misc, assignment]
        import tamper

        tamper.install()
        code = main(args)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: what is cleaned up at the end of an interpreter belongs to the parent.
        os._exit(code or 0)
