"""The `sbatch` commands of a launch, as text. Nothing here runs anything."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from stl_lightning.errors import ConfigError, unknown
from stl_lightning.launch.record import METHODS, Launch
from stl_lightning.paths import RunPaths
from stl_lightning.ranges import as_ranges

# Options of sbatch that follow from the launch: given again, they would disagree with it.
OWN_OPTIONS = ("--array", "--nodes", "--ntasks", "--dependency", "--parsable", "--wrap")
WARNING_S = 120  # before the time limit, as the templates have it
OWN_LETTERS = ("-a", "-N", "-n", "-d")


@dataclass(frozen=True)
class Submission:
    """One `sbatch` command. It waits for the jobs of `after`: a role of this launch, or the id of an older job."""

    role: str
    options: tuple[str, ...]
    script: tuple[str, ...]  # the template and its arguments
    condition: str = ""  # afterok or afterany
    after: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)

    def argv(self, ids: Mapping[str, str]) -> list[str]:
        """The command, with the ids of the jobs that were submitted before it."""
        return ["sbatch", "--parsable", *self._waits(ids), *self.options, *self.script]

    def as_shell(self, after: Mapping[str, str]) -> str:
        """The command as a line for a shell; `after` says how it writes the id of a job."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environ.items()]
        waits = [word if "$" in word else shlex.quote(word) for word in self._waits(after)]
        return " ".join([*variables, "sbatch --parsable", *waits, shlex.join([*self.options, *self.script])])

    def _waits(self, ids: Mapping[str, str]) -> list[str]:
        if not self.after:
            return []
        jobs = ":".join(ids.get(job, job) for job in self.after)
        # A condition that cannot be met any more would keep the job in the queue for ever.
        return [f"--dependency={self.condition}:{jobs}", "--kill-on-invalid-dep=yes"]


def compose(
    launch: Launch,
    paths: RunPaths,
    templates: Path,
    still_queued: Sequence[str] = (),
    environ: Mapping[str, str] = MappingProxyType({}),
) -> list[Submission]:
    """The commands of a launch: prepare, then the branches, then the ensemble, as far as each is wanted.

    The ensemble also waits for `still_queued`, the jobs of branches that an earlier launch trains. `environ` are
    variables for all of them.
    """
    config = [launch.config, *launch.settings]
    commands = []
    if launch.prepares:
        # No template: it is one command, and waits for nothing.
        wrapped = f"exec ${{STL:-stl}} prepare --config {shlex.join(config)}"
        options = _options(launch, paths, "prepare", "%x-%j")
        commands.append(Submission("prepare", options, ("--wrap", wrapped), environ=environ))
    if launch.branches:
        waits_for = ["prepare"] if launch.prepares else []
        number = "%A_%a" if launch.method == "array" else "%j"
        options = (*_warning(launch), *_options(launch, paths, "", f"%x-{number}"), *_size(launch))
        script = (str(templates / f"{launch.method}.sbatch"), *config)
        retries = {"STL_RETRIES": str(launch.retries)}
        commands.append(Submission("branches", options, script, "afterok", tuple(waits_for), retries | dict(environ)))
    if launch.has_ensemble:
        after = (*still_queued, *(["branches"] if launch.branches else []))
        options = _options(launch, paths, "ensemble", "%x-%j")
        script = (str(templates / "ensemble.sbatch"), str(paths.folder))
        commands.append(Submission("ensemble", options, script, "afterany", after, environ))
    return commands


def _options(launch: Launch, paths: RunPaths, role: str, log: str) -> tuple[str, ...]:
    """Those of the site come last, since sbatch heeds the last of two."""
    name = f"stl-{paths.folder.name}" + (f"-{role}" if role else "")
    return f"--job-name={name}", f"--output={paths.logs / log}.out", *launch.sbatch


def _warning(launch: Launch) -> tuple[str, ...]:
    """Before a time limit of minutes, a later warning than the templates': that would come before the first step."""
    limit = limit_of_options(launch.sbatch)
    return () if limit is None or limit >= 4 * WARNING_S else (f"--signal=USR1@{int(limit // 4)}",)


