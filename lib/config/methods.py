"""The registries of methods: everything that is known of each depth method, pruner and allocator. Imports no torch.

Flags, checks, `--help`, keys of resume states and tables read from these entries; nothing else compares names. What
implements an entry is named as `module:attribute` and imported when a run begins, since it needs torch.

A method of weight pruning is a pair: a pruner, which knows one weight matrix and its inputs, and an allocator, which
knows one number per layer. `wanda_alp` is (`wanda`, `alp`), `wanda` is (`wanda`, `uniform`), `dense` prunes nothing.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeVar

from lib.errors import InputError, did_you_mean

DENSE = "dense"
UNIFORM = "uniform"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method: its name, what implements it (`module:attribute`), its line in `--help`, its paper.

    `flags` has the flags that have an effect on this method only, or on few methods, with their defaults.
    """

    name: str
    implementation: str
    help: str
    paper: str
    flags: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Any:
        """Imports what implements the method. Raises `ImportError` or `AttributeError` when it does not exist."""
        module, _, attribute = self.implementation.partition(":")
        return getattr(import_module(module), attribute)

    def takes(self, flag: str) -> bool:
        """True when a flag means something to this method."""
        return flag in self.flags


AnyEntry = TypeVar("AnyEntry", bound=Entry)


def _registry(*entries: AnyEntry) -> dict[str, AnyEntry]:
    return {entry.name: entry for entry in entries}


# Depth pruning --------------------------------------------------------------------------------------------------------

_TEXT = {"dataset": None, "nsamples": 128}


@dataclass(frozen=True, kw_only=True)
class DepthMethod(Entry):
    """A depth method. `implementation` is a search: `DepthRun` -> (plan, what result.json says of the search).

    `removes`: sublayers by counts of attentions and FFNs, or step by step whole `layers` or single `sublayers`; or
    whole `experts`.
    """

    removes: Literal["counts", "layers", "sublayers", "experts"]

    @property
    def needs_windows(self) -> bool:
        """True when it looks at calibration text."""
        return self.takes("dataset")


DEPTH_METHODS = _registry(
    DepthMethod(
        name="ppllms",
        implementation="lib.depth.searches:search_ppllms",
        help="Block Influence picks layers that lose their FFN, a greedy search those that lose attention too",
        paper="PP-LLMs: A Progressive Pruning Approach with Medium-Granularity for Large Language Models",
        flags={
            **_TEXT,
            "bi_windows": None,
            "mha_ffn_ratio": 2.0,
            "mha_remove_layers": None,
            "ffn_remove_layers": None,
        },
        removes="counts",
    ),
    DepthMethod(
        name="shortgpt",
        implementation="lib.depth.searches:search_shortgpt",
        help="the whole layers of lowest Block Influence",
        paper="arXiv:2403.03853",
        flags={**_TEXT, "bi_windows": None},
        removes="layers",
    ),
    DepthMethod(
        name="sleb",
        implementation="lib.depth.searches:search_greedy",
        help="greedy: at each step the whole layer whose removal gives the lowest loss",
        paper="arXiv:2402.09025",
        flags=_TEXT,
        removes="layers",
    ),
    DepthMethod(
        name="blockpruner",
        implementation="lib.depth.searches:search_greedy",
        help="greedy: at each step the attention or FFN whose removal gives the lowest loss",
        paper="arXiv:2406.10594",
        flags=_TEXT,
        removes="sublayers",
    ),
    DepthMethod(
        name="random",
        implementation="lib.depth.searches:search_random",
        help="whole layers drawn by the seed",
        paper="a baseline",
        removes="layers",
    ),
    DepthMethod(
        name="beam",
        implementation="lib.depth.searches:search_beam",
        help="beam search over sublayers, started beside the plans of the other methods",
        paper="this project",
        flags={**_TEXT, "bi_windows": None, "mha_ffn_ratio": 2.0, "beam_width": 1},
        removes="sublayers",
    ),
    DepthMethod(
        name="reap",
        implementation="lib.depth.searches:search_reap",
        help="of a mixture of experts: in each layer the experts that add least to its output",
        paper="arXiv:2510.13999",
        flags=_TEXT,
        removes="experts",
    ),
)


# Weight pruning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PrunerEntry(Entry):
    """A pruner. `implementation` is a subclass of `lib.sparsity.pruners.Pruner`.

    `parameters` maps arguments of the class to the flags that set them. `needs_inputs`: it collects statistics of
    calibration inputs. `rounds_while_pruning`: it can round the weights that stay in the same pass.
    """

    needs_inputs: bool
    rounds_while_pruning: bool = False
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def prunes(self) -> bool:
        return self.name != DENSE


