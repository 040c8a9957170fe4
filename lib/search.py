"""Which sublayers to remove: the parameter budget, the sweep that measures removals, and the greedy search."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch

from lib.batching import Batcher
from lib.errors import InputError, RunError
from lib.model import Decoder, Mode, Plan
from lib.stream import describe_nonfinite, tail_losses

# How many -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What removing sublayers of a uniform model saves: parameters of one attention, of one FFN, and of all."""

    num_layers: int
    mha_parameters: float
    ffn_parameters: float
    total: int

    def rate(self, mha: int, ffn: int) -> float:
        """The share of all parameters in `mha` attentions and `ffn` FFNs."""
        return (mha * self.mha_parameters + ffn * self.ffn_parameters) / self.total

    @property
    def natural_ratio(self) -> float:
        """FFNs for each attention at which both take the same share of parameters."""
        return self.ffn_parameters / self.mha_parameters


class Counts(NamedTuple):
    """How many layers lose their attention, and how many their FFN."""

    mha: int
    ffn: int


def reachable_counts(budget: Budget, ratio: float) -> list[Counts]:
    """The pairs that the reference considers, in its order, without those of more attentions than FFNs.

    PP-LLMs: for `mha` in 1..L-1, `ffn` within 30% of `round(mha * ratio)`, not more than L together, and the ratio of
    the two within 20% of the one asked for.
    """
    pairs, layers = [], budget.num_layers
    for mha in range(1, layers):
        expected = round(mha * ratio)
        slack = max(1, int(0.3 * expected))
        for ffn in range(max(1, expected - slack), min(layers - 1, expected + slack) + 1):
            if mha <= ffn and mha + ffn <= layers and abs(ffn / mha - ratio) / ratio <= 0.2:
                pairs.append(Counts(mha, ffn))
    return pairs


def choose_counts(
    budget: Budget, prune_rate: float, ratio: float = 2.0, mha: int | None = None, ffn: int | None = None
) -> Counts:
    """The counts whose share of parameters is nearest to `prune_rate`; a count that is given is kept.

    Raises `InputError` when no allowed pair comes within one layer of the rate.
    """
    if mha is not None and ffn is not None:
        return Counts(mha, ffn)
    if mha is not None:
        pairs = [Counts(mha, other) for other in range(max(1, mha), budget.num_layers + 1)]
    elif ffn is not None:
        pairs = [Counts(other, ffn) for other in range(min(ffn, budget.num_layers - 1) + 1)]
    else:
        pairs = reachable_counts(budget, ratio)
    if not pairs:
        raise InputError(
            f"--mha_ffn_ratio {ratio:g}: no pair of counts fits a model of {budget.num_layers} layers; "
            "give --mha_remove_layers and --ffn_remove_layers"
        )
    best = min(pairs, key=lambda pair: abs(budget.rate(*pair) - prune_rate))
    if abs(budget.rate(*best) - prune_rate) > budget.rate(1, 1):
        rates = [budget.rate(*pair) for pair in pairs]
        raise InputError(
            f"--prune_rate {prune_rate:g} cannot be reached: the nearest is {budget.rate(*best):.4f} "
            f"({best.mha} MHA and {best.ffn} FFN layers), of {min(rates):.4f} to {max(rates):.4f}; "
            "or give both --mha_remove_layers and --ffn_remove_layers"
        )
    return best


def choose_candidates(bi_scores: Sequence[float], count: int) -> list[int]:
    """The `count` layers of lowest Block Influence, ascending; of equals the lower index first."""
    return sorted(range(len(bi_scores)), key=lambda layer: (bi_scores[layer], layer))[:count]


# What it costs to remove something ------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """The base with one layer in another mode."""

    layer: int
    mode: Mode


@dataclass(frozen=True)
class _Prefix:
    """The hidden states of all windows (N, T, D) before a layer, under given modes of the layers below it."""

    modes: tuple[Mode, ...]
    hidden_states: torch.Tensor


