"""Search steps of depth pruning: what can be removed, which removals come nearer to a rate, greedy descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lib.config.methods import DepthMethod
from lib.config.plan import Mode, Plan
from lib.depth.greedy import Round
from lib.depth.trial_losses import Sweep, Trial
from lib.errors import InputError
from lib.models.decoder import Decoder


@dataclass(frozen=True)
class Move:
    """What one search step removes: the attention of a layer, its FFN, or both."""

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
        """The plan with this move, as a trial."""
        mode = plan.mode(self.layer)
        return Trial(self.layer, Mode(mode.attention and not self.attention, mode.ffn and not self.ffn))


OnStep = Callable[[int, "Round[Move]"], object]


def whole_layers(decoder: Decoder) -> list[Move]:
    """A move for each layer that has lost nothing, and whose keys and values no other reads."""
    made, fixed = decoder.made_modes, decoder.read_attentions
    return [Move(layer, made[layer].attention, made[layer].ffn) for layer in decoder.whole_layers if layer not in fixed]


def sublayers(decoder: Decoder) -> list[Move]:
    """A move for each attention, whose keys and values no other reads, and each FFN of the model."""
    modes, fixed = list(enumerate(decoder.given_modes)), decoder.read_attentions
    mha = [Move(layer, attention=True) for layer, mode in modes if mode.attention and layer not in fixed]
    return sorted([*mha, *(Move(layer, ffn=True) for layer, mode in modes if mode.ffn)], key=lambda move: move.layer)


def moves_of(method: DepthMethod, decoder: Decoder) -> list[Move]:
    """All the removals that a method can choose from."""
    return sublayers(decoder) if method.removes == "sublayers" else whole_layers(decoder)


def check_reachable(decoder: Decoder, moves: Sequence[Move], target: float) -> None:
    """Raises `InputError` unless the moves, which must leave one attention, come within half a move of the target."""
    total, none = decoder.total_parameters, Plan(decoder.num_layers)
    rates = [decoder.removed_parameters(move.added_to(none)) / total for move in moves]
    most, everything = 0.0, none
    for move in moves:
        if decoder.keeps_attention(move.added_to(everything)):
            everything = move.added_to(everything)
            most = decoder.removed_parameters(everything) / total
    if not moves or min(rates) >= 2 * target or target - most > max(rates) / 2:
        reach = f"it removes {min(rates):.4f} to {most:.4f}" if moves else "no layer is whole"
        raise InputError(f"--prune_rate {target:g} cannot be reached by this method: {reach}")


def in_turn(decoder: Decoder, moves: Sequence[Move], target: float) -> Plan:
    """Takes the moves in order while each brings the share of removed parameters nearer to `target`.

    Raises `InputError` when the target is out of reach.
    """
    check_reachable(decoder, moves, target)
    plan = Plan(decoder.num_layers)
    for move in moves:
        if not nearer(decoder, plan, [move], target):
            break
        plan = move.added_to(plan)
    return plan


def greedy(
    sweep: Sweep, moves: Sequence[Move], target: float, on_step: OnStep | None = None, base: Plan | None = None
) -> tuple[Plan, list[Round[Move]]]:
    """At each step takes the move of lowest loss (ties go to the first), while some move comes nearer to `target`.

    `target` is the share of all parameters to remove; the search starts from `base`, by default the whole model. Raises
    `InputError` when the target is out of reach.
    """
    decoder = sweep.decoder
    steps: list[Round[Move]] = []
    plan = base or Plan(decoder.num_layers)
    check_reachable(decoder, moves, target)
    while near := nearer(decoder, plan, [move for move in moves if not is_taken(plan, move)], target):
        losses = sweep.losses(plan, [move.trial(plan) for move in near])
        steps.append(Round(dict(zip(near, losses, strict=True)), near[losses.index(min(losses))]))
        plan = steps[-1].selected.added_to(plan)
        if on_step:
            on_step(len(steps), steps[-1])
    return plan, steps


def is_taken(plan: Plan, move: Move) -> bool:
    """True when the plan already removes something of the move."""
    return move.attention and move.layer in plan.mha_removed or move.ffn and move.layer in plan.ffn_removed


def nearer(decoder: Decoder, plan: Plan, moves: Sequence[Move], target: float) -> list[Move]:
    """The moves that bring the removed parameters nearer to the target and leave at least one attention."""
    wanted = target * decoder.total_parameters
    distance = abs(decoder.removed_parameters(plan) - wanted)
    near = []
    for move in moves:
        after = move.added_to(plan)
        if decoder.keeps_attention(after) and abs(decoder.removed_parameters(after) - wanted) < distance:
            near.append(move)
    return near
