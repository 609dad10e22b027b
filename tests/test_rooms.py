"""The package's rooms import one way only, and a name at the top of the repository is one that belongs there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = CHECKOUT / "stl_lightning"

# Each may import from those before it (and from its own room).
ROOMS = [
    "errors", "machine", "ranges", "exits", "leaving", "ranks", "paths", "run", "status", "attempts", "supervisor",
    "traffic", "launch",
    "spectral", "augment", "images", "sources", "store", "loaders", "slices",
    "datamodule", "networks", "optimizers", "stacked", "averaging", "module", "strategy", "checkpoint", "tracking",
    "training", "ensemble", "cost", "report", "__main__", "cli",
]  # fmt: skip

FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported_rooms(path: Path) -> set[str]:
    package = ["stl_lightning", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *filter(None, [node.module])])]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("stl_lightning.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_one_way(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert imported_rooms(path) == set()
        return
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    assert imported_rooms(path) <= allowed


def test_every_room_is_listed() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} == set(ROOMS)


def test_top_level_holds_what_belongs_there() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.split("/")[0] for name in listed.stdout.splitlines()}
    wanted = {"pyproject.toml", "README.md", "stl_lightning", "configs", "slurm", "tests", "tools", "LICENSE"}
    assert {name for name in top if not name.startswith(".")} <= wanted


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "matplotlib", "scipy"])
def test_optional_packages_are_imported_only_when_used(name: str) -> None:
    """Nothing of ours imports them at the top; what Lightning imports by itself is its own affair."""
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(module.split(".")[0] == name for module in modules), path


def test_the_light_commands_import_no_torch() -> None:
    names = ("cost", "ensemble", "report", "store")
    modules = ", ".join(["stl_lightning.__main__", *(f"stl_lightning.cli.{name}" for name in names)])
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=True)
