"""Reading small files that anybody may have written, as strict JSON; digests of JSON. Imports no torch."""

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

_LARGEST = 256 * 2**20  # bytes; result files and plans are a few KiB, artifacts of large models some MiB
_LARGEST_INTEGER = 2**63


def read_file(path: Path, largest: int = _LARGEST) -> bytes:
    """The content of a regular file.

    Raises `OSError`, and `ValueError` for what could block or fill the memory: pipes, devices, more bytes than
    `largest`.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("not a regular file")
        if found.st_size > largest:
            raise ValueError(f"{found.st_size:,} bytes are more than such a file has")
        return file.read(largest)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises `OSError` and `ValueError`, as `read_file` and `parse_json` do."""
    return parse_json(read_file(path))


def parse_json(content: bytes) -> Any:
    """JSON as the standard has it: UTF-8, finite numbers, nesting that can be read, integers of 64 bits.

    Raises `ValueError` for anything else.
    """
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_not_a_number, parse_float=_finite, parse_int=_integer
        )
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _not_a_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is too large a number")
    return number


def _integer(text: str) -> int:
    if len(text) > 20 or not -_LARGEST_INTEGER <= int(text) < _LARGEST_INTEGER:
        raise ValueError(f"{text[:20]} is too large a number")
    return int(text)


def canonical(key: dict) -> str:
    """A key as JSON text; equal keys give equal text."""
    return json.dumps(key, sort_keys=True, allow_nan=False)


def digest_of_json(content: dict) -> str:
    """SHA-256 of what can be written as JSON."""
    as_read = json.loads(json.dumps(content, allow_nan=False))  # where every name is a text
    return hashlib.sha256(canonical(as_read).encode()).hexdigest()
