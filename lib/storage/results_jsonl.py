"""results.jsonl, the finished cells of a grid: one line per cell, appended atomically. Does not import torch."""

import fcntl
import json
import os
from pathlib import Path

from lib.errors import InputError
from lib.files import canonical, digest_of_json, parse_json, read_file
from lib.storage.atomic import atomic_file
from lib.storage.output_folder import RESULTS

_LARGEST = 2**32  # bytes of a file


class ResultsFile:
    """The results of a grid's cells by their key: everything that a result depends on, as `canonical` text."""

    def __init__(self, folder: Path, overwrite: bool = False, is_writer: bool = True):
        """Reads the existing file, unless `overwrite`. Raises `InputError` for a file that no grid wrote.

        All processes of a run hold the results; only the one with `is_writer` writes them. An incomplete last line,
        which a power failure can leave, is ignored.
        """
        self.path, self._overwrite, self._is_writer = folder / RESULTS, overwrite, is_writer
        self._found: dict[str, dict] = {}
        try:
            content = b"" if overwrite else read_file(self.path, _LARGEST)
        except (FileNotFoundError, NotADirectoryError):
            content = b""
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read ({error}); {_ADVICE}") from error
        for number, line in enumerate(content.splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = parse_json(line)
                if entry.pop("digest") != digest_of_json(entry):
                    raise ValueError("its digest does not match")
                self._found[canonical(dict(entry["key"]))] = dict(entry["result"])
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                what = f"line {number} is not of a grid's results ({error})"
                raise InputError(f"{self.path}: {what}; {_ADVICE}") from error

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
        entry = {"key": json.loads(key), "result": result}
        line = (json.dumps({**entry, "digest": digest_of_json(entry)}, allow_nan=False) + "\n").encode()
        self._found[key] = json.loads(line)["result"]
        if not self._is_writer:
            return
        if self._overwrite:
            with atomic_file(self.path) as draft:
                draft.write_bytes(line)
            self._overwrite = False
            return
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


_ADVICE = "move the file away, or name another --output_dir"
