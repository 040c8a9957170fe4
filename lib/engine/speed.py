"""Prefill speed: how fast tokens go through the decoder layers."""

import statistics
import time
from collections.abc import Sequence

import torch

from lib.config.plan import Plan
from lib.engine.finite import final_hidden_states
from lib.models.decoder import Decoder


def tokens_per_second(decoder: Decoder, input_ids: torch.Tensor, plans: Sequence[Plan], runs: int = 5) -> list[float]:
    """Tokens per second of ids (B, T) through the layers that each plan leaves: the medians of `runs` runs.

    The plans take turns, after a run of each that is not counted, so that whatever else the machine does slows all.
    """
    seconds: list[list[float]] = [[] for _ in plans]
    for _ in range(runs + 1):
        for plan, taken in zip(plans, seconds, strict=True):
            start = time.perf_counter()
            final_hidden_states(decoder, input_ids, plan.modes).sum().item()  # waits for the device
            taken.append(time.perf_counter() - start)
    return [input_ids.numel() / statistics.median(taken[1:]) for taken in seconds]
