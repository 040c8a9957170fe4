"""Losses of many trials at once: models that differ in a few sublayers share all that they have in common."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from lib.config.plan import Mode, Plan
from lib.engine.activations import Activations, SharedInputs
from lib.engine.finite import check_finite
from lib.engine.map_windows import Tick, map_windows, waiting_bytes
from lib.errors import is_out_of_memory
from lib.models.decoder import Decoder
from lib.runtime.batching import Batcher, Progress
from lib.runtime.memory import free_bytes, free_host_memory

Modes = tuple[Mode, ...]  # of the layers from 0 up
_ROOM = 0.25  # share of the free memory, for hidden states that later trials can start from


class Trial(NamedTuple):
    """The base with one layer in another mode."""

    layer: int
    mode: Mode


class _States:
    """A cache of hidden states (N, T, D) of this process's windows, by the modes of the layers below them.

    It keeps as many as fit on the device. The first, which saves most, goes to host memory when it does not fit.
    """

    def __init__(self, device: torch.device):
        self._device, self._room = device, int(free_bytes(device) * _ROOM)  # bytes, for all
        self._share = slice(0, 0)
        self._complete: dict[Modes, torch.Tensor] = {}
        self._filling: dict[Modes, torch.Tensor | None] = {}  # None: there was no room

    def begin(self, models: Sequence[Modes], share: slice) -> None:
        """Starts walks of these models. A cache that is half full drops states that none of them passes through."""
        self._filling = {}
        if share != self._share:
            self._share, self._complete = share, {}
        if self._size > self._room / 2:
            passed = [modes for modes in self._complete if any(model[: len(modes)] == modes for model in models)]
            self._complete = {modes: self._complete[modes] for modes in passed}

    def end(self) -> None:
        """Ends the walks of all windows; states written in them can be read from now on."""
        self._complete |= {modes: states for modes, states in self._filling.items() if states is not None}
        self._filling = {}

    def longest(self, modes: Modes) -> Modes:
        """The longest prefix of some modes whose states can be read; empty when there is none."""
        return next((modes[:n] for n in range(len(modes), 0, -1) if modes[:n] in self._complete), ())

    def read(self, rows: slice, modes: Modes) -> torch.Tensor | None:
        """The states (B, T, D) of some windows; None for an empty prefix."""
        return self._complete[modes][self._places(rows)].to(self._device) if modes else None

    def write(self, rows: slice, modes: Modes, hidden_states: torch.Tensor) -> None:
        """Keeps the states (B, T, D) of some windows, if those of all windows fit."""
        if not modes or modes in self._complete:
            return
        if modes not in self._filling:
            self._filling[modes] = self._room_for(hidden_states)
        if (kept := self._filling[modes]) is not None:
            kept[self._places(rows)] = hidden_states.to(kept.device)

    def _room_for(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        shape, device = (self._share.stop - self._share.start, *hidden_states.shape[1:]), self._device
        size = math.prod(shape) * hidden_states.element_size()
        if size == 0:  # this process has no windows; it runs one only to learn shapes
            return None
        if self._size + size > self._room:
            if self._size or size > free_host_memory() * _ROOM:
                return None
            device = torch.device("cpu")
        try:
            return torch.empty(shape, dtype=hidden_states.dtype, device=device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None  # the cache only saves time

    @property
    def _size(self) -> int:
        """Bytes of all cached states."""
        kept = [*self._complete.values(), *self._filling.values()]
        return sum(states.nbytes for states in kept if states is not None)

    def _places(self, rows: slice) -> slice:
        return slice(rows.start - self._share.start, rows.stop - self._share.start)


class Sweep:
    """Measures the loss of many models that differ from a base in one layer each.

    Each batch of windows walks up the layers once: models with the same modes so far share the walk, and fork where
    they differ; each ends in the model's own tail. Hidden states at the layers of trials are cached, so that later
    trials on the same windows start at the last layer that they have in common with an earlier one.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor, batcher: Batcher):
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self._kept: _States | None = None
        self._losses: dict[Modes, float] = {}
        self.asked: set[Modes] = set()  # the models whose loss was asked for, since this was last cleared
        self.on_measured: Callable[[dict[str, float]], object] = lambda losses: None  # gets all losses known so far

    def add_known(self, losses: Mapping[str, float]) -> None:
        """Adds losses that an earlier `on_measured` got; they are not measured again."""
        for text, loss in losses.items():
            self._losses[tuple(_MODES[letter] for letter in text)] = loss

    def forget(self) -> None:
        """Frees the cached hidden states."""
        self._kept = None

    def losses(self, base: Plan, trials: Sequence[Trial], progress: Progress | None = None) -> list[float]:
        """For each trial, the sum over windows of mean token cross-entropy times T (fp32, summed in fp64).

        A model that any search has measured before is not measured again. Raises `RunError` naming the layer when a
        loss is not finite.
        """
        tried = [(*base.modes[: trial.layer], trial.mode, *base.modes[trial.layer + 1 :]) for trial in trials]
        self.asked |= set(tried)
        new = {modes: trial for modes, trial in zip(tried, trials, strict=True) if modes not in self._losses}
        if new:
            self._losses |= zip(new, self._measured(new, progress), strict=True)
            self.on_measured({"".join(map(_letter, modes)): loss for modes, loss in self._losses.items()})
        elif progress:
            progress(len(self.windows))
        return [self._losses[modes] for modes in tried]

    def loss(self, plan: Plan) -> float:
        """The loss of the model under a plan."""
        layer = min((*plan.mha_removed, *plan.ffn_removed), default=0)
        return self.losses(plan, [Trial(layer, plan.mode(layer))])[0]

    def _measured(self, trials: Mapping[Modes, Trial], progress: Progress | None) -> list[float]:
        """The losses of models. Several processes share the windows, or the models when there are too few windows."""
        ranks, models = self.batcher.ranks, list(trials)
        if len(self.windows) >= ranks.count:
            return self._sums(self._measure(trials, self.batcher, progress))
        mine = {modes: trials[modes] for modes in models[ranks.rank :: ranks.count]}
        found = self._measure(mine, Batcher(self.batcher.size), progress) if mine else torch.zeros(1, 0)
        sums = ranks.gather(torch.tensor(self._sums(found), dtype=torch.float64)).tolist()
        places = [place for rank in range(ranks.count) for place in range(len(models))[rank :: ranks.count]]
        return [loss for _, loss in sorted(zip(places, sums, strict=True))]

    def _sums(self, window_losses: torch.Tensor) -> list[float]:
        """(N, trials) -> the loss of each trial."""
        return (window_losses.double().sum(dim=0) * self.windows.shape[1]).tolist()

    def _measure(self, trials: Mapping[Modes, Trial], batcher: Batcher, progress: Progress | None) -> torch.Tensor:
        """The losses (N, trials) of all windows, by walks up the layers."""
        device = torch.device("cpu") if self.decoder.is_offloaded else self.decoder.device
        self._kept = kept = self._kept or _States(device)
        kept.begin(list(trials), batcher.share(len(self.windows)))

        def losses_of(rows: slice, tick: Tick) -> torch.Tensor:  # (N, trials)
            running = self._walk(rows, trials, kept, tick)
            losses = [self._trial_losses(rows, modes, trial, running.pop(modes)) for modes, trial in trials.items()]
            return torch.stack(losses, dim=1)

        size = waiting_bytes(self.decoder, self.windows.shape[1], len(trials) + 2)
        window_losses = map_windows(self.decoder, len(self.windows), batcher, losses_of, size, progress)
        kept.end()
        return window_losses

    def _walk(self, rows: slice, trials: Mapping[Modes, Trial], kept: _States, tick: Tick) -> dict[Modes, Activations]:
        """Walks some windows up the layers; returns the activations of each model after the last layer."""
        decoder, windows, forks = self.decoder, self.windows[rows], {trial.layer for trial in trials.values()}
        begins = {modes: kept.longest(modes) for modes in trials}
        running: dict[Modes, Activations] = {}  # by the modes of the layers below
        inputs = SharedInputs(decoder, windows)
        for layer in range(min(map(len, begins.values())), decoder.num_layers):
            for begin in begins.values():
                if len(begin) == layer and begin not in running:
                    states = kept.read(rows, begin)
                    running[begin] = Activations(decoder, windows, self.batcher, layer, states, inputs)
            if layer in forks:
                for below, walk in running.items():
                    assert walk.hidden_states is not None
                    kept.write(rows, below, walk.hidden_states)
            next_of: dict[Modes, dict[Mode, None]] = {below: {} for below in running}  # in the order of the models
            for modes, begin in begins.items():
                if len(begin) <= layer:
                    next_of[modes[:layer]][modes[layer]] = None
            with self._at(layer, [mode for followers in next_of.values() for mode in followers]):
                running = {
                    (*below, mode): states
                    for below, followers in next_of.items()
                    for mode, states in _stepped(running.pop(below), list(followers)).items()
                }
            tick()
        return running

    def _at(self, layer: int, modes: Sequence[Mode]) -> AbstractContextManager[None]:
        """Inside, a layer has its weights, unless every model skips it whole."""
        return self.decoder.at(layer) if any(mode.attention or mode.ffn for mode in modes) else nullcontext()

    def _trial_losses(self, rows: slice, modes: Modes, trial: Trial, states: Activations) -> torch.Tensor:
        """The tail of one trial: mean cross-entropy (N,) of its windows, on the CPU."""
        losses = states.losses()
        removed = [name for name, is_on in (("MHA", trial.mode.attention), ("FFN", trial.mode.ffn)) if not is_on]
        what = f"trial without {' and '.join(removed)} of layer {trial.layer}: " if removed else ""
        check_finite(self.decoder, losses, self.windows[rows], modes, what)
        return losses


def _stepped(states: Activations, modes: Sequence[Mode]) -> dict[Mode, Activations]:
    """The output of a layer in each of some modes; the last mode advances `states` itself."""
    after = {mode: states.fork() for mode in modes[:-1]} | {modes[-1]: states}
    for mode, moved in after.items():
        moved.step(mode)
    return after


_MODES = {"2": Mode(), "a": Mode(ffn=False), "f": Mode(attention=False), "0": Mode(False, False)}


def _letter(mode: Mode) -> str:
    """A layer's mode as a letter."""
    return next(letter for letter, other in _MODES.items() if other == mode)