class Sweep:
    """Measures the loss of many models that differ from a base in one layer each, sharing what they have in common.

    One walk a batch: the base goes up the layers once; where a trial differs, the base forks, and the trial goes on by
    itself to the model's own tail. What lies below the lowest trial is kept for the next sweep over the same windows.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor, batcher: Batcher):
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self._prefix: _Prefix | None = None

    def losses(
        self, base: Plan, trials: Sequence[Trial], progress: Callable[[int], object] | None = None
    ) -> list[float]:
        """For each trial, the sum over windows of mean token cross-entropy times T (fp32, summed in fp64).

        Raises `RunError` naming the layer when a loss is not finite.
        """
        modes, lowest = base.modes, min(trial.layer for trial in trials)
        known = self._prefix if self._prefix and self._prefix.modes == modes[: len(self._prefix.modes)] else None
        if known and len(known.modes) > lowest:
            known = None
        store = known.hidden_states if known else self._new_store()

        def batch_losses(rows: slice) -> torch.Tensor:
            return self._batch_losses(rows, modes, trials, known, store, lowest)

        window_losses = self.batcher.map(batch_losses, len(self.windows), progress)  # (N, trials)
        if store is not None:
            self._prefix = _Prefix(modes[:lowest], store)
        return (window_losses.double().sum(dim=0) * self.windows.shape[1]).tolist()

    def _batch_losses(self, rows, modes, trials, known: _Prefix | None, store, lowest: int) -> torch.Tensor:
        """One walk of a batch of windows: the losses of all trials, (B, trials)."""
        decoder, input_ids = self.decoder, self.windows[rows]
        hidden_states, inputs = decoder.embed(input_ids)
        if known:
            hidden_states = known.hidden_states[rows].to(hidden_states.device)
        last_fork = max(trial.layer for trial in trials)
        running: dict[int, torch.Tensor] = {}
        for layer in range(len(known.modes) if known else 0, decoder.num_layers):
            if layer == lowest and store is not None:
                store[rows] = hidden_states.to(store.device)
            for index in running:
                running[index] = decoder.run_layer(layer, running[index], inputs, modes[layer])
            for index, trial in enumerate(trials):
                if trial.layer == layer:
                    running[index] = decoder.run_layer(layer, hidden_states, inputs, trial.mode)
            if layer < last_fork:
                hidden_states = decoder.run_layer(layer, hidden_states, inputs, modes[layer])
        columns = []
        for index, trial in enumerate(trials):
            losses = tail_losses(decoder, running.pop(index), input_ids).cpu()
            if not losses.isfinite().all():
                tried = [*modes[: trial.layer], trial.mode, *modes[trial.layer + 1 :]]
                where = describe_nonfinite(decoder, input_ids, tried)
                raise RunError(f"trial without layer {trial.layer}: {where}")
            columns.append(losses)
        return torch.stack(columns, dim=1)

    def _new_store(self) -> torch.Tensor | None:
        """Room for the hidden states of all windows: on the device, else on the host, else None."""
        decoder = self.decoder
        dtype = decoder.model.get_input_embeddings().weight.dtype
        shape = (*self.windows.shape, decoder.config.hidden_size)
        size = math.prod(shape) * dtype.itemsize
        if decoder.device.type == "cuda" and size < torch.cuda.mem_get_info(decoder.device)[0] / 4:
            return torch.empty(shape, dtype=dtype, device=decoder.device)
        return torch.empty(shape, dtype=dtype) if size < psutil.virtual_memory().available / 4 else None


# The search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round of the greedy search: the loss of closing each candidate whole, and the one chosen."""

    losses: dict[int, float]
    selected: int

    @property
    def loss(self) -> float:
        return self.losses[self.selected]


def greedy_search(
    sweep: Sweep,
    candidates: Sequence[int],
    mha_count: int,
    on_round: Callable[[int, Round], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Plan, list[Round]]:
    """PP-LLMs, second stage: which `mha_count` of the candidates, all without FFN, lose their attention too.

    In each round every candidate not chosen yet is closed whole, beside those chosen before; the one whose loss is
    lowest is chosen, of equals the one of lower Block Influence. `on_round` is told each round as it ends.
    """
    num_layers, chosen, rounds = sweep.decoder.num_layers, [], []
    for number in range(1, mha_count + 1):
        base = Plan(num_layers, tuple(chosen), tuple(sorted(candidates)))
        left = [layer for layer in candidates if layer not in chosen]
        losses = sweep.losses(base, [Trial(layer, Mode(False, False)) for layer in left], progress)
        rounds.append(Round(dict(zip(left, losses, strict=True)), left[losses.index(min(losses))]))
        chosen.append(rounds[-1].selected)
        if on_round:
            on_round(number, rounds[-1])
    return Plan(num_layers, tuple(chosen), tuple(sorted(candidates))), rounds
