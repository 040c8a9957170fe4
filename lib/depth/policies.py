"""Depth pruning by the policies of other papers, with the same losses, budget and plans as PP-LLMs.

A policy removes sublayers until no removal brings the removed parameters nearer to the target.
"""

import random
from collections.abc import Sequence

from lib.config.plan import Plan
from lib.depth.greedy import Round
from lib.depth.moves import Move, OnStep, greedy, in_turn, sublayers, whole_layers
from lib.depth.trial_losses import Sweep
from lib.models.decoder import Decoder


def shortgpt(decoder: Decoder, bi_scores: Sequence[float], target: float) -> Plan:
    """ShortGPT (arXiv:2403.03853): removes the whole layers of lowest Block Influence."""
    moves = sorted(whole_layers(decoder), key=lambda move: (bi_scores[move.layer], move.layer))
    return in_turn(decoder, moves, target)


def random_layers(decoder: Decoder, target: float, seed: int) -> Plan:
    """Whole layers drawn by a seed: the baseline that every method must beat."""
    moves = whole_layers(decoder)
    random.Random(seed).shuffle(moves)
    return in_turn(decoder, moves, target)


def sleb(sweep: Sweep, target: float, on_step: OnStep | None = None) -> tuple[Plan, list[Round[Move]]]:
    """SLEB (arXiv:2402.09025): at each step removes the whole layer whose removal gives the lowest loss."""
    return greedy(sweep, whole_layers(sweep.decoder), target, on_step)


def blockpruner(sweep: Sweep, target: float, on_step: OnStep | None = None) -> tuple[Plan, list[Round[Move]]]:
    """BlockPruner (arXiv:2406.10594): at each step removes the attention or FFN whose removal gives the lowest loss."""
    return greedy(sweep, sublayers(sweep.decoder), target, on_step)
