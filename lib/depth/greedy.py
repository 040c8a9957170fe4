"""Which sublayers to remove: the parameter budget, and the greedy search."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from lib.config.plan import Mode, Plan
from lib.depth.trial_losses import Sweep, Trial
from lib.runtime.batching import Progress

# How many -------------------------------------------------------------------------------------------------------------


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

    For PP-LLMs a removal is the number of the candidate that is closed whole; for others see `lib.depth.policies`.
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
