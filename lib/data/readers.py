"""Files to rows. Text is decoded strictly and unpacked within bounds; nothing is cached, so that content decides."""

import codecs
import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from lib.config.sources import PACKINGS, TEXT_KINDS
from lib.errors import InputError, first_line

LARGEST = 16 * 2**30  # characters of a source, unpacked, or bytes of its rows
LARGEST_IN_MEMORY = 2**30  # the same, needed at once: of a document, a JSON array, or all to evaluate on

_UTF_BY_MARK = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
_UTF_BY_MARK |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # the first begins one of UTF-32
_BUFFER = 2**20  # bytes
_ROWS_AT_ONCE = 100


def kind(path: Path) -> str | None:
    """By its name, what a file holds: `txt`, `json`, `csv` (all three also packed) or `parquet`; None if no text."""
    found = TEXT_KINDS.get(_suffix(path))
    return None if found == "parquet" and path.suffix.lower() in PACKINGS else found


def _suffix(path: Path) -> str:
    """The suffix of what a file holds, without that of its packing."""
    is_packed = path.suffix.lower() in PACKINGS
    return Path(path.stem if is_packed else path.name).suffix.lower()


def read_text(path: Path, largest: int = LARGEST_IN_MEMORY) -> str:
    """The text of a file, with line ends as `\\n`. Raises `InputError` for more than `largest` characters."""
    with _opened(path, None) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise too_large(str(path), largest)
    return text


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON, CSV or Parquet; of Parquet only the given columns. Raises `InputError`."""
    if kind(path) == "parquet":
        return _parquet_rows(path, columns)
    return _json_rows(path) if kind(path) == "json" else _csv_rows(path)


def too_large(name: str, largest: int, unit: str = "characters") -> InputError:
    """The error for more than `largest` characters or bytes of text."""
    return InputError(f"{name}: has more than {largest:,} {unit} of text; give a part of it, such as its first lines")


def unreadable(name: str, error: Exception, problem: str = "cannot be read") -> InputError:
    """The error for what a library cannot read, with the first line of what it says."""
    return InputError(f"{name}: {problem} ({first_line(error.__cause__ or error)})")


@contextmanager
def _opened(path: Path, newline: str | None) -> Iterator[io.TextIOWrapper]:
    """The unpacked text of a file: UTF-8, or UTF-16 or UTF-32 by its byte order mark. Raises `InputError`."""
    example = f"iconv -f latin1 -t utf-8 {path.name} > utf8-{path.name}"
    not_utf8 = InputError(f"{path}: is not UTF-8, nor UTF-16 with its mark; convert it (if it is Latin-1: {example})")
    try:
        with pyarrow.input_stream(str(path), PACKINGS.get(path.suffix.lower())) as stream:
            buffer = io.BufferedReader(stream, _BUFFER)
            start = buffer.peek()
            encoding = next((utf for mark, utf in _UTF_BY_MARK.items() if start.startswith(mark)), None)
            if not encoding and b"\0" in start:
                codecs.getincrementaldecoder("utf-8")().decode(start)  # raises for what is no UTF-8
                advice = "take them out, or, if it is UTF-16 without its mark, convert it to UTF-8"
                raise InputError(f"{path}: holds NUL characters; {advice}")
            yield io.TextIOWrapper(buffer, encoding or "utf-8", newline=newline)
    except UnicodeError as error:
        raise not_utf8 from error
    except (OSError, pyarrow.ArrowException) as error:
        raise unreadable(str(path), error) from error


def _lines(path: Path, newline: str) -> Iterator[str]:
    """The lines of a file with their ends, within bounds."""
    count = 0
    with _opened(path, newline) as file:
        while line := file.readline(LARGEST_IN_MEMORY + 1):
            count += len(line)
            if len(line) > LARGEST_IN_MEMORY:
                raise too_large(f"{path}: one line", LARGEST_IN_MEMORY)
            if count > LARGEST:
                raise too_large(str(path), LARGEST)
            yield line


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of JSON Lines, of an array of objects, or a single object."""
    is_array = None
    for number, line in enumerate(_lines(path, "\n"), 1):
        if line.isspace():
            continue
        if is_array is None:
            is_array = line.lstrip().startswith("[") or line.strip() == "{"
        if is_array:
            break
        where = f"{path}: line {number}"
        yield _checked(_parse(line, where), where)
    if is_array:
        found = _parse(read_text(path), str(path))
        for index, row in enumerate(found if isinstance(found, list) else [found]):
            yield _checked(row, f"{path}: item {index}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise unreadable(where, error) from error


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: is no JSON object; give one with a `text` for each document")
    return row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows below a header, separated by commas, or tabs if `.tsv`."""
    csv.field_size_limit(LARGEST_IN_MEMORY)
    rows = csv.DictReader(_lines(path, ""), delimiter="\t" if _suffix(path) == ".tsv" else ",", strict=True)
    try:
        for row in rows:
            if None in row:
                raise InputError(f"{path}: line {rows.line_num} has more fields than the header; put text in quotes")
            yield row
    except csv.Error as error:
        raise unreadable(f"{path}: after line {rows.line_num}", error) from error


def _parquet_rows(path: Path, columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if columns is None or name in columns]
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=names):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        raise unreadable(str(path), error) from error
