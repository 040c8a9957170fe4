"""Loads the documents of a text source, given by name or path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lib.config.sources import TextName, check_text, parse_text
from lib.data.folders import C4_FILES, WIKITEXT_CONFIG, choose_split, find_files
from lib.data.readers import LARGEST_IN_MEMORY, kind, read_rows, read_text, unreadable
from lib.data.recognition import Corpus, corpus_of_rows, corpus_of_texts
from lib.errors import InputError

ALIASES = {"c4": "allenai/c4", "wikitext2": "Salesforce/wikitext", "wikitext": "Salesforce/wikitext"}
_ROWS_AT_ONCE = 200


def load_corpus(source: str, purpose: str, tokenizer=None) -> Corpus:
    """The text behind a name or path, for `purpose` "train" (calibration) or "test" (evaluation).

    `source` is `demo`, `c4`, `wikitext2`, a hub id, a file of one of `TEXT_KINDS`, a folder of such files, or one that
    `save_to_disk` wrote; `:config` selects a configuration of the hub or of a folder, `::column` a column. Chats are
    rendered by the tokenizer's chat template, if it has one. Raises `InputError` if there is no such text.
    """
    if source == "demo":
        from lib.demo.text import documents

        joined = "\n\n".join(documents("train" if purpose == "train" else "held_out"))
        return Corpus("demo", [joined], label="documentation of Python")
    check_text(source)
    text = parse_text(source)
    if not text.path.exists():
        return _load_hub(source, text, purpose, tokenizer)
    if any((text.path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _load_saved(source, text, purpose, tokenizer)
    files = find_files(text, purpose)
    if kind(files[0]) == "txt":
        return _load_plain(source, text, files)
    return corpus_of_rows(source, text.column, partial(_rows_of_files, files), files, purpose, tokenizer)


def _load_plain(source: str, text: TextName, files: Sequence[Path]) -> Corpus:
    if text.column:
        raise InputError(f"dataset {source}: is plain text, without columns; leave out ::{text.column}")
    texts: list[str] = []
    for file in files:
        texts.append(read_text(file, LARGEST_IN_MEMORY - sum(map(len, texts))))
    return corpus_of_texts(source, texts, files)


def _load_saved(source: str, text: TextName, purpose: str, tokenizer) -> Corpus:
    """The rows of a folder that `save_to_disk` wrote."""
    import datasets

    with _input_errors(source, "cannot be read"):
        found = datasets.load_from_disk(str(text.path))
    splits = choose_split(source, list(found), purpose, str) if isinstance(found, datasets.DatasetDict) else []
    return _corpus_of_tables(source, text, [found[split] for split in splits] or [found], purpose, tokenizer)


def _load_hub(source: str, text: TextName, purpose: str, tokenizer) -> Corpus:
    import datasets

    repository = ALIASES.get(text.source, text.source)
    options: dict = {"name": text.config}
    if repository == ALIASES["c4"]:
        options = {"data_files": {purpose: C4_FILES[purpose]}}
    elif repository == ALIASES["wikitext2"] and not text.config:
        options = {"name": WIKITEXT_CONFIG}
    with _input_errors(source, "cannot be loaded from the hub; without a network give the path of a local copy"):
        table = datasets.load_dataset(repository, split=_hub_split(repository, options, purpose), **options)
    return _corpus_of_tables(source, text, [table], purpose, tokenizer)


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
        raise unreadable(f"dataset {source}", error, problem) from error


def _corpus_of_tables(source: str, text: TextName, tables: Sequence, purpose: str, tokenizer) -> Corpus:
    """The corpus in tables of the datasets library."""
    files = [Path(file["filename"]) for table in tables for file in table.cache_files]
    return corpus_of_rows(source, text.column, partial(_rows_of_tables, source, tables), files, purpose, tokenizer)


def _rows_of_files(files: Sequence[Path], columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    for file in files:
        yield from read_rows(file, columns)


def _rows_of_tables(source: str, tables: Sequence, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Rows as they are stored: other columns may refer to files, such as images, that decoding would open."""
    with _input_errors(source, "cannot be read"):
        for table in tables:
            names = [name for name in table.column_names if columns is None or name in columns]
            for batch in table.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
                batch.validate(full=True)  # a damaged file of Arrow's would end the process
                yield from batch.to_pylist()
