"""What local models, texts and task files hold when a run begins, and whether they stay so. Imports no torch."""

import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.config.model_files import all_weights, weight_files
from lib.config.sources import expand, is_demo, is_gguf, locate_model, parse_text, text_files
from lib.errors import InputError, InputsChanged
from lib.files import read_file

MODEL, TEXT, FILE = "model", "text", "file"  # what a name is given as; a file is one of gradients, tasks or prompts
_MANY = 10 * 10**9  # bytes, which take some 10 seconds or more
_THREADS = 4  # a digest is computed without the interpreter's lock
_YAML = (".yaml", ".yml")
_TASK_FOLDER = re.compile(r"\b(?:dataset_path|data_dir)['\"]?:\s*['\"]?([^\s'\"{},]+)")
_NOT_LOADED = (".md", ".log", ".png", ".tsv", ".csv", ".gguf", ".pth", ".h5", ".msgpack", ".onnx")
_OF_RUNS = ("result.json", "results.jsonl", "log.txt")  # which may stand in the folder of a model
_C4_UNREAD = re.compile(r"c4-(train|validation)\.(?!00000)\d{5}-of-\d{5}\.json\.gz")

Input = tuple[str, str]  # what a name is given as, and the name


@dataclass(frozen=True)
class Snapshot:
    """Local models, texts and other files as they were at one time, by what a command gives: "model NAME", "text NAME".

    `stamps` has what a key says of each: its path with a digest of what its files hold; hub ids are taken as they are.
    `files` has what tells that a file was changed: its size, times, inode and digest, by path.
    """

    stamps: dict[str, str]
    files: dict[str, dict[str, list]]

    @classmethod
    def take(
        cls,
        inputs: Iterable[Input],
        agree: Callable[[Callable[[], dict]], dict] = lambda function: function(),
        tell: Callable[[str], object] = lambda line: None,
    ) -> "Snapshot":
        """Reads all files of these inputs, in the first process of several: `agree` gives its result to all.

        Tells when that takes long. Raises `InputError` for a file that cannot be read.
        """
        return cls(**agree(lambda: asdict(cls._take(inputs, tell))))

    @classmethod
    def _take(cls, inputs: Iterable[Input], tell: Callable[[str], object]) -> "Snapshot":
        given = {entry(*one): one for one in inputs}
        found = {name: _files(*one) for name, one in given.items()}
        every = list(dict.fromkeys(path for paths in found.values() for path in paths))
        if (size := sum(os.path.getsize(path) for path in every)) > _MANY:
            tell(f"Reading     {size / 10**9:.0f} GB of models and texts once, for a digest of what they hold")
        with ThreadPoolExecutor(_THREADS) as pool:
            looks = dict(zip(every, pool.map(_look, every), strict=True))
        files = {name: {str(path): looks[path] for path in paths} for name, paths in found.items()}
        return cls({name: _stamp(*given[name], files[name]) for name in files}, files)

    def check(self, inputs: Iterable[Input]) -> None:
        """Raises `InputsChanged`, naming a file, if one of these inputs was changed meanwhile.

        A file that is new is a change of a text, but not of a model, in whose folder runs may write.
        """
        for kind, name in inputs:
            known = self.files[entry(kind, name)]
            present = {} if kind == MODEL else dict.fromkeys(map(str, _files(kind, name)))
            for path in {**present, **known}:
                if path not in known or not _is_as_it_was(Path(path), *known[path]):
                    raise InputsChanged(f"{path}: was changed while the run worked, so it gives no result")


def entry(kind: str, name: str) -> str:
    """The name of an input in a snapshot."""
    return f"{kind} {name}"


def _place(kind: str, name: str) -> Path:
    if kind == MODEL:
        return Path(locate_model(name))
    return parse_text(name).path if kind == TEXT else expand(name)


