"""Beam search over sublayers for the lowest loss at a given rate. This project's own method."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lib.config.plan import Mode, Plan
from lib.depth.moves import check_reachable, greedy, is_taken, nearer, sublayers
from lib.depth.trial_losses import Sweep


@dataclass(frozen=True)
class Beam:
    """What the beam search found."""

    plan: Plan
    loss: float
    origin: str  # the method whose plan it is: `beam`, or one of `others`
    trials: int  # models measured, by all searches together
    at_most: int  # an upper bound of `trials`


def beam(sweep: Sweep, target: float, width: int, others: dict[str, Plan]) -> Beam:
    """Keeps, for every amount of removed parameters, the `width` plans of lowest loss; extends each by every sublayer.

    Amounts are counted in units of the smallest sublayer, so that a plan competes with plans of about its size. Plans
    of `others` that end below the target are extended up to it as BlockPruner would. Of all plans that end within half
    a sublayer of the target the one of lowest loss is chosen, so none of `others` has a lower loss there. `trials`
    counts the models that `sweep` was asked for since its `asked` was cleared. Raises `InputError` when the target is
    out of reach.
    """
    decoder, moves = sweep.decoder, sublayers(sweep.decoder)
    check_reachable(decoder, moves, target)
    none, wanted = Plan(decoder.num_layers), target * decoder.total_parameters
    sizes = [decoder.removed_parameters(move.added_to(none)) for move in moves]
    unit = min(sizes)
    grown: dict[int, dict[tuple[Mode, ...], tuple[float, Plan]]] = defaultdict(dict)  # by amount, then by modes
    grown[0][none.modes] = (sweep.loss(none), none)
    ended: list[tuple[float, str, Plan]] = []
    while grown:
        best = sorted(grown.pop(min(grown)).values(), key=lambda found: found[0])[:width]
        for loss, plan in best:
            near = nearer(decoder, plan, [move for move in moves if not is_taken(plan, move)], target)
            if not near:
                ended.append((loss, "beam", plan))
                continue
            for move, after in zip(near, sweep.losses(plan, [move.trial(plan) for move in near]), strict=True):
                longer = move.added_to(plan)
                grown[decoder.removed_parameters(longer) // unit].setdefault(longer.modes, (after, longer))
    for name, plan in others.items():
        completed, _ = greedy(sweep, moves, target, base=plan)
        if abs(decoder.removed_parameters(completed) - wanted) <= max(sizes) / 2:
            ended.append((sweep.loss(completed), name, completed))
    loss, origin, plan = min(ended, key=lambda found: found[0])
    return Beam(plan, loss, origin, len(sweep.asked), trials_at_most(sizes, wanted, width, len(others)))


def trials_at_most(sizes: Sequence[int], wanted: float, width: int, others: int) -> int:
    """An upper bound of the models that are measured, for moves of these sizes and so many other plans."""
    steps = math.floor(wanted / min(sizes)) + 1  # only plans below the target are grown
    return 1 + others + steps * len(sizes) * (width + 2 * others)  # the others search, and grow
