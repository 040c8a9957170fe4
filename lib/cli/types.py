"""The types of flags: text to value, or one line that says what was expected. Imports no torch."""

import argparse
from collections.abc import Callable
from pathlib import Path

from lib.config.methods import Pattern, parse_pattern
from lib.config.sources import expand


def boolean(text: str) -> bool:
    """True/False in any case, also 1/0 and yes/no."""
    word = text.strip().lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def positive(text: str) -> int:
    """A whole number above 0."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    return _at_least(0, text)


def _at_least(lowest: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = lowest - 1
    if number < lowest:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {lowest}")
    return number


def between_0_and_1(text: str) -> float:
    """A number between 0 and 1, neither included."""
    return _number(text, "a number between 0 and 1", lambda number: 0 < number < 1)


def share(text: str) -> float:
    """A number of at least 0 and below 1."""
    return _number(text, "a number of at least 0 and below 1", lambda number: 0 <= number < 1)


def at_most_1(text: str) -> float:
    """A number from 0 to 1."""
    return _number(text, "a number from 0 to 1", lambda number: 0 <= number <= 1)


def above_0(text: str) -> float:
    """A number above 0."""
    return _number(text, "a number above 0", lambda number: 0 < number < float("inf"))


def up_to_10(text: str) -> float:
    """A number above 0, up to 10."""
    return _number(text, "a number above 0, up to 10", lambda number: 0 < number <= 10)


def _number(text: str, what: str, is_fine: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not is_fine(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def pattern(text: str) -> Pattern:
    """`unstructured` or `n:m`."""
    try:
        return parse_pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def group_size(text: str) -> int | None:
    """A whole number above 0, or -1 for none."""
    return None if text.strip() == "-1" else positive(text)


def ratio(text: str) -> float | str:
    """A number from 0.01 to 100, or `auto`."""
    try:
        if text == "auto":
            return text
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.01 <= number <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number from 0.01 to 100 nor auto")
    return number


def name(text: str) -> str:
    """The name of a model or text: anything but an empty string."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty name")
    return text


def folder(text: str) -> Path:
    """A path, `~` expanded."""
    path = expand(name(text))
    if text.startswith("~") and str(path).startswith("~"):
        raise argparse.ArgumentTypeError(f"{text}: no home folder is known of that user")
    return path
