"""How many sublayers to remove: the parameter budget of PP-LLMs."""

from dataclasses import dataclass
from typing import NamedTuple

from lib.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Parameters of one attention, of one FFN and of the whole model, for a model of uniform layers."""

    num_layers: int
    mha_parameters: float
    ffn_parameters: float
    total: int

    def rate(self, mha: int, ffn: int) -> float:
        """The share of all parameters in `mha` attentions and `ffn` FFNs."""
        return (mha * self.mha_parameters + ffn * self.ffn_parameters) / self.total

    @property
    def natural_ratio(self) -> float:
        """The FFNs per attention that make both removals equally large."""
        return self.ffn_parameters / self.mha_parameters


class Counts(NamedTuple):
    """How many layers lose their attention, and how many their FFN."""

    mha: int
    ffn: int


def reachable_counts(budget: Budget, ratio: float) -> list[Counts]:
    """The pairs that the reference code considers, in its order, except those with more attentions than FFNs.

    PP-LLMs: for `mha` in 1..L-1, `ffn` within 30% of `round(mha * ratio)`, at most L together, and the ratio of the two
    within 20% of `ratio`.
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
    """The counts whose share of parameters is nearest to `prune_rate`; a given count is kept.

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
