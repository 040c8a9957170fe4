"""The types of flags: text to value, or one line that says what was expected. Imports no torch."""

import argparse
import errno
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from lib.config.methods import Pattern, parse_pattern
from lib.config.sources import expand
from lib.errors import describe_failure, did_you_mean, first_line


def boolean(text: str) -> bool:
    """True/False in any case, also 1/0 and yes/no."""
    word = text.strip().lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def choice(options: Collection[str], synonyms: Mapping[str, str] | None = None) -> Callable[[str], str]:
    """One of some words, in any case, or a synonym of one."""
    known = {option.lower(): option for option in options} | dict(synonyms or {})

    def chosen(text: str) -> str:
        if text.strip().lower() not in known:
            raise argparse.ArgumentTypeError(f"invalid choice: {text!r}; {did_you_mean(text, options)}")
        return known[text.strip().lower()]

    return chosen


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    word = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,19}", word) and lowest <= int(word) <= _LARGEST:
        return int(word)
    meant = _float(word.replace(",", "") if re.fullmatch(_THOUSANDS, word) else word)
    if meant >= _LARGEST:
        raise argparse.ArgumentTypeError(f"{word[:20]!r} is too large a number, or the start of one")
    is_whole = lowest <= meant and meant.is_integer()
    advice = f"; did you mean {int(meant)}?" if is_whole else ""
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}{advice}")


_LARGEST = 2**63 - 1  # of an integer in files of results
_THOUSANDS = r"[1-9][0-9]{0,2}(,[0-9]{3})+"


def between_0_and_1(text: str) -> float:
    """A number between 0 and 1, neither included."""
    return _number(text, "not a number between 0 and 1", lambda number: 0 < number < 1, is_share=True)


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, "not a number of at least 0 and below 1", lambda number: 0 <= number < 1, is_share=True)


def at_most_1(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "not a number from 0 to 1", lambda number: 0 <= number <= 1, is_share=True)


def above_0(text: str) -> float:
    """A number above 0."""
    return _number(text, "not a number above 0", lambda number: 0 < number < float("inf"))


def up_to_10(text: str) -> float:
    """A number above 0, up to 10."""
    return _number(text, "not a number above 0, up to 10", lambda number: 0 < number <= 10)


def ratio(text: str) -> float | str:
    """A number from 0.01 to 100, or `auto`."""
    if text.strip().lower() == "auto":
        return "auto"
    return _number(text, "neither a number from 0.01 to 100 nor auto", lambda number: 0.01 <= number <= 100)


def _number(text: str, what: str, is_fine: Callable[[float], bool], is_share: bool = False) -> float:
    number = _float(text)
    if is_fine(number):
        return number + 0.0  # which makes -0.0 what it is
    meant = _meant(text, is_share)
    advice = f"; did you mean {meant:.10g}?" if is_fine(meant) else ""
    raise argparse.ArgumentTypeError(f"{text!r} is {what}{advice}")


def _meant(text: str, is_share: bool) -> float:
    """The number that was certainly meant by one with a comma, a percent sign or, for a share, percent without it.

    NaN where that is not certain: `1,000` may be 1 or 1000, `5` may be 5% or a half, `1.5` is no share at all.
    """
    found = re.fullmatch(r"([0-9]*)(?:([.,])([0-9]+))?\s*(%?)", text.strip())
    if not found or not (found[1] or found[3]) or (found[2] == "," and re.fullmatch(_THOUSANDS, text.strip(" %"))):
        return float("nan")
    number = float(f"{found[1] or 0}.{found[3] or 0}")
    is_percent = found[4] or (is_share and 10 <= number < 100)
    return number / 100 if is_percent else number


def _float(text: str) -> float:
    """The number that a text stands for, NaN for none."""
    try:
        return float(text)
    except ValueError:
        return float("nan")


def pattern(text: str) -> Pattern:
    """`unstructured` or `n:m`."""
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def group_size(text: str) -> int | None:
    """A whole number above 0, or -1 for none."""
    return None if text.strip() == "-1" else positive(text)


def name(text: str) -> str:
    """The name of a model or text: anything that a file can be called."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    try:
        if max(map(len, text.encode().split(b"/"))) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        os.stat(expand(text))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # of the hub, or to be written; the checks know
    except (OSError, ValueError) as error:  # a loop of links, a name too long, or not UTF-8
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: {describe_failure(error) or first_line(error)}") from error
    return text


def folder(text: str) -> Path:
    """A path, `~` expanded."""
    path = expand(name(text))
    if text.startswith("~") and str(path).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no home folder is known of that user")
    return path
