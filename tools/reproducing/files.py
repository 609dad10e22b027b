"""JSON that is read with a clear error, and files that are there whole or not at all. Needs nothing but Python."""

import json
import sys
from pathlib import Path
from typing import Any


def read_json(file: Path) -> Any:
    """Raises: SystemExit that names the file, if it is missing or no JSON."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: expected a JSON file; {error}")


def read_record(file: Path) -> dict[str, Any]:
    """The JSON of an experiment. Raises: SystemExit if it is none."""
    record = read_json(file)
    if not isinstance(record, dict) or not {"seeds", "variants"} <= record.keys():
        sys.exit(f"{file}: expected what `tools/reproduce` has written, with seeds and variants")
    return record


def write(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.part")
    temporary.write_text(text)
    temporary.replace(file)