def _size(launch: Launch) -> tuple[str, ...]:
    if launch.method == "array":
        return (f"--array={as_ranges(launch.branches)}",)
    return (f"--nodes={launch.nodes}", f"--ntasks={launch.n_branches}")


def as_shell(commands: Sequence[Submission], folder: str, paths: RunPaths, here: str) -> str:
    """A script that submits the commands, as one would by hand."""
    lines = [] if folder == here else [f"cd {shlex.quote(folder)}"]
    lines.append(f"mkdir -p {shlex.quote(str(paths.logs))}")
    awaited = {role for command in commands for role in command.after}
    # Where clusters are federated, sbatch prints id;name.
    shell_ids = {command.role: f'"${{{command.role}%;*}}"' for command in commands}
    for command in commands:
        line = command.as_shell(shell_ids)
        lines.append(f"{command.role}=$({line})" if command.role in awaited else line)
    return "\n".join(lines)


def site_options(texts: Sequence[str]) -> list[str]:
    """The words of `--sbatch "..."`, as a shell splits them.

    Raises: ConfigError if one of them is an option that the launch decides.
    """
    try:
        words = [word for text in texts for word in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"--sbatch: expected options as a shell splits them, got {texts}: {error}") from error
    for word in words:
        if word.partition("=")[0] in OWN_OPTIONS or word[:2] in OWN_LETTERS:
            raise ConfigError(
                f"--sbatch: expected options of your site such as --partition, --account, --time, --gpus-per-task, got "
                f"{word!r}, which follows from the config, --method and --nodes"
            )
    return words


def limit_of_options(options: Sequence[str]) -> float | None:
    """Seconds of the last `--time` among options of sbatch, as SLURM reads it; None without one, or without a limit."""
    limit = None
    for word, following in zip(options, [*options, ""][1:], strict=True):
        if word in ("-t", "--time"):
            limit = following
        elif word.startswith("--time="):
            limit = word.removeprefix("--time=")
        elif word.startswith("-t") and not word.startswith("--"):
            limit = word.removeprefix("-t")
    return None if limit is None else limit_s(limit)


def limit_s(text: str) -> float | None:
    """Seconds of one of SLURM's formats: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. None for UNLIMITED, 0 and what is none."""
    days, _, clock = text.rpartition("-")
    if not all(part.isdigit() for part in [days or "0", *clock.split(":")]):
        return None
    parts = [int(part) for part in clock.split(":")]
    if days or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, minutes, seconds = 0, *[*parts, 0][:2]
    return 86400.0 * int(days or 0) + 3600.0 * hours + 60.0 * minutes + seconds or None


def check_method(method: str, nodes: int | None, n_branches: int | None = None) -> None:
    """Raises: ConfigError if the method is unknown, or does not fit the number of nodes or, once known, of branches."""
    if method not in METHODS:
        raise unknown("--method", method, METHODS)
    if method == "array":
        if nodes is not None:
            raise ConfigError(f"--nodes={nodes}: an array takes nodes as they come; --nodes is for srun and torchrun")
    elif nodes is None:
        raise ConfigError(f"--nodes: expected the number of nodes that --method {method} divides the branches over")
    elif nodes < 1 or (n_branches is not None and nodes > n_branches):
        raise ConfigError(f"--nodes: expected 1 to {n_branches or 'the number of branches'}, got {nodes}")


def find_templates(folder: Path) -> Path:
    """The folder `slurm` of the checkout, or what a package has installed of it; relative, if it is below `folder`.

    Raises: ConfigError if neither is there.
    """
    places = [Path(__file__).parents[2] / "slurm", Path(sys.prefix) / "share" / "stl_lightning" / "slurm"]
    names = [f"{name}.sbatch" for name in (*METHODS, "ensemble")]
    for place in places:
        if all((place / name).exists() for name in names):
            return place.relative_to(folder) if place.is_relative_to(folder) else place
    where = " and ".join(map(str, places))
    raise ConfigError(f"no templates: looked for {', '.join(names)} in {where}; install the package again")
