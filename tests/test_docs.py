"""The README agrees with the code: names of every table, and results that are rendered from kept files."""

import re
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from stl_lightning.__main__ import COMMANDS
from stl_lightning.ensemble.pooling import SPACES
from stl_lightning.ensemble.weighting import WEIGHTINGS
from stl_lightning.sources import SOURCES
from stl_lightning.spectral import REORGANISATIONS, TRANSFORMS

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text()
TABLES = {
    "commands": COMMANDS,
    "sources": SOURCES,
    "transforms": TRANSFORMS,
    "reorganisations": REORGANISATIONS,
    "weightings": WEIGHTINGS,
    "spaces": SPACES,
    "configs": {path.stem for path in (CHECKOUT / "configs").glob("*.yaml")},
}


@pytest.fixture(scope="module")
def record() -> ModuleType:
    loader = SourceFileLoader("record", str(CHECKOUT / "tools" / "record"))
    spec = spec_from_loader("record", loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


# The section that documents a table: where it begins and ends.
SECTIONS = {
    "commands": ("| command | does |", "\n\n"),
    "weightings": ("| weighting | weights |", "\n\n"),
    "spaces": ("They apply to", "\n\n"),
    "configs": ("`configs/` holds", "\n\n"),
    **{name: ("```yaml", "```") for name in ("sources", "transforms", "reorganisations")},
}


@pytest.mark.parametrize("table", TABLES)
def test_the_readme_documents_every_row(table: str) -> None:
    begin, end = SECTIONS[table]
    section = README.split(begin, 1)[1].split(end, 1)[0]
    missing = [name for name in TABLES[table] if not re.search(rf"\b{name}\b", section)]
    assert not missing


def test_results_are_rendered_and_not_typed(record: ModuleType) -> None:
    blocks = {(f"<!-- {name} -->\n", f"<!-- end of {name} -->"): render() for name, render in record.BLOCKS.items()}
    for (begin, end), block in blocks.items():
        assert README.split(begin)[1].split(end)[0] == block


def test_the_config_in_the_readme_is_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from stl_lightning.__main__ import main

    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "readme.yaml").write_text(text)
    with pytest.raises(SystemExit) as left:
        main(["fit", "--config", str(tmp_path / "readme.yaml"), "--print_config"])
    assert left.value.code == 0
    printed = yaml.safe_load(capfd.readouterr().out)
    assert printed["data"]["transform"] == yaml.safe_load(text)["data"]["transform"]
