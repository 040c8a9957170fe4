"""Reads the header of a GGUF file; the weights stay on disk, memory-mapped.

The reader of the package `gguf` believes every count in a header, and hangs or fills the memory on a broken file. Here
each is bounded by the bytes that are left in the file, and what they could be used for.
"""

import mmap
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.storage.model_folder import GGUF_MAGIC

ALIGNMENT = "general.alignment"

_CODES = dict(zip(range(13), ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"), strict=True))
_VERSIONS = (2, 3)
_MOST_ITEMS = 2**23  # in all lists of a header; a vocabulary of 256,000 has about 1.3 million
_LARGEST_ALIGNMENT = 2**20  # bytes
_MOST_DIMENSIONS = 4  # GGML_MAX_DIMS


@dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its shape with the row length first, its `gguf.GGMLQuantizationType`, and its bytes.

    `data` is a uint8 array with the dimensions in numpy's order and the bytes of a row in the last.
    """

    shape: tuple[int, ...]
    kind: Any
    data: Any


@dataclass(frozen=True)
class Header:
    """The content of a GGUF file. `keys` maps a name to (value, type), or (value, type, item type) for a list."""

    keys: dict[str, tuple]
    tensors: dict[str, Tensor]
    is_big_endian: bool


def refuse(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: {reason}")


def read_header(path: Path) -> Header:
    """Reads and checks a header. Raises `InputError` for what is no GGUF file, a broken one, or could not be copied."""
    if not path.is_file():
        raise refuse(path, "is not a file; give a GGUF file of the model")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise refuse(path, "needs the gguf package, which is not installed; pip install gguf") from error
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = _Reader(data).read()
    except OSError as error:
        raise refuse(path, f"cannot be read ({error.strerror})") from error
    except _CannotCopy as error:
        raise refuse(path, f"{error}, which the gguf package cannot write") from error
    except ValueError as error:
        raise refuse(path, f"is not a GGUF file, or a broken one ({error})") from error
    if header.keys.get("split.count", (1,))[0] != 1:
        advice = "join the parts first with llama-gguf-split --merge"
        raise refuse(path, f"is one part of a split model; {advice}")
    return header


class _CannotCopy(ValueError):
    """A valid part of a file that the package `gguf` cannot write."""


class _Reader:
    """Reads a header from its first byte to its last. Raises `ValueError` for a broken one."""

    def __init__(self, data: mmap.mmap):
        self.data, self.position, self.items, self.order = data, 0, 0, "<"

    def read(self) -> Header:
        if self._take(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version % 2**16 == 0:  # a small number in the other byte order
            self.order = ">"
            version = int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}; known are 2 and 3")
        tensors, keys = self._count(24), self._count(13)  # bytes of the smallest of each
        found = _unique("key", (self._key() for _ in range(keys)))
        infos = _unique("tensor", (self._tensor_info() for _ in range(tensors)))
        return Header(found, self._map_tensors(infos, _alignment(found)), self.order == ">")

    def _take(self, size: int) -> bytes:
        if size > len(self.data) - self.position:
            raise ValueError("it ends within its header")
        self.position += size
        return self.data[self.position - size : self.position]

    def _numbers(self, code: str, count: int) -> tuple:
        layout = f"{self.order}{count}{code}"
        content = self._take(struct.calcsize(layout))
        if code == "?" and any(byte > 1 for byte in content):
            raise ValueError("a boolean that is neither 0 nor 1")
        return struct.unpack(layout, content)

    def _number(self, code: str) -> Any:
        return self._numbers(code, 1)[0]

    def _count(self, item_size: int) -> int:
        """The length of a list whose items have this many bytes or more."""
        count = self._number("Q")
        self.items += count
        if count * item_size > len(self.data) - self.position or self.items > _MOST_ITEMS:
            raise ValueError(f"{count:,} items are more than it can hold")
        return count

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _key(self) -> tuple[str, tuple]:
        from gguf import GGUFValueType

        name, kind = self._text(), GGUFValueType(self._number("I"))
        if kind == GGUFValueType.STRING:
            return name, (self._text(), kind)
        if code := _CODES[kind]:
            return name, (self._number(code), kind)
        item = GGUFValueType(self._number("I"))
        code = _CODES[item]
        count = self._count(struct.calcsize(f"={code or 'Q'}"))
        if not count or item == GGUFValueType.ARRAY:
            raise _CannotCopy(f"key {name} is an empty list or one of lists")
        values = list(self._numbers(code, count)) if code else [self._text() for _ in range(count)]
        return name, (values, kind, item)

    def _tensor_info(self) -> tuple[str, tuple[tuple[int, ...], int, int]]:
        """(name, (shape, number of the type, offset in the data))."""
        name, dimensions = self._text(), self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        return name, (self._numbers("Q", dimensions), self._number("I"), self._number("Q"))

    def _map_tensors(self, infos: dict[str, tuple], alignment: int) -> dict[str, Tensor]:
        import numpy
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        tensors, places = {}, []
        everything = numpy.frombuffer(self.data, numpy.uint8)
        begin = -(-self.position // alignment) * alignment
        for name, (shape, number, offset) in infos.items():
            kind = GGMLQuantizationType(number)
            block_size, block_bytes = GGML_QUANT_SIZES[kind]
            row = shape[0] // block_size * block_bytes
            first, last = begin + offset, begin + offset + row * prod(shape[1:])
            if shape[0] % block_size or first >= last or offset % alignment or last > len(everything):
                raise ValueError(f"tensor {name} is outside of the file, or no whole number of blocks")
            places.append((first, last, name))
            tensors[name] = Tensor(shape, kind, everything[first:last].reshape(*shape[:0:-1], row))
        for (_, last, name), (first, _, other) in pairwise(sorted(places)):
            if first < last:
                raise ValueError(f"tensors {name} and {other} overlap")
        return tensors


def _unique(what: str, pairs: Iterable[tuple[str, tuple]]) -> dict[str, tuple]:
    """The pairs as a dict. Raises `ValueError` for a name that comes twice."""
    found: dict[str, tuple] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{what} {name} comes twice")
        found[name] = value
    return found


def _alignment(keys: dict[str, tuple]) -> int:
    """The alignment of the tensors in bytes, by default 32. Raises `ValueError` for one that cannot be used."""
    from gguf import GGUFValueType

    value, *kind = keys.get(ALIGNMENT, (32, GGUFValueType.UINT32))
    if kind != [GGUFValueType.UINT32] or not 0 < value <= _LARGEST_ALIGNMENT or value & (value - 1):
        raise ValueError(f"its alignment is {value}, not a power of two up to {_LARGEST_ALIGNMENT:,}")
    return value
