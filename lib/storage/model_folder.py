"""Folders that a model is saved to: what may be replaced there. Imports no torch."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from lib.errors import InputError
from lib.storage.atomic import check_writable

# What `save_pretrained` of models and tokenizers writes; hub extras, such as a README, may hold work of the user's.
_KNOWN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]+\.jinja|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json|(modeling|configuration|tokenization)_\w+\.py"
)


def check_model_folder(folder: Path, overwrite: bool) -> None:
    """Raises `InputError` unless a model may be saved there.

    The folder must be new or empty; with `overwrite` it may hold a model and nothing else.
    """
    check_writable(folder, "--save_model")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--save_model {folder}: exists and is not empty; name another folder or add --overwrite")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--save_model {folder}: holds no model, so --overwrite does not replace it; name another folder"
        )
    foreign = next((name for path in _files(folder) if not _KNOWN.fullmatch(name := _name(folder, path))), None)
    if foreign:
        what = f"holds {foreign} beside a model, so --overwrite does not replace it"
        raise InputError(f"--save_model {folder}: {what}; name another folder")


def check_holds_none_of(folder: Path, paths: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raises `InputError` for a folder that is, or lies above, one of the paths, or a file of one of the inputs.

    The files of an input may lie elsewhere, if they are links.
    """
    target = folder.resolve()
    linked = (file for path in inputs if path.is_dir() for file in path.rglob("*") if file.is_symlink())
    for path in (*paths, *inputs, *linked):
        found = path.resolve()
        if target == found or target in found.parents:
            raise InputError(f"--save_model {folder}: would replace {path}, which this run uses; name another folder")


def signature(folder: Path) -> str | None:
    """A digest of the names, sizes and times of a folder's files, which moving it does not change; None without it."""
    if not folder.is_dir():
        return None
    stats = [(_name(folder, path), (found := path.lstat()).st_size, found.st_mtime_ns) for path in _files(folder)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """All files below the folder, and folders that hold nothing; links not followed, and without those of macOS."""
    found = sorted(path for path in folder.rglob("*") if path.name != ".DS_Store")
    return [path for path in found if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
