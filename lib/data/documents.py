"""Documents in a temporary file, so that text may be larger than memory."""

import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lib.data.readers import too_large
from lib.errors import InputError


class Documents(Sequence[str | None]):
    """A document of every row: the rows lie in a file without a name, and are rendered when asked for."""

    def __init__(
        self, source: str, rows: Iterable[dict[str, Any]], render: Callable[[dict[str, Any]], str | None], largest: int
    ):
        """Writes the rows. Raises `InputError` for more than `largest` bytes."""
        self._source, self._render = source, render
        self._file = tempfile.TemporaryFile(buffering=_BUFFER)
        self._ends = array("q", [0])  # of the rows, in bytes
        try:
            for row in rows:
                content = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
                self._ends.append(self._ends[-1] + self._file.write(content))
                if self._ends[-1] > largest:
                    raise too_large(f"dataset {source}", largest, "bytes")
        except OSError as error:
            raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error

    @property
    def bytes(self) -> int:
        """The size of all documents, about."""
        return self._ends[-1]

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index):
        start, end = self._ends[range(len(self))[index]], self._ends[range(1, len(self) + 1)[index]]
        self._file.seek(start)
        row = json.loads(self._file.read(end - start).decode("utf-8", "surrogatepass"))
        try:
            text = self._render(row)
            (text or "").encode()  # raises for half of a surrogate pair, which no tokenizer takes
            return text
        except ValueError as error:
            raise InputError(f"dataset {self._source}: row {index}: {error}") from error


_BUFFER = 2**20  # bytes
