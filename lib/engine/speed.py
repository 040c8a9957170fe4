"""Prefill speed: how fast tokens go through the decoder layers."""

import statistics
import time
from collections.abc import Sequence

import torch

from lib.config.plan import Plan
from lib.engine.finite import final_hidden_states
from lib.models.decoder import Decoder

LEAST_RUNS, MOST_RUNS, SECONDS = 3, 25, 4.0  # more than the least while the seconds have not passed


def tokens_per_second(decoder: Decoder, input_ids: torch.Tensor, plans: Sequence[Plan]) -> list[float]:
    """Tokens per second of ids (B, T) through the layers that each plan leaves: medians of several runs.

    The plans take turns, after a run of each that is not counted, so that whatever else the machine does slows all.
    """
    seconds: list[list[float]] = [[] for _ in plans]
    begin = time.perf_counter()
    for run in range(1 + MOST_RUNS):
        for plan, taken in zip(plans, seconds, strict=True):
            start = time.perf_counter()
            final_hidden_states(decoder, input_ids, plan.modes).sum().item()  # waits for the device
            taken.append(time.perf_counter() - start)
        if run >= LEAST_RUNS and time.perf_counter() - begin > SECONDS:
            break
    return [input_ids.numel() / statistics.median(taken[1:]) for taken in seconds]
