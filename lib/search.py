"""Which sublayers to remove: the parameter budget, and the greedy search."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lib.batching import Progress
from lib.config.plan import Mode, Plan
from lib.errors import InputError
from lib.sweep import Sweep, Trial

# How many -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What removing sublayers of a uniform model saves: parameters of one attention, of one FFN, and of all."""

    num_layers: int
    mha_parameters: float
    ffn_parameters: float
    total: int

    def rate(self, mha: int, ffn: int) -> float:
        """The share of all parameters in `mha` attentions and `ffn` FFNs."""
        return (mha * self.mha_parameters + ffn * self.ffn_parameters) / self.total

    @property
    def natural_ratio(self) -> float:
        """FFNs for each attention at which both take the same share of parameters."""
        return self.ffn_parameters / self.mha_parameters


class Counts(NamedTuple):
    """How many layers lose their attention, and how many their FFN."""

    mha: int
    ffn: int


def reachable_counts(budget: Budget, ratio: float) -> list[Counts]:
    """The pairs that the reference considers, in its order, without those of more attentions than FFNs.

    PP-LLMs: for `mha` in 1..L-1, `ffn` within 30% of `round(mha * ratio)`, not more than L together, and the ratio of
    the two within 20% of the one asked for.
    """
    pairs, layers = [], budget.num_layers
    for mha in range(1, layers):
        expected = round(mha * ratio)
        slack = max(1, int(0.3 * expected))
        for ffn in range(max(1, expected - slack), min(layers - 1, expected + slack) + 1):
            if mha <= ffn and mha + ffn <= layers and abs(ffn / mha - ratio) / ratio <= 0.2:
                pairs.append(Counts(mha, ffn))
    return pairs


def choose_counts(
    budget: Budget, prune_rate: float, ratio: float = 2.0, mha: int | None = None, ffn: int | None = None
) -> Counts:
    """The counts whose share of parameters is nearest to `prune_rate`; a count that is given is kept.

    Raises `InputError` when no allowed pair comes within one layer of the rate.
    """
    if mha is not None and ffn is not None:
        return Counts(mha, ffn)
    if mha is not None:
        pairs = [Counts(mha, other) for other in range(max(1, mha), budget.num_layers + 1)]
    elif ffn is not None:
        pairs = [Counts(other, ffn) for other in range(min(ffn, budget.num_layers - 1) + 1)]
    else:
        pairs = reachable_counts(budget, ratio)
    if not pairs:
        raise InputError(
            f"--mha_ffn_ratio {ratio:g}: no pair of counts fits a model of {budget.num_layers} layers; "
            "give --mha_remove_layers and --ffn_remove_layers"
        )
    best = min(pairs, key=lambda pair: abs(budget.rate(*pair) - prune_rate))
    if abs(budget.rate(*best) - prune_rate) > budget.rate(1, 1):
        rates = [budget.rate(*pair) for pair in pairs]
        raise InputError(
            f"--prune_rate {prune_rate:g} cannot be reached: the nearest is {budget.rate(*best):.4f} "
            f"({best.mha} MHA and {best.ffn} FFN layers), of {min(rates):.4f} to {max(rates):.4f}; "
            "or give both --mha_remove_layers and --ffn_remove_layers"
        )
    return best


def choose_candidates(bi_scores: Sequence[float], count: int, layers: Sequence[int] | None = None) -> list[int]:
    """The `count` layers of lowest Block Influence, ascending; of equals the lower index first.

    Of all layers, or of those given: of a model that was pruned before, those that are whole.
    """
    layers = range(len(bi_scores)) if layers is None else layers
    return sorted(layers, key=lambda layer: (bi_scores[layer], layer))[:count]


# The search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round of a greedy search: the loss of each removal that was tried, and the one chosen.

    For PP-LLMs a removal is the number of the candidate that is closed whole; for others see `lib.policies`.
    """

    losses: dict
    selected: Hashable

    @property
    def loss(self) -> float:
        return self.losses[self.selected]


def greedy_search(
    sweep: Sweep,
    candidates: Sequence[int],
    mha_count: int,
    on_round: Callable[[int, Round], object] | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[Round]]:
    """PP-LLMs, second stage: which `mha_count` of the candidates, all without FFN, lose their attention too.

    In each round every candidate not chosen yet is closed whole, beside those chosen before; the one whose loss is
    lowest is chosen, of equals the one of lower Block Influence. `on_round` is told each round as it ends.
    """
    num_layers, chosen, rounds = sweep.decoder.num_layers, [], []
    for number in range(1, mha_count + 1):
        base = Plan(num_layers, tuple(chosen), tuple(sorted(candidates)))
        left = [layer for layer in candidates if layer not in chosen]
        losses = sweep.losses(base, [Trial(layer, Mode(False, False)) for layer in left], progress)
        rounds.append(Round(dict(zip(left, losses, strict=True)), left[losses.index(min(losses))]))
        chosen.append(rounds[-1].selected)
        if on_round:
            on_round(number, rounds[-1])
    return Plan(num_layers, tuple(chosen), tuple(sorted(candidates))), rounds
