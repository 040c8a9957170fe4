"""Which sublayers to remove: the parameter budget, the sweep that measures removals, and the greedy search."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch

from lib.batching import Batcher, Progress
from lib.errors import InputError
from lib.model import Decoder
from lib.offload import free_host_memory
from lib.plan import Mode, Plan
from lib.stream import Activations, Tick, check_finite, map_windows, waiting_bytes

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


def choose_candidates(bi_scores: Sequence[float], count: int, layers: Sequence[int] | None = None) -> list[int]:
    """The `count` layers of lowest Block Influence, ascending; of equals the lower index first.

    Of all layers, or of those given: of a model that was pruned before, those that are whole.
    """
    layers = range(len(bi_scores)) if layers is None else layers
    return sorted(layers, key=lambda layer: (bi_scores[layer], layer))[:count]


# What it costs to remove something ------------------------------------------------------------------------------------


class Trial(NamedTuple):
    """The base with one layer in another mode."""

    layer: int
    mode: Mode


class _Prefix:
    """The hidden states of this process's windows before a layer, under given modes of the layers below it."""

    def __init__(self, modes: tuple[Mode, ...], share: slice):
        self.modes, self._share = modes, share
        self._states: torch.Tensor | None = None  # (N, T, D)
        self._has_room = True

    @property
    def is_kept(self) -> bool:
        return self._states is not None

    def read(self, rows: slice, device: torch.device) -> torch.Tensor:
        return self._states[self._places(rows)].to(device)

    def write(self, rows: slice, hidden_states: torch.Tensor) -> None:
        """Keeps the states (B, T, D) of some windows, on their device or else on the host, if there is room for all."""
        if self._states is None and self._has_room:
            shape = (self._share.stop - self._share.start, *hidden_states.shape[1:])
            device = _device_with_room(math.prod(shape) * hidden_states.element_size(), hidden_states.device)
            self._has_room = device is not None
            self._states = torch.empty(shape, dtype=hidden_states.dtype, device=device) if device else None
        if self._states is not None:
            self._states[self._places(rows)] = hidden_states.to(self._states.device)

    def _places(self, rows: slice) -> slice:
        return slice(rows.start - self._share.start, rows.stop - self._share.start)


def _device_with_room(size: int, device: torch.device) -> torch.device | None:
    """The device, the host, or neither: the first in whose free memory `size` bytes fit four times."""
    if device.type == "cuda" and size < torch.cuda.mem_get_info(device)[0] / 4:
        return device
    return torch.device("cpu") if size < free_host_memory() / 4 else None