PRUNERS = _registry(
    PrunerEntry(
        name=DENSE,
        implementation="lib.sparsity.pruners:Pruner",
        help="nothing is pruned",
        paper="the model as it is",
        needs_inputs=False,
    ),
    PrunerEntry(
        name="magnitude",
        implementation="lib.sparsity.pruners:Magnitude",
        help="the smallest |W| of each matrix",
        paper="a baseline",
        needs_inputs=False,
    ),
    PrunerEntry(
        name="wanda",
        implementation="lib.sparsity.pruners:Wanda",
        help="the smallest |W| times input norm of each row",
        paper="arXiv:2306.11695",
        flags={"use_variant": False},
        parameters={"use_variant": "use_variant"},
        needs_inputs=True,
    ),
    PrunerEntry(
        name="sparsegpt",
        implementation="lib.sparsity.pruners:SparseGpt",
        help="the least harm by the inverse Hessian, with the other weights updated",
        paper="arXiv:2301.00774",
        flags={"percdamp": 0.01},
        parameters={"damping": "percdamp"},
        needs_inputs=True,
        rounds_while_pruning=True,
    ),
    PrunerEntry(
        name="admm",
        implementation="lib.sparsity.pruners:Admm",
        help="the smallest |W| times input norm of each matrix, step by step, with the others refitted",
        paper="arXiv:2401.02938",
        needs_inputs=True,
    ),
    PrunerEntry(
        name="ria",
        implementation="lib.sparsity.pruners:Ria",
        help="the smallest relative importance times input norm^a of each row",
        paper="ICLR 2024, OpenReview Tr0PEHxcM8",
        flags={"a": 0.5},
        parameters={"power": "a"},
        needs_inputs=True,
    ),
)


@dataclass(frozen=True, kw_only=True)
class AllocatorEntry(Entry):
    """A layer-wise allocation. `implementation`: `LayerStatistics` -> a score for each layer; higher keeps more.

    `needs`: what the scores come from. `flags` has its authors' `alpha`. `summary`, a format of a run's settings, is
    added to the line that describes the run.
    """

    needs: Literal["gradients", "inputs", "nothing"]
    summary: str = ""


ALLOCATORS = _registry(
    AllocatorEntry(
        name="alp",
        implementation="lib.sparsity.densities:alp",
        help="by connection sensitivity, from gradients",
        paper="ALP: Adaptive Layerwise Pruning in Large Language Models",
        needs="gradients",
        flags={"alpha": 0.15},
    ),
    AllocatorEntry(
        name="owl",
        implementation="lib.sparsity.densities:owl",
        help="by the share of outliers among Wanda's scores",
        paper="arXiv:2310.05175",
        needs="inputs",
        flags={"alpha": 0.08, "owl_m": 5.0},
        summary=", M {0.owl_m:g}",
    ),
    AllocatorEntry(
        name="dlp",
        implementation="lib.sparsity.densities:dlp",
        help="by the median of Wanda's scores",
        paper="arXiv:2505.23807",
        needs="inputs",
        flags={"alpha": 0.15},
    ),
    AllocatorEntry(
        name="atp",
        implementation="lib.sparsity.densities:atp",
        help="by depth alone: sparsity rises by the same step from layer to layer",
        paper="arXiv:2502.14770",
        needs="nothing",
        flags={"alpha": 0.08},
    ),
)


@dataclass(frozen=True)
class Method:
    """Which weights of a matrix are pruned (`pruner`), and how many in each layer (`allocator`), by name."""

    pruner: str
    allocator: str = UNIFORM

    @property
    def name(self) -> str:
        return self.pruner if self.is_uniform else f"{self.pruner}_{self.allocator}"

    @property
    def pruning(self) -> PrunerEntry:
        return PRUNERS[self.pruner]

    @property
    def allocation(self) -> AllocatorEntry | None:
        """None where all layers get the same sparsity."""
        return None if self.is_uniform else ALLOCATORS[self.allocator]

    @property
    def is_uniform(self) -> bool:
        return self.allocator == UNIFORM


METHODS = {
    method.name: method
    for method in (
        Method(DENSE),
        *(
            Method(pruner.name, allocator)
            for pruner in PRUNERS.values()
            if pruner.prunes
            for allocator in (UNIFORM, *ALLOCATORS)
        ),
    )
}


def parse_method(name: str) -> Method:
    """The pair that a name stands for, in any case; an allocator alone goes with Wanda.

    Raises `InputError` that suggests the nearest name.
    """
    word = name.strip().lower()
    if method := METHODS.get(word) or METHODS.get(f"wanda_{word}"):
        return method
    raise InputError(f"--prune_method {name}: no such method; {did_you_mean(name, METHODS)}")


@dataclass(frozen=True)
class Pattern:
    """Where zeros may be: anywhere (`n == m == 0`), or n of every m neighbors in a row (2:4, 4:8, ...)."""

    n: int = 0
    m: int = 0

    @property
    def is_structured(self) -> bool:
        return self.m > 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.is_structured else "unstructured"


UNSTRUCTURED = Pattern()


def parse_pattern(text: str) -> Pattern:
    """`unstructured`, or `n:m` with 0 < n < m. Raises `ValueError`, which proposes what was meant if certain."""
    word = text.strip().lower()
    if word == str(UNSTRUCTURED):
        return UNSTRUCTURED
    found = re.fullmatch(r"([0-9]{1,6}) ?(:|/|-|_|,| |of) ?([0-9]{1,6})", word)
    first, second = (int(found[1]), int(found[3])) if found else (0, 0)
    if found and found[0] == f"{found[1]}:{found[3]}" and 0 < first < second:
        return Pattern(first, second)
    meant = Pattern(*sorted((first, second)))
    advice = f"; did you mean {meant}?" if 0 < meant.n < meant.m else ", such as 2:4"
    raise ValueError(f"{text!r} is neither unstructured nor n:m with 0 < n < m{advice}")
