"""Depth pruning by the policies of other papers, on the sweep of PP-LLMs: same losses, same budget, same plans.

A policy removes sublayers until the next removal would not bring the removed parameters nearer to the target.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.config.plan import Mode, Plan
from lib.errors import InputError
from lib.model import Decoder
from lib.search import Round
from lib.sweep import Sweep, Trial


@dataclass(frozen=True)
class Move:
    """What goes in one step: the attention of a layer, its FFN, or both."""

    layer: int
    attention: bool = False
    ffn: bool = False

    def __str__(self) -> str:
        return f"{self.layer}" if self.attention and self.ffn else f"{self.layer} {'MHA' if self.attention else 'FFN'}"

    def added_to(self, plan: Plan) -> Plan:
        mha = (*plan.mha_removed, self.layer) if self.attention else plan.mha_removed
        ffn = (*plan.ffn_removed, self.layer) if self.ffn else plan.ffn_removed
        return Plan(plan.num_layers, mha, ffn)

    def trial(self, plan: Plan) -> Trial:
        """The layer's mode under the plan and this move."""
        mode = plan.mode(self.layer)
        return Trial(self.layer, Mode(mode.attention and not self.attention, mode.ffn and not self.ffn))


OnStep = Callable[[int, Round], object]


def whole_layers(decoder: Decoder) -> list[Move]:
    """A move for each layer that is whole."""
    return [Move(layer, attention=True, ffn=True) for layer in decoder.whole_layers]


def sublayers(decoder: Decoder) -> list[Move]:
    """A move for each attention and each FFN that is there."""
    modes = list(enumerate(decoder.given_modes))
    mha = [Move(layer, attention=True) for layer, mode in modes if mode.attention]
    return sorted([*mha, *(Move(layer, ffn=True) for layer, mode in modes if mode.ffn)], key=lambda move: move.layer)


# Policies -------------------------------------------------------------------------------------------------------------


def shortgpt(decoder: Decoder, bi_scores: Sequence[float], target: float) -> Plan:
    """ShortGPT (arXiv:2403.03853): the whole layers of lowest Block Influence."""
    moves = sorted(whole_layers(decoder), key=lambda move: (bi_scores[move.layer], move.layer))
    return in_turn(decoder, moves, target)


def random_layers(decoder: Decoder, target: float, seed: int) -> Plan:
    """Whole layers drawn by a seed: what every choice must beat."""
    moves = whole_layers(decoder)
    random.Random(seed).shuffle(moves)
    return in_turn(decoder, moves, target)


def sleb(sweep: Sweep, target: float, on_step: OnStep | None = None) -> tuple[Plan, list[Round]]:
    """SLEB (arXiv:2402.09025): step by step the whole layer without which the loss is lowest."""
    return greedy(sweep, whole_layers(sweep.decoder), target, on_step)


def blockpruner(sweep: Sweep, target: float, on_step: OnStep | None = None) -> tuple[Plan, list[Round]]:
    """BlockPruner (arXiv:2406.10594): step by step the attention or FFN without which the loss is lowest."""
    return greedy(sweep, sublayers(sweep.decoder), target, on_step)


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
            near = _nearer(decoder, plan, [move for move in moves if not _is_taken(plan, move)], target)
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


# What they share ------------------------------------------------------------------------------------------------------


def moves_of(method: str, decoder: Decoder) -> list[Move]:
    """What a method removes a step."""
    return sublayers(decoder) if method in ("blockpruner", "beam") else whole_layers(decoder)


def check_reachable(decoder: Decoder, moves: Sequence[Move], target: float) -> None:
    """Raises `InputError` unless the moves, one attention kept, come within half a step of a share of parameters."""
    total, none = decoder.total_parameters, Plan(decoder.num_layers)
    rates = [decoder.removed_parameters(move.added_to(none)) / total for move in moves]
    most, everything = 0.0, none
    for move in moves:
        if any(mode.attention for mode in _modes_left(decoder, move.added_to(everything))):
            everything = move.added_to(everything)
            most = decoder.removed_parameters(everything) / total
    if not moves or min(rates) >= 2 * target or target - most > max(rates) / 2:
        reach = f"it removes {min(rates):.4f} to {most:.4f}" if moves else "no layer is whole"
        raise InputError(f"--prune_rate {target:g} cannot be reached by this method: {reach}")


def in_turn(decoder: Decoder, moves: Sequence[Move], target: float) -> Plan:
    """The moves in their order as long as each brings the share of removed parameters nearer to `target`.

    Raises `InputError` when it is out of reach.
    """
    check_reachable(decoder, moves, target)
    plan = Plan(decoder.num_layers)
    for move in moves:
        if not _nearer(decoder, plan, [move], target):
            break
        plan = move.added_to(plan)
    return plan


def greedy(
    sweep: Sweep, moves: Sequence[Move], target: float, on_step: OnStep | None = None, base: Plan | None = None
) -> tuple[Plan, list[Round]]:
    """Step by step the move of lowest loss, of equals the first, as long as one comes nearer to `target`.

    `target` is the share of all parameters to remove; `base` is where it begins, nothing removed unless given. Raises
    `InputError` when the target is out of reach.
    """
    decoder, steps = sweep.decoder, []
    plan = base or Plan(decoder.num_layers)
    check_reachable(decoder, moves, target)
    while near := _nearer(decoder, plan, [move for move in moves if not _is_taken(plan, move)], target):
        losses = sweep.losses(plan, [move.trial(plan) for move in near])
        steps.append(Round(dict(zip(near, losses, strict=True)), near[losses.index(min(losses))]))
        plan = steps[-1].selected.added_to(plan)
        if on_step:
            on_step(len(steps), steps[-1])
    return plan, steps


def _is_taken(plan: Plan, move: Move) -> bool:
    return move.attention and move.layer in plan.mha_removed or move.ffn and move.layer in plan.ffn_removed


def _nearer(decoder: Decoder, plan: Plan, moves: Sequence[Move], target: float) -> list[Move]:
    """The moves after which the removed parameters are nearer to the target, and which leave an attention."""
    wanted = target * decoder.total_parameters
    distance = abs(decoder.removed_parameters(plan) - wanted)
    near = []
    for move in moves:
        after = move.added_to(plan)
        keeps_attention = any(mode.attention for mode in _modes_left(decoder, after))
        if keeps_attention and abs(decoder.removed_parameters(after) - wanted) < distance:
            near.append(move)
    return near


def _modes_left(decoder: Decoder, plan: Plan) -> tuple[Mode, ...]:
    """What every layer has under a plan, less what it lacked from the start."""
    return decoder.complete(plan).modes