def _files(kind: str, name: str) -> list[Path]:
    """The files of an input that loading may read, in order; none for a hub id, or the text of the demo."""
    path = _place(kind, name)
    try:
        if kind == MODEL:
            return sorted(set(_model_files(path))) if os.path.isdir(path) else [path] if is_gguf(name) else []
        if (kind, name) == (TEXT, "demo"):
            return []
        if os.path.isfile(path):
            return list(_task_files(path)) if kind == FILE and path.suffix in _YAML else [path]
        if kind == FILE or not os.path.isdir(path):
            return []
        return [file for file in text_files(path) if not _C4_UNREAD.fullmatch(file.name)]
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be read ({error}); make its files readable") from error


def _model_files(folder: Path) -> Iterator[Path]:
    """The files at the top, and of those below the weights, chat templates, and code; no weights that are not loaded.

    Folders below may hold anything else: results, other models.
    """
    yield from (path for path in weight_files(folder) if os.path.isfile(path))
    top = [path for path in folder.iterdir() if _is_visible_file(path, folder) and path.suffix not in _NOT_LOADED]
    yield from (path for path in set(top) - all_weights(folder) if path.name not in _OF_RUNS)
    yield from (path for path in folder.glob("additional_chat_templates/*") if path.is_file())
    if any(path.suffix == ".py" for path in top):
        code = (path for path in folder.rglob("*.py") if _is_visible_file(path, folder))
        yield from (path for path in code if path.parent == folder or not (path.parent / "config.json").is_file())


def _is_visible_file(path: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()


def _task_files(path: Path) -> dict[Path, None]:
    """A task's YAML file with all files that it names: what it includes, the code of its functions, its data.

    Of a folder that it names as its data set, the files that may be read as text.
    """
    found: dict[Path, None] = {}
    left = [Path(os.path.realpath(path))]
    while left:
        file = left.pop()
        if file in found:
            continue
        found[file] = None
        text = read_file(file).decode("utf-8", "replace") if file.suffix in _YAML else ""
        for folder in re.findall(_TASK_FOLDER, text):
            for place in (file.parent / folder, Path(folder)):
                left += [Path(os.path.realpath(path)) for path in text_files(place)] if os.path.isdir(place) else []
        for word in re.findall(r"[^\s'\"\[\]{},]+", text):
            module = word.rpartition(".")[0].replace(".", "/") + ".py"
            places = (file.parent / word, Path(word), file.parent / module)
            left += [Path(os.path.realpath(place)) for place in places if os.path.isfile(place)]
    return found


def _look(path: Path) -> list:
    """Size, times (ns), inode and SHA-256 of a file. Raises `InputError` if it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            stat, digest = os.fstat(file.fileno()), hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, digest]


def _is_as_it_was(path: Path, size: int, mtime: int, ctime: int, inode: int, digest: str) -> bool:
    """True for a file that was not written to. What is only linked, renamed or has other rights is read again."""
    try:
        stat = path.stat()
    except OSError:
        return False
    if (stat.st_size, stat.st_mtime_ns) != (size, mtime):
        return False
    return (stat.st_ctime_ns, stat.st_ino) == (ctime, inode) or _look(path)[-1] == digest


def _stamp(kind: str, name: str, files: dict[str, list]) -> str:
    """What a key says of an input. The demo text comes from the documentation of Python, so it goes by its version."""
    if (kind, name) == (TEXT, "demo"):
        return f"demo, Python {platform.python_version()}"
    if not files:
        return name
    place = _place(kind, name).absolute()
    content = hashlib.sha256()
    for path, (*_, digest) in files.items():
        content.update(os.fsencode(os.path.relpath(path, place)) + f" {digest}\n".encode())
    part = name.removeprefix(parse_text(name).source) if kind == TEXT else ""  # configuration and column, if given
    what = "demo" if kind == MODEL and is_demo(name) else f"{place}{part}"
    return f"{what} {content.hexdigest()[:16]}"
