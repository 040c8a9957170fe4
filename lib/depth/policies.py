"""Depth pruning by the policies of other papers, on the sweep of PP-LLMs: same losses, same budget, same plans.

A policy removes sublayers until the next removal would not bring the removed parameters nearer to the target.
"""

import random
from collections.abc import Sequence

from lib.config.plan import Plan
from lib.depth.greedy import Round
from lib.depth.moves import OnStep, greedy, in_turn, sublayers, whole_layers
from lib.depth.trial_losses import Sweep
from lib.models.decoder import Decoder

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
