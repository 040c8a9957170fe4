"""results.jsonl, the finished cells of a grid: one line per cell, appended atomically. Does not import torch."""

import fcntl
import json
import os
from pathlib import Path

from lib.errors import InputError

FILE = "results.jsonl"


class ResultsFile:
    """The results of a grid's cells by their key: everything that a result depends on, as `canonical` text."""

    def __init__(self, folder: Path, overwrite: bool = False, is_writer: bool = True):
        """Reads the existing file, unless `overwrite`. Raises `InputError` for a file that no grid wrote.

        All processes of a run hold the results; only the one with `is_writer` writes them. An incomplete last line,
        which a power failure can leave, is ignored.
        """
        self.path, self._overwrite, self._is_writer = folder / FILE, overwrite, is_writer
        self._found: dict[str, dict] = {}
        content = self.path.read_bytes() if self.path.exists() and not overwrite else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._found[canonical(dict(entry["key"]))] = dict(entry["result"])
            except (ValueError, KeyError, TypeError) as error:
                advice = "move the file away, or name another --output_dir"
                raise InputError(f"{self.path}: line {number} is not of a grid's results; {advice}") from error

    @property
    def keys(self) -> list[str]:
        """The canonical keys of all cells."""
        return list(self._found)

    def find(self, key: str) -> dict | None:
        """The result of the cell with that canonical key, or None."""
        return self._found.get(key)

    def add(self, key: str, result: dict) -> None:
        """Appends a finished cell and flushes it to disk. Safe with several runs at once.

        With `overwrite`, the first cell replaces the existing file.
        """
        line = (json.dumps({"key": json.loads(key), "result": result}, allow_nan=False) + "\n").encode()
        self._found[key] = json.loads(line)["result"]
        if not self._is_writer:
            return
        if self._overwrite:
            self.path.unlink(missing_ok=True)
            self._overwrite = False
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def canonical(key: dict) -> str:
    """A key as JSON text; equal keys give equal text."""
    return json.dumps(key, sort_keys=True, allow_nan=False)
