"""Depth pruning of whole layers in a fixed order, until no removal brings the parameters nearer to the target."""

import random
from collections.abc import Sequence

from lib.config.plan import Plan
from lib.depth.moves import in_turn, whole_layers
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
