"""The plan of work of a run that is not made: passes over windows, time, memory and disk, for `--dry_run`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lib.config.plan import Plan
from lib.engine.window_scores import plan_window_losses
from lib.evaluation.samples import NEW_TOKENS, Prompt
from lib.models.decoder import Decoder
from lib.reporting.console import timed
from lib.runtime.batching import Batcher
from lib.runtime.memory import free_bytes

TRIAL = 0.6  # passes: a trial is measured from the layer that it changes, and its head


@dataclass(frozen=True)
class Part:
    """What a part of a run costs: passes of a window through all layers and the head, and seconds besides."""

    name: str
    passes: float
    seconds: float = 0.0
    note: str = ""


def sample_passes(prompts: Sequence[Prompt], seqlen: int) -> float:
    """Passes of the samples of one model: for each new token, all tokens so far."""
    tokens = sum(len(prompt.tokens) + NEW_TOKENS / 2 for prompt in prompts)
    return NEW_TOKENS * tokens / seqlen


def seconds_a_window(decoder: Decoder, seqlen: int, batch_size: int) -> float:
    """The seconds that a window takes through all layers and the head, measured on a batch of random tokens."""
    windows = torch.randint(decoder.config.vocab_size, (batch_size, seqlen), generator=torch.Generator().manual_seed(0))
    losses = plan_window_losses(decoder, Plan(decoder.num_layers), Batcher(batch_size))
    losses(windows[:1], 1)  # what is loaded and compiled at first
    seconds: dict[str, float] = {}
    with timed(seconds, "batch"):
        losses(windows, seqlen - 1)
    return seconds["batch"] / batch_size


def describe(parts: Sequence[Part], decoder: Decoder, seqlen: int, batch_size: int, disk: str | None) -> list[str]:
    """The lines of a plan of work."""
    a_window = seconds_a_window(decoder, seqlen, batch_size)
    lines = ["", f"Work, in passes of a window of {seqlen} tokens through all layers and the head"]
    for part in parts:
        besides = f", and {duration(part.seconds)} besides" if part.seconds else ""
        lines.append(f"  {part.name}: {part.passes:,.0f}{besides}{f' ({part.note})' if part.note else ''}")
    total = sum(part.passes * a_window + part.seconds for part in parts)
    weights = sum(one.numel() * one.element_size() for one in decoder.model.parameters())
    return [
        *lines,
        f"Time        about {duration(total)}: a pass takes {a_window:.3g} s, measured on {batch_size} at once",
        f"Memory      weights {weights / 10**6:,.0f} MB; {free_bytes(decoder.device) / 10**6:,.0f} MB left beside them",
        *([f"Disk        {disk}"] if disk else []),
        "Dry run     nothing was searched, pruned or written",
    ]


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
