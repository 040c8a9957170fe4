"""What a person is told of the texts of a run: how each was read, how it begins, and what is odd about it."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch

from lib.config.mixture import SELF
from lib.data.recognition import Corpus
from lib.errors import printable

_SHOWN = 60  # characters
_DOCUMENTS, _CHARACTERS = 20, 5000  # to examine: so many documents, so much at the start and in the middle of each
_JUNK = 0.02  # share of characters that no text has, from which on it is none
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of terminals, in logs
_SPACES, _LETTERS, _IN_WORDS = 0.1, 0.4, 0.65  # shares: of all characters spaces and letters, of letters those in words


def describe_texts(calibration: Sequence[Corpus], evaluation: Sequence[Corpus]) -> list[str]:
    """Console lines: one for each text, and one for each warning."""
    lines: list[str] = []
    for place, corpus in enumerate((*calibration, *evaluation)):
        purpose = "calibration" if place < len(calibration) else "evaluation"
        first = next((text for text in islice(corpus.documents, _DOCUMENTS) if text and text.strip()), "")
        lines.append(f'Text        {corpus.name} ({purpose}): {corpus.label}, begins "{_start(first)}"')
        if not looks_like_text(_sample(corpus)):
            lines.append(f"Warning     {corpus.name}: does not look like text; figures on it mean little")
    for corpus in evaluation:
        if any(_share_files(other, corpus) for other in calibration):
            lines.append(
                f"Warning     {corpus.name}: is calibration text too, so its perplexity is too good; use another"
            )
    return list(map(printable, lines))


def describe_own_text(windows: torch.Tensor, tokenizer, purpose: str) -> str:
    """The console line for windows (N, T) that the model made."""
    known = windows[0, :_SHOWN][windows[0, :_SHOWN] < len(tokenizer)]  # a model may have more tokens than it
    start = _start(tokenizer.decode(known.tolist(), skip_special_tokens=True))
    return printable(f'Text        {SELF} ({purpose}): sampled from the model, begins "{start}"')


def _start(text: str) -> str:
    return " ".join(text[:_SHOWN].split())


def looks_like_text(sample: str) -> bool:
    """False for noise: characters that no text has, or few spaces and letters that often stand in no words.

    A word is three letters or more of one case, with or without a capital; in scripts without cases it is any letter.
    Formulas, games of chess and tables have few words too, but spaces.
    """
    classes = "".join(map(_class_of, _COLOURS.sub("", sample)))
    letters = len(re.findall("[lUo]", classes))
    in_words = sum(map(len, re.findall("U?l{2,}|U{3,}|o+", classes)))
    is_junk = classes.count("x") > _JUNK * len(classes)
    is_dense = classes.count(" ") < _SPACES * len(classes) and letters > _LETTERS * len(classes)
    return not is_junk and not (is_dense and in_words < _IN_WORDS * letters)


def _class_of(character: str) -> str:
    """`l`, `U`, `o` for letters of lower, upper or no case, ` ` for spaces, `x` for what no text has, else `-`."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)
    if category in ("Cc", "Cn", "Co", "Cs") or character == "\ufffd":
        return "x"
    return {"Ll": "l", "Lu": "U"}.get(category, "o" if category[0] in "LM" else "-")


def _sample(corpus: Corpus) -> str:
    found = []
    for text in islice(corpus.documents, _DOCUMENTS):
        middle = len(text or "") // 2
        found += [text[:_CHARACTERS], text[middle : middle + _CHARACTERS]] if text else []
    return "".join(found)


def _share_files(first: Corpus, second: Corpus) -> bool:
    """True if a file of one has the content of a file of the other."""
    if first.label != second.label:
        return False
    sizes = [{path.stat().st_size for path in corpus.files} for corpus in (first, second)]
    digests = [
        {_digest(path) for path in corpus.files if path.stat().st_size in sizes[0] & sizes[1]}
        for corpus in (first, second)
    ]
    return not digests[0].isdisjoint(digests[1])


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
