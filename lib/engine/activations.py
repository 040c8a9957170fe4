"""The calibration engine: feeds hidden states through the decoder layers, layer by layer, and takes their losses."""

from collections.abc import Callable
from contextlib import suppress

import torch

from lib.config.plan import Mode
from lib.engine.tail import tail_losses
from lib.errors import InputError, RunError
from lib.models.decoder import Decoder, LayerInputs, StopForward
from lib.runtime.batching import Batcher

_ON = Mode()

See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a batch's input and output of a layer -> a row a window


class Activations:
    """The hidden states (N, T, D) of some windows (N, T) before one decoder layer, moved on layer by layer.

    They are in the model's dtype, on the device of the embedding, or in host memory where a model's layers come and go.
    What the model hands to its layers besides (masks, positions, rotary tables) is taken once for each number of
    windows in a batch, since it is the same for all windows; raises `InputError` for a model where it is not.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: torch.Tensor,
        batcher: Batcher,
        layer: int = 0,
        hidden_states: torch.Tensor | None = None,
        inputs: "SharedInputs | None" = None,
        first: int = 0,
    ):
        """Before layer 0, from the embedding; or before another `layer`, with the `hidden_states` that are known.

        `inputs` are those of other walks of the same windows; `first` is the number of the first window, for messages.
        """
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self.layer, self.first = layer, first
        self.hidden_states = torch.empty(0) if hidden_states is None else hidden_states
        self._is_own = False  # else somebody shares them, and they must not be written to
        self.inputs = inputs or SharedInputs(decoder, windows)
        if hidden_states is None and len(windows):
            batcher.map(self._embed, len(windows))

    def _embed(self, rows: slice) -> torch.Tensor:
        hidden_states, inputs = self.decoder.embed(self.windows[rows])
        self.inputs.keep(rows, inputs)
        self._put(rows, hidden_states)
        return torch.zeros(len(hidden_states))

    def _put(self, rows: slice, hidden_states: torch.Tensor) -> None:
        """Replaces those of some windows. All of them are replaced at once without a copy."""
        device, count = self.decoder.waiting_device, len(self.windows)
        if rows.stop - rows.start == count:
            self.hidden_states = hidden_states.to(device)
        else:
            if len(self.hidden_states) == 0:
                self.hidden_states = hidden_states.new_empty(count, *hidden_states.shape[1:], device=device)
            elif not self._is_own:
                self.hidden_states = self.hidden_states.clone()
            self.hidden_states[rows] = hidden_states
        self._is_own = True

    def fork(self) -> "Activations":
        """The same hidden states, to be moved on by themselves."""
        self._is_own = False
        return Activations(self.decoder, self.windows, self.batcher, self.layer, self.hidden_states, self.inputs)

    @torch.no_grad()
    def look(self) -> None:
        """Runs the layer over all windows and drops what comes out; hooks see what they want to see.

        They may leave the layer's forward by `StopForward`. When memory runs out nothing is tried again here, for hooks
        would see the same windows twice: see `Batcher.whole`.
        """
        with self.decoder.at(self.layer):
            for start in range(0, len(self.windows), self.batcher.size):
                with suppress(StopForward):
                    self._run(slice(start, min(start + self.batcher.size, len(self.windows))), _ON)

    @torch.no_grad()
    def step(self, mode: Mode = _ON, see: See | None = None) -> torch.Tensor:
        """Replaces the hidden states by what the layer makes of them in a mode.

        Gives what `see` says of each batch's inputs and outputs, both (B, T, D) -> (B, ...), for all windows.
        """
        if len(self.windows) == 0 or see is None and not mode.attention and not mode.ffn:
            self.layer += 1
            return torch.zeros(len(self.windows))

        def move(rows: slice) -> torch.Tensor:
            before = self.states(rows)
            after = self.decoder.run_layer(self.layer, before, self.inputs.of(rows), mode)
            seen = see(before, after) if see else torch.zeros(len(after))
            if after is not before:
                self._put(rows, after)  # last: a batch that runs out of memory is tried again
            return seen

        with self.decoder.at(self.layer):
            seen = self.batcher.map(move, len(self.windows))
        self.layer += 1
        return seen

    def advance(self) -> None:
        """Replaces the hidden states by what the layer makes of them. Raises `RunError` when that is not finite."""
        is_finite = self.step(see=_are_finite).bool()
        if not is_finite.all():
            window = self.first + int((~is_finite).nonzero()[0])
            raise RunError(
                f"NaN or infinity in the output of layer {self.layer - 1} on calibration window {window}; "
                "try --dtype float32 or bfloat16, and check the checkpoint"
            )

    def losses(self, scored: int | None = None) -> torch.Tensor:
        """Mean cross-entropy (N,) of the windows by the model's tail, see `tail_losses`; on the CPU."""

        def batch_losses(rows: slice) -> torch.Tensor:
            return tail_losses(self.decoder, self.states(rows), self.windows[rows], scored)

        return self.batcher.map(batch_losses, len(self.windows))

    def states(self, rows: slice) -> torch.Tensor:
        """The hidden states of some windows, on the device."""
        return self.hidden_states[rows].to(self.decoder.device)

    def _run(self, rows: slice, mode: Mode) -> torch.Tensor:
        return self.decoder.run_layer(self.layer, self.states(rows), self.inputs.of(rows), mode)


class SharedInputs:
    """What layers are handed besides hidden states, for batches of some windows, by the windows in a batch."""

    def __init__(self, decoder: Decoder, windows: torch.Tensor):
        self._decoder, self._windows = decoder, windows
        self._found: dict[int, tuple[slice, LayerInputs]] = {}
        self._are_checked = False

    def keep(self, rows: slice, inputs: LayerInputs) -> None:
        self._found[rows.stop - rows.start] = rows, inputs

    def of(self, rows: slice) -> LayerInputs:
        """For a batch. Raises `InputError` when those of another batch, which it would have, depend on the tokens."""
        count = rows.stop - rows.start
        if count not in self._found:
            self.keep(rows, self._decoder.embed(self._windows[rows])[1])
        found_for, inputs = self._found[count]
        if found_for != rows and not self._are_checked:
            one, other = (self._decoder.embed(self._windows[ends])[1] for ends in (slice(1), slice(-1, None)))
            _check_same(self._decoder, one, other)
            self._are_checked = True
        return inputs


def _are_finite(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """For each window whether the output (B, T, D) is finite: (B,)."""
    is_finite = after.sum(dim=(1, 2), dtype=torch.float32).isfinite()
    if not is_finite.all():  # or the sum is too large
        is_finite = after.isfinite().flatten(1).all(dim=1)
    return is_finite


# Many windows ---------------------------------------------------------------------------------------------------------


def _check_same(decoder: Decoder, one: LayerInputs, other: LayerInputs) -> None:
    """Raises `InputError` when layers are handed something that depends on the tokens."""
    for left, right in zip(_tensors([one.args, one.kwargs]), _tensors([other.args, other.kwargs]), strict=True):
        if not torch.equal(left, right):
            raise InputError(f"{decoder.family} does not fit: what its layers are given depends on the tokens")


def _tensors(value) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for inner in values for tensor in _tensors(inner)]
