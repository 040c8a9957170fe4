"""Folders and GGUF files that a model is saved to: what may be replaced there. Imports no torch."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from lib.errors import InputError
from lib.files import read_file
from lib.storage.atomic import check_writable

GGUF_MAGIC = b"GGUF"
CARD = "README.md"
_SEAL, _LARGEST_CARD = "\n<!-- written by the run that saved this model, with SHA-256: ", 2**22  # bytes

# What `save_pretrained` of models and tokenizers writes; a README, or what else hubs have, may hold work of the user's.
_KNOWN = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(merges|vocab)\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.(jinja|json)"
    r"|additional_chat_templates/[^/]+\.jinja|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json|(modeling|configuration|tokenization)_\w+\.py"
)


def is_gguf_target(target: Path | None) -> bool:
    """True for a name that says that a model is saved as one GGUF file."""
    return target is not None and target.suffix.lower() == ".gguf"


def check_gguf_target(target: Path, overwrite: bool, flag: str) -> None:
    """Raises `InputError` unless a GGUF file may be written there; with `overwrite` it may replace one."""
    check_writable(target.parent if target.exists() else target, flag)
    if target.exists():
        is_gguf = target.is_file() and _begins_as_gguf(target)
        if not is_gguf or not overwrite:
            state, advice = ("exists", " or add --overwrite") if is_gguf else ("exists and is no GGUF file", "")
            raise InputError(f"{flag}: {target} {state}; name another file{advice}")
    elif target.is_symlink():
        raise InputError(f"{flag}: {target} is a link that leads nowhere; name another file")


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GGUF_MAGIC)) == GGUF_MAGIC


def check_model_target(folder: Path, overwrite: bool) -> None:
    """Raises `InputError` unless a model may be saved there.

    The folder must be new or empty; with `overwrite` it may hold a model and nothing else. A GGUF file must be new, or
    replace one.
    """
    if is_gguf_target(folder):
        check_gguf_target(folder, overwrite, "--save_model")
        return
    check_writable(folder, "--save_model")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise InputError(f"--save_model {folder}: exists and is not empty; name another folder or add --overwrite")
    if not (folder / "config.json").is_file():
        raise InputError(
            f"--save_model {folder}: holds no model, so --overwrite does not replace it; name another folder"
        )
    ours, names = _sealed(folder), [_name(folder, path) for path in _files(folder)]
    foreign = next((name for name in names if not _KNOWN.fullmatch(name) and name not in ours), None)
    if foreign:
        what = f"holds {foreign} beside a model, so --overwrite does not replace it"
        raise InputError(f"--save_model {folder}: {what}; name another folder")


def check_room(target: Path, needed: int) -> int:
    """The free bytes of a disk. Raises `InputError` if it has no room for a model of `needed` bytes."""
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(existing).free) < needed:
        sizes = f"the model takes about {needed / 10**6:,.0f} MB, and the disk has {free / 10**6:,.0f} left"
        raise InputError(f"--save_model {target}: {sizes}; name a folder on another disk")
    return free


def seal(folder: Path, card: str, written: Iterable[str]) -> None:
    """Writes the card of a model, README.md, with digests of it and of the other files that were written beside it."""
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in written}
    digests[CARD] = hashlib.sha256(card.encode()).hexdigest()
    (folder / CARD).write_text(f"{card}{_SEAL}{json.dumps(digests)} -->\n", encoding="utf-8")


def _sealed(folder: Path) -> set[str]:
    """The files that were written with the card of a model, and not changed since."""
    try:
        card, _, end = read_file(folder / CARD, _LARGEST_CARD).decode().partition(_SEAL)
        digests = json.loads(end.removesuffix(" -->\n"))
        own = (name for name in digests if Path(name).name == name and _is_small_file(folder / name))
        contents = {name: (folder / name).read_bytes() for name in own}
    except (OSError, ValueError, AttributeError, TypeError):
        return set()
    contents |= {CARD: card.encode()} if CARD in contents else {}  # a link is not ours
    return {name for name, content in contents.items() if hashlib.sha256(content).hexdigest() == digests.get(name)}


def _is_small_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size <= _LARGEST_CARD


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
    """A digest of the names, sizes and times of a folder's files, or of one file, which moving it does not change.

    None for what is not there.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        return hashlib.sha256(repr(((found := folder.stat()).st_size, found.st_mtime_ns)).encode()).hexdigest()
    stats = [(_name(folder, path), (found := path.lstat()).st_size, found.st_mtime_ns) for path in _files(folder)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    """All files below the folder, and folders that hold nothing; links not followed, and without those of macOS."""
    found = sorted(path for path in folder.rglob("*") if path.name != ".DS_Store")
    return [path for path in found if path.is_symlink() or not path.is_dir() or not any(path.iterdir())]


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()
