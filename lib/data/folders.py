"""Which files of a folder are the text: those that people mean, of the configuration and split that is asked for."""

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from lib.config.sources import TEXT_SUFFIXES, TextName, text_files
from lib.data.readers import kind, unreadable
from lib.errors import InputError
from lib.files import read_file

C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_CARD = "README.md"
_NO_TEXT = ("dataset_info.json", "dataset_infos.json", _CARD)  # found in copies of public repositories
_SPLITS = ("train", "test", "validation", "valid", "val")
_LARGEST_CARD = 16 * 2**20  # bytes

Item = TypeVar("Item")


def find_files(text: TextName, purpose: str) -> list[Path]:
    """The files of a local text for `purpose` "train" or "test". Raises `InputError` if there are none."""
    if text.path.is_file() and text.config:
        raise InputError(f"dataset {text.source}: is a file, without configurations; leave out :{text.config}")
    if text.path.is_file():
        files = [text.path] if kind(text.path) else []
    else:
        files = _files_below(text, purpose)
    if not files:
        raise InputError(f"dataset {text.source}: no {', '.join(TEXT_SUFFIXES[:-1])} or {TEXT_SUFFIXES[-1]} file there")
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"dataset {text.source}: {file} is empty")
    kinds = sorted({str(kind(file)) for file in files})
    if len(kinds) > 1:
        raise InputError(f"dataset {text.source}: files of several types ({', '.join(kinds)}); give one of them")
    return files


def choose_split(source: str, items: Sequence[Item], purpose: str, name: Callable[[Item], str]) -> list[Item]:
    """What is named for a split of this purpose, or everything if some name mentions no split.

    Raises `InputError` if everything is named for another purpose. To use such text, name its files.
    """
    words = [re.split(r"[^a-z]+", name(item).lower()) for item in items]
    by_split = {split: [item for item, of in zip(items, words, strict=True) if split in of] for split in _SPLITS}
    for split in _SPLITS[:1] if purpose == "train" else _SPLITS[1:]:
        if by_split[split]:
            return by_split[split]
    if items and all(set(of) & set(_SPLITS) for of in words):
        needed = "training" if purpose == "train" else "test or validation"
        raise InputError(f"dataset {source}: no {needed} file in this folder; to use another split, name its file")
    return list(items)


def _files_below(text: TextName, purpose: str) -> list[Path]:
    """The files below a folder; in a copy of C4 or WikiText, only those of the configuration in use."""
    names = [path.relative_to(text.path) for path in text_files(text.path)]
    names = [name for name in names if name.name not in _NO_TEXT and kind(name)]
    c4 = [name for name in names if name.name in {Path(file).name for file in C4_FILES.values()}]
    wikitext = [name for name in names if WIKITEXT_CONFIG in name.parts]
    if text.config or not (c4 or wikitext):
        names = _of_config(text, names, purpose)
    else:
        names = choose_split(text.source, [n for n in c4 if n.parent.name == "en"] or c4 or wikitext, purpose, str)
    return [text.path / name for name in names]


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    """The configurations in the front matter of a data set's card, by name. Raises `InputError`."""
    card = folder / _CARD
    if not card.is_file():
        return {}
    try:
        front = re.match(r"---\s*\n(.*?)\n---", read_file(card, _LARGEST_CARD).decode("utf-8-sig"), re.DOTALL)
        fields = yaml.safe_load(front[1]) if front else None
        listed = fields.get("configs") if isinstance(fields, dict) else None
        if not all(isinstance(config.get("data_dir", ""), str) for config in listed or ()):
            raise ValueError("data_dir is not one folder")
        return {str(config["config_name"]): config for config in listed or ()}
    except (OSError, ValueError, yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise unreadable(str(card), error, "its configurations cannot be read; name files of this folder") from error


def _of_config(text: TextName, names: list[Path], purpose: str) -> list[Path]:
    """Those of a folder's files that are of the named or default configuration, and of its split for the purpose."""
    configs = _configs(text.path)
    if not configs and not text.config:
        return choose_split(text.source, names, purpose, str)
    default = [name for name, config in configs.items() if config.get("default") or name == "default"]
    default = default or [name for name in configs if len(configs) == 1]
    chosen = text.config or next(iter(default), None)
    if chosen not in configs:
        listed = ", ".join(configs) or "none"
        raise InputError(f"dataset {text.source}: its {_CARD} lists the configurations {listed}; add one, as :NAME")
    within = Path(configs[chosen].get("data_dir") or ".")
    splits = _patterns(configs[chosen].get("data_files") or "**")
    patterns = [pattern for split in choose_split(text.source, list(splits), purpose, str) for pattern in splits[split]]
    for place in (within, *(Path(pattern) for pattern in patterns)):
        if place.is_absolute() or ".." in place.parts:
            raise InputError(
                f"dataset {text.source}: its {_CARD} names files outside the folder ({place}); name your files"
            )
    found = {
        within / name
        for pattern in patterns
        for name in glob.glob(pattern, root_dir=text.path / within, recursive=True)
    }
    names = [name for name in names if name in found]
    if not names:
        raise InputError(f"dataset {text.source}: no file of its configuration {chosen} is there; download it")
    return choose_split(text.source, names, purpose, str) if "" in splits else names


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """The patterns of a card's `data_files` by split; the split is empty where they are not told apart."""
    if isinstance(data_files, list) and all(isinstance(entry, dict) for entry in data_files):
        data_files = {str(entry.get("split", "")): entry.get("path") for entry in data_files}
    if not isinstance(data_files, dict):
        data_files = {"": data_files}
    return {
        str(split): [str(path) for path in (paths if isinstance(paths, list) else [paths])]
        for split, paths in data_files.items()
    }