class Sweep:
    """Measures the loss of many models that differ from a base in one layer each, sharing what they have in common.

    One walk a batch: the base goes up the layers once; where a trial differs, the base forks, and the trial goes on by
    itself to the model's own tail. What lies below the lowest trial is kept for the next sweep over the same windows.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor, batcher: Batcher):
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self._nothing = _Prefix((), slice(0, 0))
        self._prefix = self._nothing
        self._losses: dict[tuple[Mode, ...], float] = {}
        self.asked: set[tuple[Mode, ...]] = set()  # for the loss of which models, since this was last cleared
        self.on_measured: Callable[[dict[str, float]], object] = lambda losses: None  # is given all that is known

    def know(self, losses: Mapping[str, float]) -> None:
        """Takes over what `on_measured` was given before: these are not measured again."""
        for text, loss in losses.items():
            self._losses[tuple(_MODES[letter] for letter in text)] = loss

    def losses(self, base: Plan, trials: Sequence[Trial], progress: Progress | None = None) -> list[float]:
        """For each trial, the sum over windows of mean token cross-entropy times T (fp32, summed in fp64).

        What was measured before, in whichever search, is not measured again. Raises `RunError` naming the layer when a
        loss is not finite.
        """
        tried = [(*base.modes[: trial.layer], trial.mode, *base.modes[trial.layer + 1 :]) for trial in trials]
        self.asked |= set(tried)
        new = {modes: trial for modes, trial in zip(tried, trials, strict=True) if modes not in self._losses}
        if new:
            self._losses |= zip(new, self._measured(base, list(new.values()), progress), strict=True)
            self.on_measured({"".join(map(_letter, modes)): loss for modes, loss in self._losses.items()})
        elif progress:
            progress(len(self.windows))
        return [self._losses[modes] for modes in tried]

    def loss(self, plan: Plan) -> float:
        """The loss of the model under a plan."""
        layer = min((*plan.mha_removed, *plan.ffn_removed), default=0)
        return self.losses(plan, [Trial(layer, plan.mode(layer))])[0]

    def _measured(self, base: Plan, trials: Sequence[Trial], progress: Progress | None) -> list[float]:
        """The losses of trials. Several processes share the windows, or, where these are too few, the trials."""
        ranks = self.batcher.ranks
        if len(self.windows) >= ranks.count:
            return self._sums(self._measure(base, trials, self.batcher, progress))
        mine = trials[ranks.rank :: ranks.count]
        found = self._measure(base, mine, Batcher(self.batcher.size), progress) if mine else torch.zeros(1, 0)
        sums = ranks.gather(torch.tensor(self._sums(found), dtype=torch.float64)).tolist()
        places = [place for rank in range(ranks.count) for place in range(len(trials))[rank :: ranks.count]]
        return [loss for _, loss in sorted(zip(places, sums, strict=True))]

    def _sums(self, window_losses: torch.Tensor) -> list[float]:
        """(N, trials) -> the loss of each trial."""
        return (window_losses.double().sum(dim=0) * self.windows.shape[1]).tolist()

    def _measure(
        self, base: Plan, trials: Sequence[Trial], batcher: Batcher, progress: Progress | None
    ) -> torch.Tensor:
        """The losses (N, trials) of all windows, by walks up the layers."""
        modes, known = base.modes, self._prefix
        below = modes[: min(trial.layer for trial in trials)]
        if not known.is_kept or known.modes != below[: len(known.modes)]:
            known = self._nothing
        new = known if known.modes == below else _Prefix(below, batcher.share(len(self.windows)))

        def losses_of(rows: slice, tick: Tick) -> torch.Tensor:  # (N, trials)
            running, states_below = self._walk(rows, modes, trials, known, tick)
            losses = [self._trial_losses(rows, modes, trial, running.pop(trial)) for trial in trials]
            if new is not known:
                new.write(rows, states_below)  # last: a batch that runs out of memory is tried again from `known`
            return torch.stack(losses, dim=1)

        size = waiting_bytes(self.decoder, self.windows.shape[1], len(trials) + 2)
        window_losses = map_windows(self.decoder, len(self.windows), batcher, losses_of, size, progress)
        if new.is_kept:
            self._prefix = new
        return window_losses

    def _walk(
        self, rows: slice, modes: Sequence[Mode], trials: Sequence[Trial], known: _Prefix, tick: Tick
    ) -> tuple[dict[Trial, Activations], torch.Tensor]:
        """Takes some windows up the layers: each trial after the last, and the hidden states below the first."""
        decoder, windows = self.decoder, self.windows[rows]
        kept = known.read(rows, decoder.waiting_device) if known.is_kept else None
        base = Activations(decoder, windows, self.batcher, len(known.modes), kept)
        first_fork, last_fork = min(trial.layer for trial in trials), max(trial.layer for trial in trials)
        running: dict[Trial, Activations] = {}
        states_below = base.hidden_states
        for layer in range(len(known.modes), decoder.num_layers):
            if layer == first_fork:
                states_below = base.fork().hidden_states
            with self._at(layer, modes[layer], trials):
                for states in running.values():
                    states.step(modes[layer])
                for trial in trials:
                    if trial.layer == layer:
                        running[trial] = base.fork()
                        running[trial].step(trial.mode)
                if layer < last_fork:
                    base.step(modes[layer])
            tick()
        return running, states_below

    def _at(self, layer: int, mode: Mode, trials: Sequence[Trial]) -> AbstractContextManager[None]:
        """Inside, the weights of a layer are there for all that walk through it; of a closed one nothing is needed."""
        modes = [mode, *(trial.mode for trial in trials if trial.layer == layer)]
        return self.decoder.at(layer) if any(one.attention or one.ffn for one in modes) else nullcontext()

    def _trial_losses(self, rows: slice, modes: Sequence[Mode], trial: Trial, states: Activations) -> torch.Tensor:
        """The tail of one trial: mean cross-entropy (N,) of its windows, on the CPU."""
        losses = states.losses()
        tried = [*modes[: trial.layer], trial.mode, *modes[trial.layer + 1 :]]
        check_finite(self.decoder, losses, self.windows[rows], tried, f"trial without layer {trial.layer}: ")
        return losses


_MODES = {"2": Mode(), "a": Mode(ffn=False), "f": Mode(attention=False), "0": Mode(False, False)}


def _letter(mode: Mode) -> str:
    """A layer's mode as a letter: what it still has."""
    return next(letter for letter, other in _MODES.items() if other == mode)


# The search -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Round:
    """One round of a greedy search: the loss of each removal that was tried, and the one chosen.

    For PP-LLMs a removal is the number of the candidate that is closed whole; for others see `lib.policies`.
    """

    losses: dict
    selected: Hashable

    @property
    def loss(self) -> float:
        return self.losses[self.selected]


def greedy_search(
    sweep: Sweep,
    candidates: Sequence[int],
    mha_count: int,
    on_round: Callable[[int, Round], object] | None = None,
    progress: Progress | None = None,
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
