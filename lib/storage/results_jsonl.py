"""The file of a grid's finished cells, `results.jsonl`: one line each, added whole or not at all. Imports no torch."""

import fcntl
import json
import os
from pathlib import Path

from lib.errors import InputError

FILE = "results.jsonl"


class ResultsFile:
    """What was found for the cells of a grid, each by its key: all that the result depends on, see `canonical`."""

    def __init__(self, folder: Path, overwrite: bool = False, is_writer: bool = True):
        """Reads what is there, unless `overwrite`. Raises `InputError` for a file that no grid wrote.

        Of several processes one writes (`is_writer`), and all know.

        A last line that was cut off while it was written, by a loss of power say, counts as not there.
        """
        self.path, self._overwrite, self._is_writer = folder / FILE, overwrite, is_writer
        self._found: dict[str, dict] = {}
        content = self.path.read_bytes() if self.path.exists() and not overwrite else b""
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._found[canonical(entry["key"])] = dict(entry["result"])
            except (ValueError, KeyError, TypeError) as error:
                advice = "move the file away, or name another --output_dir"
                raise InputError(f"{self.path}: line {number} is not of a grid's results; {advice}") from error

    def find(self, key: str) -> dict | None:
        """The result of the cell of that canonical key; None when it is not there."""
        return self._found.get(key)

    def add(self, key: str, result: dict) -> None:
        """Writes a finished cell down, safe from a crash of the machine; several runs may do so at once.

        With `overwrite` the first cell takes the place of all that was there.
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
    """A key as text, the same for equal keys."""
    return json.dumps(key, sort_keys=True, allow_nan=False)
