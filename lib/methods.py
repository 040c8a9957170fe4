"""The names of methods and patterns that a user gives, and what they mean. Imports no torch.

A method is a pair: a pruner, which knows one weight matrix and its inputs, and an allocator, which knows one number
per layer. `wanda_alp` is (`wanda`, `alp`), `wanda` is (`wanda`, `uniform`), `dense` prunes nothing.
"""

import difflib
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.names import expand, is_demo, is_hub_model, short_name

DEPTH_METHODS = ("ppllms", "shortgpt", "sleb", "blockpruner", "random", "beam")
DENSE = "dense"
UNIFORM = "uniform"
PRUNERS = ("magnitude", "wanda", "sparsegpt", "ria")
ALPHAS = {"alp": 0.15, "owl": 0.08, "dlp": 0.15}  # of each allocator, its authors'
ALLOCATORS = tuple(ALPHAS)
GRADIENT_TYPES = ("l2", "l1", "l2_hundred_total")
GRADIENT_LOSSES = ("last", "all")
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


@dataclass(frozen=True)
class Quantization:
    """How weights are rounded: bits, symmetric or not, columns that share a scale, and in which order.

    `is_compensated`: GPTQ, which moves what rounding takes from a column onto the columns that follow; else to the
    nearest. `group_size` None: one scale for a row. `static_groups`: the groups' scales are set before any rounding.
    """

    bits: int
    is_compensated: bool = False
    is_symmetric: bool = False
    group_size: int | None = None
    by_activation: bool = False
    static_groups: bool = False

    def __str__(self) -> str:
        kind = "GPTQ" if self.is_compensated else "round to nearest"
        group = f"groups of {self.group_size}" if self.group_size else "a scale for each row"
        parts = [f"{self.bits} bits", "symmetric" if self.is_symmetric else "asymmetric", group, kind]
        parts += ["act-order"] * self.by_activation + ["static groups"] * self.static_groups
        return ", ".join(parts)


@dataclass(frozen=True)
class GradientSettings:
    """What sensitivities depend on besides the model: text, windows, and how gradients are taken and summed."""

    dataset: str
    nsamples: int = 10
    seqlen: int = 64
    loss: str = "last"
    gradient_type: str = "l2"
    seed: int = 0

    def path(self, model: str, dtype: str = "auto") -> Path:
        """Where the sensitivities of a model with these settings are kept: a file below `gradients`, named by them."""
        name = model.replace("/", "--")[:80] if is_hub_model(model) else _local_label(model)
        text = _local_label(self.dataset) if expand(self.dataset).exists() else self.dataset[:80]
        windows = f"{self.nsamples}x{self.seqlen}"
        parts = [name, self.gradient_type, windows, self.loss, text, f"seed{self.seed}"]
        file = "-".join(parts + [dtype] * (dtype != "auto"))
        return Path("gradients") / (re.sub(r"[/:]+", "--", file) + ".json")


def _local_label(name: str) -> str:
    """The last part of a path, and what tells it from others that end alike; `demo` as it is."""
    if name == "demo" or is_demo(name):
        return "demo"
    path = str(expand(name).resolve())
    return f"{short_name(name)[:80]}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"
