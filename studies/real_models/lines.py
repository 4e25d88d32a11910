"""A file of results: one JSON object a line, only ever appended to."""

import fcntl
import json
import sys
from pathlib import Path
from typing import Any


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a record as one line. Several processes may do so at the same time."""
    line = json.dumps(record, sort_keys=True, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, 2)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":  # the last run ended within a line
                line = "\n" + line
        file.write(line.encode())
        file.flush()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records. A damaged line, the last of a run that was cut off, is left out with a word on stderr."""
    if not path.is_file():
        return []
    records, damaged = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            damaged.append(number)
    if damaged:
        print(f"{path}: left out damaged line(s) {damaged}, runs that were cut off.", file=sys.stderr)
    return records
