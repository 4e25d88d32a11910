"""The results of a study: one file with a line of JSON for each run, to which lines are only ever appended.

A line is an object; its ``"key"`` names the run, the rest is its record. A study that is started again asks which
keys are there and does the others. Where a run has several lines (measured again, or with more figures), the last one
counts.

Several processes may append at the same time: each takes a lock on the file first. A run that is killed while it
writes leaves at most an unfinished last line. A reader says so and goes on without it; the next line that is appended
takes its place. Any other line that cannot be read is an error.
"""

import copy
import fcntl
import json
import os
import warnings
from pathlib import Path
from typing import Any

__all__ = ["DamagedLineWarning", "Results"]

Record = dict[str, Any]


class DamagedLineWarning(RuntimeWarning):
    """The last line of a file of results is unfinished and was left out."""


class Results:
    """The runs in one file, by key.

    Args:
        path: The file; it and its folder are made with the first line.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> results = Results(Path(folder.name) / "results.jsonl")
        >>> results.append("d4-s0", {"kl": 0.5})
        >>> "d4-s0" in results, results.read()
        (True, {'d4-s0': {'kl': 0.5}})
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        self._seen: tuple[int, int, int] | None = None
        self._records: dict[str, Record] = {}

    def read(self) -> dict[str, Record]:
        """Return the records of all runs, sorted by key, to look at; none if there is no file.

        Raises:
            ValueError: If a line other than an unfinished last one is not an object with a key.
        """
        if not self.path.exists():
            self._seen, self._records = None, {}
            return {}
        with open(self.path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # no process is within a line now
            status = os.fstat(file.fileno())
            state = (status.st_ino, status.st_size, status.st_mtime_ns)
            if state != self._seen:
                whole, unfinished = _split(file.read())
                records = dict(self._parse(number, line) for number, line in enumerate(whole, start=1))
                self._records = dict(sorted(records.items()))
                if unfinished:
                    self._warn(len(whole) + 1, unfinished, "is left out")
                self._seen = state
        return dict(self._records)

    def get(self, key: str) -> Record | None:
        """Return the record of a run, for the caller to change; ``None`` if it is not there."""
        return copy.deepcopy(self.read().get(key))

    def __contains__(self, key: str) -> bool:
        return key in self.read()

    def append(self, key: str, record: Record) -> None:
        """Add a line; when this returns it is on the disk.

        Args:
            key: The name of the run.
            record: What is to be kept of it: anything that ``json`` can write, without a ``"key"``.

        Raises:
            ValueError: If the record has a ``"key"`` of its own.
        """
        if "key" in record:
            raise ValueError(
                f'Expected a record without "key"; that of run {key!r} has {record["key"]!r} there.'
            )
        line = json.dumps({"key": key, **record}, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            whole, unfinished = _split(content)
            if unfinished:
                self._warn(len(whole) + 1, unfinished, "is replaced")
                file.truncate(len(content) - len(unfinished))
            elif content and not content.endswith(b"\n"):
                file.write(b"\n")
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _parse(self, number: int, line: bytes) -> tuple[str, Record]:
        record = _object(line)
        if record is None or "key" not in record:
            raise ValueError(
                f'{self.path}, line {number}: expected a JSON object with a "key"; got {line[:60]!r}. Mend or '
                "remove this line."
            )
        return record.pop("key"), record

    def _warn(self, number: int, line: bytes, what: str) -> None:
        warnings.warn(
            f"{self.path}, line {number}: the last line is unfinished ({len(line)} bytes from {line[:40]!r}) and "
            f"{what}: a run was killed while it wrote its result. That run will be done again.",
            DamagedLineWarning,
            stacklevel=3,
        )


def _split(content: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole lines, and the last one if it is unfinished (a whole line may lack its newline)."""
    lines = content.split(b"\n")
    last = lines.pop()
    if last and _object(last) is not None:  # no beginning of an object is an object
        lines.append(last)
        last = b""
    return lines, last


def _object(line: bytes) -> Record | None:
    """Return the JSON object of a line; ``None`` if it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
