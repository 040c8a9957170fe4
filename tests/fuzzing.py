"""What hypothesis makes of a valid file: other bytes, other JSON, and the file with single values or bytes changed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from lib.errors import InputError

BOUNDED = settings(max_examples=200, derandomize=True, deadline=None, database=None)
NUMBERS = st.sampled_from([0, -1, 2**63, 10**30, 1e308, 5e-324, float("nan"), float("inf")]) | st.integers(-3, 20_000)
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=20)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5)
)


def places(content: Any, before: tuple = ()) -> list[tuple]:
    """The places of all values in JSON, as keys and indices."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [before] if before else []
    return found + [place for key, value in inner for place in places(value, (*before, key))]


def changed(valid: Any) -> st.SearchStrategy[Any]:
    """The content with one or two of its values replaced by anything, or taken away."""

    def change(changes: list[tuple[tuple, Any, bool]]) -> Any:
        content = copy.deepcopy(valid)
        for place, value, is_removed in changes:
            try:
                owner = content
                for key in place[:-1]:
                    owner = owner[key]
                if is_removed:
                    del owner[place[-1]]
                else:
                    owner[place[-1]] = value
            except (LookupError, TypeError):
                continue  # what it was in is gone
        return content

    one = st.tuples(st.sampled_from(places(valid)), ANY_JSON, st.booleans())
    return st.lists(one, min_size=1, max_size=2).map(change)


def cut_or_flipped(content: bytes) -> st.SearchStrategy[bytes]:
    """The bytes with one of them changed, and perhaps without an end."""

    def change(at: int, byte: int, cut: int) -> bytes:
        return (content[:at] + bytes([byte]) + content[at + 1 :])[: len(content) - cut]

    return st.builds(change, st.integers(0, len(content) - 1), st.integers(0, 255), st.integers(0, 3))


def written(content: Any) -> bytes:
    """JSON as Python writes it, a line."""
    return json.dumps(content).encode() + b"\n"


def parse(path: Path, content: bytes | None, read: Callable[[], Any]) -> Any:
    """What a parser makes of a file, of that content if given; None where it refuses it with one printable line."""
    if content is not None:
        path.write_bytes(content)
    try:
        return read()
    except InputError as error:
        assert str(error).isprintable() and 0 < len(str(error)) < 1000, str(error)
        return None


def fuzz(strategy: st.SearchStrategy[bytes]):
    """A test of the files of a strategy, of a bounded number of examples that are always the same."""

    def decorate(test: Callable) -> Callable:
        return BOUNDED(given(content=strategy)(test))

    return decorate
