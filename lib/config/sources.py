"""What the names of models and texts refer to, and checks of them that need no network. Imports no torch."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lib.config.model_files import GGUF, check_folder, hub_id_of, refuse_path
from lib.demo import DEMO_MODEL
from lib.errors import InputError

TEXT_KINDS = {".txt": "txt", ".md": "txt", ".json": "json", ".jsonl": "json", ".ndjson": "json"}
TEXT_KINDS |= {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # of the content, by suffix
PACKINGS = {".gz": "gzip", ".zst": "zstd"}  # of any of these but .parquet, by a second suffix
TEXT_SUFFIXES = (*TEXT_KINDS, *PACKINGS)
_TEXT_OR_ARROW = (*TEXT_SUFFIXES, ".arrow")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ModelSource:
    """Which model, and how it is loaded; the fields are the flags of these names."""

    name: str
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    trust_remote_code: bool = False
    cache_dir: Path | None = None
    offload: str = "auto"


@dataclass(frozen=True)
class TextName:
    """A text's name in its parts: `source` (a path, hub id, or known name), `source:config`, `source::column`."""

    source: str
    config: str | None = None
    column: str | None = None

    @property
    def path(self) -> Path:
        """The source as a path, whether there is such a file or not."""
        return expand(self.source)


def parse_text(name: str) -> TextName:
    """Takes the name of a text apart; a file or folder of the whole name, or of a longer part of it, comes first."""
    if expand(name).exists():
        return TextName(name)
    source, colons, column = name.partition("::")
    found = TextName(source, None, column if colons else None)
    if not found.path.exists():
        source, colon, config = source.rpartition(":")
        if colon:
            found = replace(found, source=source, config=config)
    return found


def expand(name: str) -> Path:
    """A name as a path, with `~` expanded; `~user` of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def is_demo(model: str) -> bool:
    """True for the bundled model, by name or by path."""
    return model == "demo" or "\0" not in model and os.path.realpath(expand(model)) == str(DEMO_MODEL)


def locate_model(name: str) -> str:
    """What a library can load: the folder of `demo`, a path without `~` of a folder or GGUF file, or the hub id."""
    if is_demo(name):
        return str(DEMO_MODEL)
    path = expand(name)
    return str(path) if path.exists() else name


def is_hub_model(name: str) -> bool:
    """True when a model's name can only be a hub id: nothing of that name exists here, and it looks like one."""
    is_here = name == "demo" or expand(name).exists()
    return not is_here and not name.lower().endswith(GGUF) and bool(_HUB_ID.fullmatch(name))


def is_gguf(name: str) -> bool:
    """True when a model's name is that of a GGUF file."""
    path = expand(name)
    return path.suffix.lower() == GGUF and path.is_file()


def local_path(name: str) -> str | None:
    """The absolute path of a model in a local folder or GGUF file; None for hub ids and the bundled model."""
    path = expand(name)
    return str(path.absolute()) if path.exists() and not is_demo(name) else None


def short_name(model: str) -> str:
    """The last part of a hub id or path, for file names; `demo` for the bundled model."""
    return "demo" if is_demo(model) else expand(model).absolute().name.removesuffix(GGUF)


def labels(names: Iterable[str]) -> dict[str, str]:
    """A short name for each of several models or texts; names that would clash stay whole."""
    short = {name: short_name(name) for name in names}
    shared = Counter(short.values())
    return {name: label if shared[label] == 1 else name for name, label in short.items()}


def check_model(name: str) -> None:
    """Raises `InputError` unless a local name is a GGUF file, or a folder with a config, weights and a tokenizer.

    Hub ids pass.
    """
    if is_demo(name):
        return
    if address := hub_id_of(name):
        raise InputError(f"model {name}: is an address of the hub; give {address}")
    if is_hub_model(name):
        return
    path = expand(name)
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"model {name}: its path is not UTF-8, which libraries cannot read; rename it") from error
    if is_gguf(name):
        return
    if not path.is_dir():
        raise InputError(f"model {name}: {refuse_path(path)}")
    check_folder(name, path)


def text_files(folder: Path) -> list[Path]:
    """The files below a folder that may be read as text, by their names, sorted; none that are hidden.

    Among them are the card, and the files of `save_to_disk`.
    """
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in _TEXT_OR_ARROW)
    visible = sorted(name for name in names if not any(part.startswith(".") for part in name.parts))
    return [path for path in (folder / name for name in visible) if path.is_file()]


def is_hub_text(name: str) -> bool:
    """True when a text's name can only be one of the hub's: `c4`, `wikitext2`, an id, `id:config` or `id::column`."""
    text = parse_text(name)
    is_file_name = text.source.lower().endswith(TEXT_SUFFIXES)
    is_here = text.source == "demo" or text.path.exists()
    has_config = text.config is None or re.fullmatch(r"[\w.-]+", text.config)
    return not is_here and not is_file_name and bool(_HUB_ID.fullmatch(text.source) and has_config)


def check_text(name: str) -> None:
    """Raises `InputError` for a path to text that does not exist; hub ids pass."""
    if name == "demo":
        return
    text = parse_text(name)
    if text.source == "ptb" and not text.path.exists():
        raise InputError("dataset ptb: is not on the hub in a form that loads; give the path of ptb.test.txt")
    if not is_hub_text(name) and not text.path.exists():
        raise InputError(f"dataset {name}: no such file or folder; give a path, a hub id, c4, wikitext2 or demo")
    if text.column == "":
        raise InputError(f"dataset {name}: no column after `::`; name the one that holds the text")
