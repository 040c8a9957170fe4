"""Loads the documents of a text source, given by name or path.

A source is recognized by its files and columns, not by where it lies: C4 by the names in the public repository,
WikiText by its ` = Title = ` headings, the Penn Treebank by its lines or its column, anything else by file type.
Documents are selected and joined as in the reference code.
"""

import glob
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.config.sources import check_text, expand
from lib.errors import InputError, first_line

ALIASES = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext", "wikitext": "Salesforce/wikitext"}
C4_FILES = {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"}
WIKITEXT_CONFIG = "wikitext-2-raw-v1"
_C4_COLUMNS = {"text", "timestamp", "url"}
_C4_EVAL_DOCUMENTS, _C4_EVAL_WINDOWS = 1100, 256
_METADATA = ("dataset_info.json", "dataset_infos.json")  # found in copies of public repositories
_SPLITS = ("train", "test", "validation", "valid", "val")
_ROW_TYPES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Corpus:
    """Documents of text, with the separator and the maximum number of windows for evaluation."""

    name: str
    documents: Sequence[str]
    separator: str = "\n\n"
    max_windows: int | None = None


# Loading documents ----------------------------------------------------------------------------------------------------


def load_corpus(source: str, purpose: str) -> Corpus:
    """The text behind a name or path, for `purpose` "train" (calibration) or "test" (evaluation).

    `source` is `demo`, `c4`, `wikitext2`, a hub id (`id:config` selects a configuration), a `.txt`, `.json`, `.jsonl`
    (both also `.gz`) or `.parquet` file, or a folder of such files. Raises `InputError` if there is no such text.
    """
    if source == "demo":
        from lib.demo.text import documents

        return Corpus("demo", ["\n\n".join(documents("train" if purpose == "train" else "held_out"))])
    check_text(source)
    path = expand(source)
    return _load_local(source, path, purpose) if path.exists() else _load_hub(source, purpose)


def _load_local(source: str, path: Path, purpose: str) -> Corpus:
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        raise InputError(f"dataset {source}: written by save_to_disk(); export it with to_parquet() or to_json()")
    files = [file for file in ([path] if path.is_file() else _text_files(path)) if _kind(file)]
    if not files:
        raise InputError(f"dataset {source}: no .txt, .json, .json.gz, .jsonl, .jsonl.gz or .parquet file there")
    if path.is_dir():
        files = _choose_files(source, files, purpose)
    if any(file.stat().st_size == 0 for file in files):
        raise InputError(f"dataset {source}: {next(file for file in files if file.stat().st_size == 0)} is empty")
    kinds = {kind for file in files if (kind := _kind(file))}
    if len(kinds) > 1:
        raise InputError(f"dataset {source}: files of several types ({', '.join(sorted(kinds))}); give one of them")
    if kinds == {"txt"}:
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        if all(_is_ptb(text) for text in texts):
            return _corpus_of_ptb(source, [line for text in texts for line in text.splitlines()])
        return Corpus(source, texts)
    import datasets

    with _input_errors(source, "cannot be read"):
        names = [glob.escape(str(file)) for file in files]  # `data_files` are glob patterns
        rows = datasets.load_dataset(kinds.pop(), data_files=names, split="train")
    return _corpus_of_rows(source, rows, purpose)


def _load_hub(source: str, purpose: str) -> Corpus:
    import datasets

    repository, _, config = ALIASES.get(source, source).partition(":")
    options: dict = {"name": config or None}
    if repository == ALIASES["c4"]:
        options = {"data_files": {purpose: C4_FILES[purpose]}}
    elif repository == ALIASES["wikitext2"] and not config:
        options = {"name": WIKITEXT_CONFIG}
    with _input_errors(source, "cannot be loaded from the hub; without a network give the path of a local copy"):
        rows = datasets.load_dataset(repository, split=_hub_split(repository, options, purpose), **options)
    return _corpus_of_rows(source, rows, purpose)


def _hub_split(repository: str, options: dict, purpose: str) -> str:
    """The split of a hub dataset for the purpose: `train`, or the first of test, validation, train that exists."""
    if purpose == "train" or "data_files" in options:
        return purpose
    import datasets

    splits = datasets.get_dataset_split_names(repository, config_name=options["name"])
    return next((split for split in ("test", "validation") if split in splits), "train")


@contextmanager
def _input_errors(source: str, problem: str) -> Iterator[None]:
    """Turns any error of a loading library into one line, which quotes the first line of the original."""
    try:
        yield
    except Exception as error:
        raise InputError(f"dataset {source}: {problem} ({first_line(error.__cause__ or error)})") from error


def _kind(path: Path) -> str | None:
    """`txt`, `json` or `parquet`, by the suffix of the file's name; None for other files."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".txt"]:
        return "txt"
    if suffixes[-1:] == [".gz"]:
        suffixes = suffixes[:-1] if suffixes[-2:-1] != [".parquet"] else []
    return _ROW_TYPES.get(suffixes[-1]) if suffixes else None


def _text_files(folder: Path) -> list[Path]:
    """The text files below a folder; in a copy of C4 or WikiText, only those of the configuration in use."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _METADATA and _kind(path))
    c4 = [path for path in files if path.name in {Path(name).name for name in C4_FILES.values()}]
    if c4:
        return [path for path in c4 if path.parent.name == "en"] or c4
    return [path for path in files if WIKITEXT_CONFIG in path.relative_to(folder).parts] or files


def _choose_files(source: str, files: list[Path], purpose: str) -> list[Path]:
    """The files named for a split of this purpose, or all files if some name mentions no split.

    Raises `InputError` if every file is named for another purpose. To use such text, name its files.
    """
    by_split = {split: [f for f in files if split in re.split(r"[^a-z]+", f.name.lower())] for split in _SPLITS}
    for split in _SPLITS[:1] if purpose == "train" else _SPLITS[1:]:
        if by_split[split]:
            return by_split[split]
    if all(any(file in group for group in by_split.values()) for file in files):
        needed = "training" if purpose == "train" else "test or validation"
        raise InputError(f"dataset {source}: no {needed} file in this folder; to use another split, name its file")
    return files


def _corpus_of_rows(source: str, rows, purpose: str) -> Corpus:
    """The corpus in a table's text column: C4, WikiText, PTB or plain documents, by columns and content."""
    if len(rows) == 0:
        raise InputError(f"dataset {source}: it has no rows")
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRING_TYPES]
    column = "text" if "text" in strings else strings[0] if len(strings) == 1 else None
    if column is None:
        found = ", ".join(rows.column_names)
        raise InputError(f"dataset {source}: no text column among {found}; one must hold strings, and be named `text`")
    is_c4 = set(rows.column_names) == _C4_COLUMNS
    rows = rows.select_columns(column)  # others may refer to files, such as images, that reading a row would open
    if is_c4:
        documents = rows[column] if purpose == "train" else rows[:_C4_EVAL_DOCUMENTS][column]
        return Corpus(source, documents, " ", _C4_EVAL_WINDOWS)
    if column == _PTB_COLUMN and _is_ptb("\n".join(f" {sentence.strip()} " for sentence in rows[:200][column])):
        return _corpus_of_ptb(source, rows[column])
    head = [line for line in rows[:10][column] if line and line.strip()]
    if head and re.fullmatch(r" = .+ = \n?", head[0]):
        return Corpus(source, [(" " if purpose == "train" else "\n\n").join(rows[:][column])])
    return Corpus(source, rows[column])


def _is_ptb(text: str) -> bool:
    """True for the usual Penn Treebank text: one sentence per line between spaces, lower case, N and <unk>."""
    head = text[:_PTB_HEAD]
    lines = head.splitlines()[: -1 if len(text) > _PTB_HEAD else None]
    return " <unk> " in head and all(re.fullmatch(r" ([^\sA-Z]+ |N )+", line) for line in lines)


def _corpus_of_ptb(source: str, sentences: Sequence[str]) -> Corpus:
    """One document of all sentences, joined by spaces: the GPTQ code calls it ptb-new."""
    return Corpus(source, [" ".join(sentence.strip() for sentence in sentences if sentence)])


_PTB_COLUMN = "sentence"  # in its copies as tables
_PTB_HEAD = 20_000  # characters to examine
_STRING_TYPES = ("string", "large_string", "string_view")
