"""PP-LLMs: the candidates by Block Influence, and the greedy search over them."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from lib.config.plan import Mode, Plan
from lib.depth.trial_losses import Sweep, Trial
from lib.runtime.batching import Progress


def choose_candidates(bi_scores: Sequence[float], count: int, layers: Sequence[int] | None = None) -> list[int]:
    """The `count` layers of lowest Block Influence, ascending; ties go to the lower index.

    Chosen from all layers, or from `layers`: those that are whole, in a model that was pruned before.
    """
    layers = range(len(bi_scores)) if layers is None else layers
    return sorted(layers, key=lambda layer: (bi_scores[layer], layer))[:count]


Removal = TypeVar("Removal", bound=Hashable)


@dataclass(frozen=True)
class Round(Generic[Removal]):
    """One step of a greedy search: the loss of each trial, by what it removes, and the removal chosen.

    In PP-LLMs a removal is the number of a layer, which loses both sublayers; elsewhere it is a `Move`.
    """

    losses: dict[Removal, float]
    selected: Removal

    @property
    def loss(self) -> float:
        return self.losses[self.selected]


def greedy_search(
    sweep: Sweep,
    candidates: Sequence[int],
    mha_count: int,
    on_round: Callable[[int, Round[int]], object] | None = None,
    progress: Progress | None = None,
) -> tuple[Plan, list[Round[int]]]:
    """PP-LLMs, second stage: all candidates lose their FFN; which `mha_count` of them lose attention too?

    Each round has a trial for every candidate not chosen yet: that layer is removed whole, beside those chosen before.
    The trial of lowest loss is chosen; ties go to the lower Block Influence. `on_round` gets each round as it ends. Of
    a hybrid the last full attention stays, though it be one of fewer than `mha_count`.
    """
    num_layers = sweep.decoder.num_layers
    chosen: list[int] = []
    rounds: list[Round[int]] = []
    for number in range(1, mha_count + 1):
        base = Plan(num_layers, tuple(chosen), tuple(sorted(candidates)))
        left = [layer for layer in candidates if layer not in chosen]
        left = [layer for layer in left if sweep.decoder.keeps_attention(Plan(num_layers, (*chosen, layer)))]
        if not left:
            break
        losses = sweep.losses(base, [Trial(layer, Mode(False, False)) for layer in left], progress)
        rounds.append(Round(dict(zip(left, losses, strict=True)), left[losses.index(min(losses))]))
        chosen.append(rounds[-1].selected)
        if on_round:
            on_round(number, rounds[-1])
    return Plan(num_layers, tuple(chosen), tuple(sorted(candidates))), rounds
