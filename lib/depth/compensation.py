"""Compensation: after depth pruning, projections of kept sublayers are refitted so that hidden states come back.

Two streams of calibration hidden states walk up the layers together, one through the dense model, one through the
pruned one. Where a kept sublayer is followed by removed ones, the projection by which it writes into the residual
stream is refitted to what the dense model's hidden states are after the gap. With `all`, every later projection is
refitted too, to the dense model's hidden states after its own sublayer: this takes back what has accumulated. No
parameter is added. The fit itself is in `lib.depth.refit`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby

import torch

from lib.config.plan import Mode, Plan
from lib.depth.refit import Moments, fit
from lib.engine.activations import Activations
from lib.errors import RunError
from lib.models.decoder import Decoder
from lib.models.offload import follow
from lib.models.residual_writers import Writer, find_writer, is_sequential, sublayer_of
from lib.models.weight_deltas import Changes, Difference, difference
from lib.runtime.batching import Batcher, Progress, retry_once

HELD_OUT = 8  # one window of so many is held out of the fits
_ATTENTION, _FFN, _NONE = Mode(ffn=False), Mode(attention=False), Mode(False, False)

Move = tuple[int, Mode]  # of hidden states through a layer in a mode


@dataclass(frozen=True)
class Step:
    """The pruned stream's move through a sublayer, and the dense stream's moves beside it."""

    pruned: Move
    dense: tuple[Move, ...]

    @property
    def layer(self) -> int:
        return self.pruned[0]

    @property
    def is_gap(self) -> bool:
        """True where the pruned model lacks some of the sublayers."""
        return self.dense != (self.pruned,)


def steps_of(decoder: Decoder, plan: Plan) -> tuple[list[Move], list[Step]]:
    """The dense stream's moves before the first kept sublayer, and all steps from there, in order.

    A layer is one step for each of its sublayers, or one as a whole if these run in parallel.
    """
    first: list[Move] = []
    steps: list[Step] = []
    for index, (given, kept) in enumerate(zip(decoder.given_modes, decoder.complete(plan).modes, strict=True)):
        for part in [_ATTENTION, _FFN] if given.is_whole and is_sequential(decoder, index) else [given]:
            dense, pruned = (index, part), Mode(part.attention and kept.attention, part.ffn and kept.ffn)
            if pruned != _NONE:
                steps.append(Step((index, pruned), (dense,)))
            elif part != _NONE and steps:
                steps[-1] = replace(steps[-1], dense=(*steps[-1].dense, dense))
            elif part != _NONE:
                first.append(dense)
    return first, steps


@dataclass(frozen=True)
class Refit:
    """What became of one projection: the form and strength of its change, and its error on the held-out windows.

    The error is relative to that without a change. Form and strength are None where no change lowers it, and the
    projection stays as it is.
    """

    layer: int
    name: str  # path within the layer
    unknowns: int  # for each of its outputs
    form: str | None
    strength: float | None
    held_out_error: float

    @property
    def is_changed(self) -> bool:
        return self.form is not None


@torch.no_grad()
def compensate(
    decoder: Decoder,
    plan: Plan,
    windows: torch.Tensor,
    mode: str,
    batcher: Batcher,
    changes: Changes,
    progress: Progress | None = None,
) -> list[Refit]:
    """Refits projections of the model under a plan in place, on windows (N, T) with N at least 2; returns all refits.

    Each finished layer is written to `changes`; layers already there are restored. Several processes share the windows.
    Raises `RunError` that names the layer if its hidden states are not finite.
    """
    first, steps = retry_once(partial(steps_of, decoder, plan))
    writers, ranks = retry_once(partial(_find_writers, decoder, first, steps, mode)), batcher.ranks
    pending = [step.layer for step in writers if step.layer not in changes]
    streams = Streams(decoder, windows, batcher, first) if pending else None
    for layer, group in groupby(steps, key=lambda step: step.layer):
        of_layer = {step: writers.get(step) for step in group}
        with decoder.at(layer):
            if not streams or layer > pending[-1]:
                for writer in filter(None, of_layer.values()):
                    _restore(writer, changes)
            elif layer in changes:
                streams.walk(of_layer, lambda step, writer: _restore(writer, changes))
            else:
                refits, weights = _refit_layer(streams, of_layer)
                if refits:
                    (changes.write if ranks.is_first else changes.add)(layer, weights, list(map(asdict, refits)))
            if any(of_layer.values()):
                decoder.keep(layer)
        if progress:
            progress(1)
    ranks.wait()  # until the first process has written everything
    follow(decoder.layers, [changes])
    return [Refit(**one) for _, of_layer in sorted(changes.notes.items()) for one in of_layer]


def _refit_layer(
    streams: "Streams", writers: Mapping[Step, Writer | None]
) -> tuple[list[Refit], dict[str, Difference]]:
    """Refits the projections of a layer, from the bottom up; returns what became of each, and the changed weights."""
    refits: list[Refit] = []
    weights: dict[str, Difference] = {}

    def settle(step: Step, writer: Writer) -> None:
        old = writer.module.weight.clone()
        refits.append(streams.refit(step, writer))
        if refits[-1].is_changed:
            weights[writer.path] = retry_once(partial(difference, old, writer.module.weight))

    streams.walk(writers, settle)
    return refits, weights


def _restore(writer: Writer, changes: Changes) -> None:
    """Gives a projection the weight that an earlier, interrupted run found."""
    weight = writer.module.weight
    weight.copy_(changes.apply(writer.layer, writer.path, weight))


def _find_writers(decoder: Decoder, first: Sequence[Move], steps: Sequence[Step], mode: str) -> dict[Step, Writer]:
    """The projections to refit: those before gaps, or all from the first gap on. Sublayers without one are left out."""
    parts = 0 if first else next((place for place, step in enumerate(steps) if step.is_gap), len(steps))
    chosen = [step for step in steps[parts:] if mode == "all" or step.is_gap]
    found = {step: find_writer(decoder, step.layer, sublayer_of(step.pruned[1])) for step in chosen}
    return {step: writer for step, writer in found.items() if writer}


def held_out(count: int) -> torch.Tensor:
    """Which of the windows are held out of the fits, (count,): one of `HELD_OUT`, and at least the last."""
    places = torch.arange(count)
    return (places % HELD_OUT == HELD_OUT - 1) | ((places == count - 1) & (count < HELD_OUT))


def token_counts(windows: torch.Tensor) -> tuple[int, int]:
    """How many tokens of windows (N, T) are fitted to, and how many held out."""
    checked = int(held_out(len(windows)).sum()) * windows.shape[1]
    return windows.numel() - checked, checked


class Streams:
    """The hidden states of the windows in the dense and in the pruned model, on their way up the layers."""

    def __init__(self, decoder: Decoder, windows: torch.Tensor, batcher: Batcher, first: Sequence[Move]):
        share = batcher.share(len(windows))
        self.decoder, self.batcher = decoder, batcher
        self.is_held_out = held_out(len(windows))[share].tolist()
        self.dense = Activations(decoder, windows[share], batcher, first=share.start)
        self.pruned = self.dense.fork() if first else None  # None: the same as the dense stream so far
        _move(self.dense, first)

    def walk(self, writers: Mapping[Step, Writer | None], settle: Callable[[Step, Writer], None]) -> None:
        """Moves both through a layer; `settle` gets a projection that the dense stream is through with."""
        for step, writer in writers.items():
            if self.pruned is None and step.is_gap:
                self.pruned = self.dense.fork()
            _move(self.dense, step.dense)
            if writer:
                settle(step, writer)
            if self.pruned is not None:
                _move(self.pruned, [step.pruned])

    def refit(self, step: Step, writer: Writer) -> Refit:
        """Refits one projection in place, so that after `step` the pruned stream comes near the dense one."""
        ranks = self.batcher.ranks
        moments = self.batcher.retry_smaller(lambda: self.observe(step, writer), len(self.dense.windows))
        for one in moments:
            one.combine(ranks.add)

        def fit_here() -> dict:
            try:
                best = fit(*moments, writer.matrix)
            except RunError as error:
                raise RunError(f"layer {writer.layer} {writer.name}: {error}") from error
            unknowns = len(writer.matrix)
            if best.change is not None:
                writer.matrix.add_(best.change)
            return asdict(Refit(writer.layer, writer.name, unknowns, best.form, best.strength, best.held_out_error))

        found = Refit(**ranks.agree(partial(retry_once, fit_here)))
        ranks.send(writer.module.weight, 0)
        return found

    def observe(self, step: Step, writer: Writer) -> tuple[Moments, Moments]:
        """The moments over the windows of this process: of those to fit to, and of those held out."""
        device, (in_features, out_features) = writer.module.weight.device, writer.matrix.shape
        to_fit, to_check = (Moments(in_features, out_features, device) for _ in range(2))
        seen: list[torch.Tensor] = []
        assert self.pruned is not None, "no projection is refitted before the first gap"
        self.pruned.layer, seqlen = step.layer, self.pruned.windows.shape[1]
        with writer.module.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
            for rows, outputs in self.pruned.outputs(step.pruned[1]):
                missing = self.decoder.stream(self.dense.states(rows) - outputs.to(self.decoder.device))
                missing = missing.to(device) / writer.scale
                inputs = seen.pop().reshape(-1, seqlen, in_features)
                for z, r, is_held_out in zip(inputs, missing, self.is_held_out[rows], strict=True):
                    (to_check if is_held_out else to_fit).update(z, r)
        return to_fit, to_check


def _move(states: Activations, moves: Iterable[Move]) -> None:
    for layer, mode in moves:
        states.layer = layer
        states.move(mode)
