"""The names of methods and patterns that a user gives, and what they mean. Imports no torch.

A method is a pair: a pruner, which knows one weight matrix and its inputs, and an allocator, which knows one number
per layer. `wanda_alp` is (`wanda`, `alp`), `wanda` is (`wanda`, `uniform`), `dense` prunes nothing.
"""

import difflib
import re
from dataclasses import dataclass

from lib.errors import InputError

DEPTH_METHODS = ("ppllms", "shortgpt", "sleb", "blockpruner", "random", "beam")
DENSE = "dense"
UNIFORM = "uniform"
PRUNERS = ("magnitude", "wanda", "sparsegpt", "ria")
ALPHAS = {"alp": 0.15, "owl": 0.08, "dlp": 0.15}  # of each allocator, its authors'
ALLOCATORS = tuple(ALPHAS)
ZERO_SHOT_TASKS = ("boolq", "rte", "hellaswag", "arc_challenge", "mnli", "openbookqa")  # those of ALP's table


@dataclass(frozen=True)
class Method:
    """Which weights of a matrix go (`pruner`), and how many in each layer (`allocator`)."""

    pruner: str
    allocator: str = UNIFORM

    @property
    def name(self) -> str:
        return self.pruner if self.allocator == UNIFORM else f"{self.pruner}_{self.allocator}"


METHODS = {
    method.name: method
    for method in (
        Method(DENSE),
        *(Method(pruner, allocator) for pruner in PRUNERS for allocator in (UNIFORM, *ALLOCATORS)),
    )
}


def parse_method(name: str) -> Method:
    """The pair behind a name. Raises `InputError` with the nearest name for one that does not exist."""
    if name in METHODS:
        return METHODS[name]
    nearest = difflib.get_close_matches(name.lower(), METHODS, n=1, cutoff=0.5)
    advice = f"did you mean {nearest[0]}?" if nearest else f"choose from {', '.join(METHODS)}"
    raise InputError(f"--prune_method {name}: no such method; {advice}")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may stand: anywhere (`n == m == 0`), or n in every m neighbours of a row (2:4, 4:8, ...)."""

    n: int = 0
    m: int = 0

    @property
    def is_structured(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_structured else "unstructured"


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, or `n:m` with 0 < n < m. Raises `ValueError`."""
    if text == "unstructured":
        return UNSTRUCTURED
    match = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text)
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise ValueError(f"{text!r} is neither unstructured nor n:m with 0 < n < m, such as 2:4")
    return Pattern(int(match[1]), int(match[2]))
