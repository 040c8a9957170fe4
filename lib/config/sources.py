"""What the names of models and texts refer to, and checks of them that need no network. Imports no torch."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lib.demo import DEMO_MODEL
from lib.errors import InputError

TEXT_SUFFIXES = (".txt", ".json", ".jsonl", ".parquet", ".gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_HUB_TEXT = re.compile(_HUB_ID.pattern + r"(:[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


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


def expand(name: str) -> Path:
    """A name as a path, with `~` expanded; `~user` of an unknown user stays as it is."""
    return Path(os.path.expanduser(name))


def is_demo(model: str) -> bool:
    """True for the bundled model, by name or by path."""
    return model == "demo" or os.path.realpath(expand(model)) == str(DEMO_MODEL)  # which stands links in a loop


def locate_model(name: str) -> str:
    """What a library can load: the folder of `demo`, a path without `~`, or the hub id."""
    if is_demo(name):
        return str(DEMO_MODEL)
    path = expand(name)
    return str(path) if path.exists() else name


def is_hub_model(name: str) -> bool:
    """True when a model's name can only be a hub id: nothing of that name exists here, and it looks like one."""
    return name != "demo" and not expand(name).exists() and bool(_HUB_ID.fullmatch(name))


def local_path(name: str) -> str | None:
    """The absolute path of a model in a local folder; None for hub ids and the bundled model."""
    path = expand(name)
    return str(path.absolute()) if path.is_dir() and not is_demo(name) else None


def short_name(model: str) -> str:
    """The last part of a hub id or path, for file names; `demo` for the bundled model."""
    return "demo" if is_demo(model) else expand(model).absolute().name


def labels(names: Iterable[str]) -> dict[str, str]:
    """A short name for each of several models or texts; names that would clash stay whole."""
    short = {name: short_name(name) for name in names}
    shared = Counter(short.values())
    return {name: label if shared[label] == 1 else name for name, label in short.items()}


def check_model(name: str) -> None:
    """Raises `InputError` unless a local name is a folder with a config, weights and a tokenizer; hub ids pass."""
    if is_demo(name) or is_hub_model(name):
        return
    folder = expand(name)
    if not folder.is_dir():
        raise InputError(f"model {name}: no such folder; give a hub id or a folder with config.json and weights")
    if not (folder / "config.json").is_file():
        raise InputError(f"model {name}: no config.json in this folder; give one that save_pretrained() wrote")
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise InputError(f"model {name}: no weights (*.safetensors) in this folder; give one with its weights")
    if not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        raise InputError(f"model {name}: no tokenizer in this folder; copy tokenizer.json of the model into it")
    for index in sorted(folder.rglob("*.index.json")):
        _check_index(name, index)


def _check_index(name: str, index: Path) -> None:
    """Raises `InputError` for an index of weights that names files outside its folder."""
    try:
        files = [Path(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return  # the loader reports a broken index
    for file in files:
        if file.is_absolute() or ".." in file.parts:
            raise InputError(f"model {name}: {index.name} names weights outside the folder ({file}); copy them into it")


def is_hub_text(name: str) -> bool:
    """True when a text's name can only be one of the hub's: `c4`, `wikitext2`, an id or `id:config`."""
    is_file_name = name.lower().endswith(TEXT_SUFFIXES)
    is_here = name == "demo" or expand(name).exists()
    return not is_here and not is_file_name and bool(_HUB_TEXT.fullmatch(name))


def check_text(name: str) -> None:
    """Raises `InputError` for a path to text that does not exist; hub ids pass."""
    if name == "ptb" and not Path(name).exists():
        raise InputError("dataset ptb: is not on the hub in a form that loads; give the path of ptb.test.txt")
    if name != "demo" and not is_hub_text(name) and not expand(name).exists():
        raise InputError(f"dataset {name}: no such file or folder; give a path, a hub id, c4, wikitext2 or demo")
