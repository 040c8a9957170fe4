"""Calibration texts, several of which are mixed: `c4:0.7 wikitext2:0.3`. Imports no torch."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lib.config.sources import expand
from lib.errors import InputError

SELF = "self"  # the name of text that the model itself makes


@dataclass(frozen=True)
class Mixture:
    """Names of texts, and the share of the samples that each gives; shares need not add up to 1."""

    texts: tuple[str, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def of(cls, text: str) -> "Mixture":
        """A single text."""
        return cls((text,), (1.0,))

    def __str__(self) -> str:
        if len(self.texts) == 1:
            return self.texts[0]
        return " ".join(f"{text}:{share:.12g}" for text, share in zip(self.texts, self.shares, strict=True))

    @property
    def read(self) -> tuple[str, ...]:
        """The texts that there are before the run."""
        return tuple(text for text in self.texts if text != SELF)

    @property
    def is_sampled(self) -> bool:
        """True when the model itself makes some of the text."""
        return SELF in self.texts

    def counts(self, total: int) -> dict[str, int]:
        """How many of `total` samples each text gives; what cannot be divided comes from the first texts.

        Raises `InputError` for a text that would give none.
        """
        exact = [Fraction(repr(share)) for share in self.shares]
        found = {text: int(total * share / sum(exact)) for text, share in zip(self.texts, exact, strict=True)}
        for text in self.texts[: total - sum(found.values())]:
            found[text] += 1
        if empty := [text for text, count in found.items() if count == 0]:
            raise InputError(f"calibration text {self}: {empty[0]} gives none of {total} samples; ask for more")
        return found


def parse_mixture(flag: str, names: Sequence[str]) -> Mixture:
    """The texts that a flag names, each of which may end in `:SHARE`; without shares they are equal.

    Raises `InputError` for a share that is none, shares of some texts only or of a single one, and a text named twice.
    """
    found = [_split_share(name) for name in names]
    texts, shares = [text for text, _ in found], [share for _, share in found if share is not None]
    if wrong := [share for share in shares if not 0 < share < math.inf]:
        raise InputError(f"{flag}: {wrong[0]:g} is no share of a text; give a number above 0")
    if len(names) == 1 and shares:
        raise InputError(f"{flag} {names[0]}: is the share of a single text; name others too, or leave it out")
    if shares and len(shares) < len(names):
        without = next(name for name, share in found if share is None)
        raise InputError(f"{flag}: {without} has no share, but others have; give one to each text, or to none")
    if len({os.path.realpath(expand(text)) for text in texts}) < len(texts):
        raise InputError(f"{flag}: names a text twice; name each once, with shares as in c4:3 wikitext2:1")
    return Mixture(tuple(texts), tuple(shares or [1.0] * len(texts)))


def check_evaluation_text(flag: str, name: str) -> None:
    """Raises `InputError` for what only a calibration text can be: mixed in a share, or made by the model."""
    if name == SELF:
        raise InputError(f"{flag} {SELF}: is text for calibration, which the model makes; name one that there is")
    if _split_share(name)[1] is not None:
        raise InputError(f"{flag} {name}: only calibration texts are mixed in shares; leave the number out")


def _split_share(name: str) -> tuple[str, float | None]:
    """A text and the number after its last colon, if there is one; a file or folder of the whole name comes first."""
    text, _, number = name.rpartition(":")
    if not text or text.endswith(":") or expand(name).exists():
        return name, None
    try:
        return text, float(number)
    except ValueError:
        return name, None
