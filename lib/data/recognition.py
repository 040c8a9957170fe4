"""Tells the published texts, which are read as in the reference code, from others, by columns and content.

C4 is recognized by its columns, WikiText by its ` = Title = ` headings, the Penn Treebank by its lines or its column.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lib.data.columns import choose
from lib.data.documents import Documents
from lib.data.readers import LARGEST, LARGEST_IN_MEMORY, too_large
from lib.errors import InputError

_C4_COLUMNS = {"text", "timestamp", "url"}
_C4_EVAL_DOCUMENTS, _C4_EVAL_WINDOWS = 1100, 256
_PTB_COLUMN = "sentence"  # in its copies as tables
_PTB_HEAD = 20_000  # characters to examine
_HEAD = 200  # rows to examine

ReadRows = Callable[..., Iterator[dict[str, Any]]]  # of all columns, or of some


@dataclass(frozen=True)
class Corpus:
    """Documents of text, with the separator and the maximum number of windows for evaluation.

    `label` says how they were read, `files` from where.
    """

    name: str
    documents: Sequence[str | None]
    separator: str = "\n\n"
    max_windows: int | None = None
    label: str = ""
    files: tuple[Path, ...] = ()


def corpus_of_texts(source: str, texts: Sequence[str], files: Sequence[Path]) -> Corpus:
    """A document of each plain text, or all sentences of the Penn Treebank."""
    if all(_is_ptb(text) for text in texts):
        return _corpus_of_ptb(source, [line for text in texts for line in text.splitlines()], files)
    label = "the whole file" if len(files) == 1 else f"{len(files)} whole files"
    return Corpus(source, texts, label=label, files=tuple(files))


def corpus_of_rows(
    source: str, column: str | None, read: ReadRows, files: Sequence[Path], purpose: str, tokenizer
) -> Corpus:
    """The corpus in a table, of which `read` gives the rows. Raises `InputError` if there is no text in it."""
    head = list(islice(read(), _HEAD))
    if not head:
        raise InputError(f"dataset {source}: it has no rows")
    column = column or (_PTB_COLUMN if _is_ptb_table(head) else None)
    reading = choose(source, head, column, tokenizer)
    is_c4 = set(head[0]) == _C4_COLUMNS and reading.columns == ("text",)
    used = islice(read(reading.columns), _C4_EVAL_DOCUMENTS if is_c4 and purpose == "test" else None)
    rows = _complete(source, used, reading.columns)
    documents = Documents(source, rows, reading.render, LARGEST if purpose == "train" else LARGEST_IN_MEMORY)
    if is_c4:
        return Corpus(source, documents, " ", _C4_EVAL_WINDOWS, f"{reading.label}, as C4", tuple(files))
    if reading.columns == (_PTB_COLUMN,) and _is_ptb_table(head):
        return _corpus_of_ptb(source, _in_memory(source, documents), files)
    first = next((line for line in islice(documents, 10) if line and line.strip()), "")
    if re.fullmatch(r" = .+ = \n?", first):
        joined = (" " if purpose == "train" else "\n\n").join(line or "" for line in _in_memory(source, documents))
        return Corpus(source, [joined], label=f"{reading.label}, as WikiText", files=tuple(files))
    return Corpus(source, documents, label=reading.label, files=tuple(files))


def _complete(source: str, rows: Iterable[dict[str, Any]], columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows with all of the columns. Raises `InputError` for one that lacks any but Alpaca's `input`."""
    for number, row in enumerate(rows):
        for name in columns:
            if name not in row and name != "input":
                advice = "take such rows out, or name files that have it"
                raise InputError(f"dataset {source}: row {number} has no column `{name}`; {advice}")
        yield {name: row.get(name) for name in columns}


def _in_memory(source: str, documents: Documents) -> list[str | None]:
    if documents.bytes > LARGEST_IN_MEMORY:
        raise too_large(f"dataset {source}", LARGEST_IN_MEMORY, "bytes")
    return list(documents)


def _is_ptb_table(head: Sequence[dict[str, Any]]) -> bool:
    return "text" not in head[0] and _is_ptb("\n".join(f" {str(row.get(_PTB_COLUMN)).strip()} " for row in head))


def _is_ptb(text: str) -> bool:
    """True for the usual Penn Treebank text: one sentence per line between spaces, lower case, N and <unk>."""
    head = text[:_PTB_HEAD]
    lines = head.splitlines()[: -1 if len(text) > _PTB_HEAD else None]
    return " <unk> " in head and all(re.fullmatch(r" ([^\sA-Z]+ |N )+", line) for line in lines)


def _corpus_of_ptb(source: str, sentences: Sequence[str | None], files: Sequence[Path]) -> Corpus:
    """One document of all sentences, joined by spaces: the GPTQ code calls it ptb-new."""
    joined = " ".join(sentence.strip() for sentence in sentences if sentence)
    return Corpus(source, [joined], label="sentences of the Penn Treebank", files=tuple(files))
