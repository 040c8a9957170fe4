"""Beam search over sublayers, for the least loss at a given rate: ours."""

import math
from collections import defaultdict
from dataclasses import dataclass

from lib.config.plan import Mode, Plan
from lib.depth.moves import check_reachable, greedy, is_taken, nearer, sublayers
from lib.depth.trial_losses import Sweep


@dataclass(frozen=True)
class Beam:
    """What the beam search found."""

    plan: Plan
    loss: float
    origin: str  # whose plan it is: `beam`, or that of another method
    trials: int  # models whose loss was asked for, those of the other methods included
    at_most: int  # trials that there could have been


def beam(sweep: Sweep, target: float, width: int, others: dict[str, Plan]) -> Beam:
    """Ours: for every amount of removed parameters the `width` plans of lowest loss, each grown by every sublayer.

    Amounts are counted in parameters of the smallest sublayer, so that plans are compared with plans of about their
    size, whatever the order and kind of their removals. Where the plans of `others` end below the target, they are
    taken up to it as BlockPruner would, and the plan of lowest loss is chosen of all that end within half a sublayer
    of the target. So none of `others` has a lower loss there. `trials` counts what the sweep was asked for since its
    `asked` was cleared. Raises `InputError` when the target is out of reach.
    """
    decoder, moves = sweep.decoder, sublayers(sweep.decoder)
    check_reachable(decoder, moves, target)
    none, wanted = Plan(decoder.num_layers), target * decoder.total_parameters
    sizes = [decoder.removed_parameters(move.added_to(none)) for move in moves]
    unit = min(sizes)
    grown: dict[int, dict[tuple[Mode, ...], tuple[float, Plan]]] = defaultdict(dict)  # by amount, then by what is left
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
    steps = math.floor(wanted / unit) + 1  # only plans below the target are grown
    at_most = 1 + len(others) + steps * len(moves) * (width + 2 * len(others))  # others search, and are taken further
    return Beam(plan, loss, origin, len(sweep.asked), at_most)
