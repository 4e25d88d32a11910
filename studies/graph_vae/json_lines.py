"""The record of a run: JSON lines that are added one by one, and go back to the epoch of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from pyro_graphflows.whole_files import write_whole


class Record:
    """A file with one JSON object a line.

    Args:
        path: The file.
        epoch: The epoch that training goes on from; lines of later epochs are taken out.
    """

    def __init__(self, path: Path, epoch: int = 0) -> None:
        self.path = path
        self.lines: list[dict[str, Any]] = []
        if path.exists():
            for text in path.read_text().splitlines():
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # a line that was being written when the run was killed
                    break
                if line.get("epoch", 0) <= epoch:
                    self.lines.append(line)
        kept = "".join(f"{json.dumps(line)}\n" for line in self.lines).encode()
        write_whole(path, lambda file: file.write(kept))

    def add(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(f"{json.dumps(line)}\n")

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the lines of a kind."""
        return [line for line in self.lines if line["kind"] == kind]
