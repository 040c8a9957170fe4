"""English technical prose found on every machine with Python: the documentation shipped with Python itself.

A document is one language-reference topic (`pydoc_data.topics`) or all docstrings of one top-level standard-library
module. The modules are parsed, not imported. A tenth of the documents is held out of the demo model's training. They
are chosen by a hash of the document's name, so that the split is the same on every Python version.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SPLITS = ("train", "held_out")
_SHORTEST = 400  # characters; shorter documents are stubs
_NOT_PROSE = {"test", "idlelib", "lib2to3", "turtledemo", "encodings", "ensurepip", "distutils", "pydoc_data", "msilib"}


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def is_held_out(name: str) -> bool:
    """True for the tenth of the documents that the demo model was not trained on."""
    return _digest(name)[0] % 10 == 0


def docstrings(source: bytes) -> list[str]:
    """The docstrings of a Python source file, in file order; empty if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found: list[str] = []
    stack: list[ast.Module | ast.ClassDef | ast.FunctionDef] = [tree]
    while stack:
        node = stack.pop()
        text = ast.get_docstring(node)
        if text:
            found.append(text)
        body = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
        stack.extend(reversed(body))
    return found


def module_document(paths: list[Path]) -> str:
    """All docstrings of the given source files, without duplicates, separated by blank lines."""
    unique = dict.fromkeys(text for path in paths for text in docstrings(path.read_bytes()))
    return "\n\n".join(unique)


def _standard_library() -> Iterator[tuple[str, list[Path]]]:
    """Yields the name and source files of each top-level standard-library module, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    for entry in sorted(root.iterdir(), key=lambda path: path.stem):
        name = entry.stem
        if name.startswith("_") or name in _NOT_PROSE or not name.isidentifier():
            continue
        if entry.suffix == ".py":
            yield name, [entry]
        elif (entry / "__init__.py").is_file():
            yield name, sorted(path for path in entry.rglob("*.py") if "test" not in str(path.relative_to(root)))


def documents(split: str) -> list[str]:
    """The documents of one split, `train` or `held_out`, with topics and modules mixed by the hashes of their names.

    Reads only the files of that split. Raises `ValueError` for another split.
    """
    if split not in SPLITS:
        raise ValueError(f"the demo text has the splits {' and '.join(SPLITS)}, not {split!r}")
    wanted = split == "held_out"
    texts = {"topic:" + name: topics[name] for name in topics if is_held_out("topic:" + name) is wanted}
    for name, paths in _standard_library():
        if is_held_out("module:" + name) is wanted:
            texts["module:" + name] = module_document(paths)
    return [texts[name] for name in sorted(texts, key=_digest) if len(texts[name]) >= _SHORTEST]
