"""What local models, texts and task files hold when a run begins, and whether they stay so. Imports no torch."""

import hashlib
import os
import platform
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lib.config.sources import is_demo, parse_text
from lib.demo import DEMO_MODEL
from lib.errors import InputError, InputsChanged
from lib.files import read_file, read_json

_THREADS = 4  # a digest is computed without the interpreter's lock
_BLOCK = 2**20  # bytes
_YAML = (".yaml", ".yml")
_NOT_LOADED = (".md", ".log", ".png", ".tsv", ".csv", ".gguf", ".pth", ".h5", ".msgpack", ".onnx")
_OF_RUNS = ("result.json", "results.jsonl", "log.txt")  # which may stand in the folder of a model
_C4_UNREAD = re.compile(r"c4-(train|validation)\.(?!00000)\d{5}-of-\d{5}\.json\.gz")


@dataclass(frozen=True)
class Snapshot:
    """Local models, texts and other files as they were at one time, by the names that a command gives them.

    `stamps` has what a key says of each: its path with a digest of what its files hold; hub ids are taken as they are.
    `files` has what tells that a file was changed: its size, times, inode and digest, by name and path.
    """

    stamps: dict[str, str]
    files: dict[str, dict[str, list]]

    @classmethod
    def take(cls, names: Iterable[str]) -> "Snapshot":
        """Reads all files of these names. Raises `InputError` for one that cannot be read."""
        found = {name: _files(name) for name in dict.fromkeys(names)}
        every = list(dict.fromkeys(path for paths in found.values() for path in paths))
        with ThreadPoolExecutor(_THREADS) as pool:
            looks = dict(zip(every, pool.map(_look, every), strict=True))
        files = {name: {str(path): looks[path] for path in paths} for name, paths in found.items()}
        return cls({name: _stamp(name, files[name]) for name in files}, files)

    def check(self, names: Iterable[str]) -> None:
        """Raises `InputsChanged`, naming a file, if one of these names was changed meanwhile."""
        for name in names:
            known = self.files[name]
            is_model = _is_model(_place(name))  # into whose folder runs may write
            present = {} if is_model else dict.fromkeys(map(str, _files(name)))
            for path in {**present, **known}:
                if path not in known or not _is_as_it_was(Path(path), *known[path]):
                    raise InputsChanged(f"{path}: was changed while the run worked, so it gives no result")


def _place(name: str) -> Path:
    return DEMO_MODEL if is_demo(name) else parse_text(name).path


def _is_model(path: Path) -> bool:
    return os.path.isfile(path / "config.json")


def _files(name: str) -> list[Path]:
    """The files of a name that loading may read, in order; none for a hub id."""
    path = _place(name)
    try:
        if os.path.isfile(path):
            return list(_task_files(path)) if path.suffix in _YAML else [path]
        if not os.path.isdir(path):
            return []
        return sorted(set(_model_files(path) if _is_model(path) else _text_files(path)))
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({error}); make its files readable") from error


def _model_files(folder: Path) -> Iterator[Path]:
    """The files at the top, and of those below the shards that an index names, chat templates, and code.

    Folders below may hold anything else: results, other models.
    """
    top = [path for path in folder.iterdir() if _is_visible_file(path, folder) and path.suffix not in _NOT_LOADED]
    top = [path for path in top if path.name not in _OF_RUNS]
    yield from top
    yield from (path for path in folder.glob("additional_chat_templates/*") if path.is_file())
    for index in (path for path in top if path.name.endswith(".index.json")):
        yield from (path for shard in _shards(index) if os.path.isfile(path := folder / shard))
    if any(path.suffix == ".py" for path in top):
        code = (path for path in folder.rglob("*.py") if _is_visible_file(path, folder))
        yield from (path for path in code if path.parent == folder or not _is_model(path.parent))


def _shards(index: Path) -> set[str]:
    """The files of weights that an index names; none of a broken one, which the loader reports."""
    try:
        return {name for name in read_json(index)["weight_map"].values() if isinstance(name, str)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return set()


def _text_files(folder: Path) -> Iterator[Path]:
    """All files but hidden ones, and of a copy of C4 those that are read."""
    visible = (path for path in folder.rglob("*") if _is_visible_file(path, folder))
    return (path for path in visible if not _C4_UNREAD.fullmatch(path.name))


def _is_visible_file(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()


def _task_files(path: Path) -> dict[Path, None]:
    """A task's YAML file with all files that it names: what it includes, the code of its functions, its data."""
    found: dict[Path, None] = {}
    left = [Path(os.path.realpath(path))]
    while left:
        file = left.pop()
        if file in found:
            continue
        found[file] = None
        text = read_file(file).decode("utf-8", "replace") if file.suffix in _YAML else ""
        for word in re.findall(r"[^\s'\"\[\]{},]+", text):
            module = word.rpartition(".")[0].replace(".", "/") + ".py"
            places = (file.parent / word, Path(word), file.parent / module)
            left += [Path(os.path.realpath(place)) for place in places if os.path.isfile(place)]
    return found


def _look(path: Path) -> list:
    """Size, times (ns), inode and SHA-256 of a file. Raises `InputError` if it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            stat, digest, block = os.fstat(file.fileno()), hashlib.sha256(), bytearray(_BLOCK)
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, digest.hexdigest()]


def _is_as_it_was(path: Path, size: int, mtime: int, ctime: int, inode: int, digest: str) -> bool:
    """True for a file that was not written to. What is only linked, renamed or has other rights is read again."""
    try:
        stat = path.stat()
    except OSError:
        return False
    if (stat.st_size, stat.st_mtime_ns) != (size, mtime):
        return False
    return (stat.st_ctime_ns, stat.st_ino) == (ctime, inode) or _look(path)[-1] == digest


def _stamp(name: str, files: dict[str, list]) -> str:
    """What a key says of a name. The demo text comes from the documentation of Python, so it goes by its version."""
    if not files and not is_demo(name):
        return name
    place = _place(name).absolute()
    content = hashlib.sha256()
    for path, (*_, digest) in files.items():
        content.update(os.fsencode(os.path.relpath(path, place)) + f" {digest}\n".encode())
    part = name.removeprefix(parse_text(name).source)  # the configuration and the column, if given
    what = f"demo, Python {platform.python_version()}" if is_demo(name) else f"{place}{part}"
    return f"{what} {content.hexdigest()[:16]}"
