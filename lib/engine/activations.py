"""Hidden states of calibration windows, moved through the decoder one layer at a time."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property

import torch

from lib.config.plan import Mode
from lib.engine.tail import tail_losses, tail_scores
from lib.errors import RunError
from lib.models.decoder import Decoder, LayerInputs, StopForward
from lib.runtime.batching import Batcher

_ON = Mode()

See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # layer input and output of a batch -> one row per window


class Activations:
    """Hidden states (N, T, D) of windows (N, T) at the input of one decoder layer, moved up layer by layer.

    They have the model's dtype and are where `Decoder.waiting_device` says.
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
        """Starts at layer 0 from the embedding, or at `layer` from the given `hidden_states`.

        `inputs` may be shared with other walks over the same windows. `first` is the index of the first window, for
        error messages.
        """
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self.layer, self.first = layer, first
        self.hidden_states = torch.zeros(0) if hidden_states is None else hidden_states  # empty until embedded
        self._is_own = False  # True: not shared with another walk, so they may be written to
        self.inputs = inputs or SharedInputs(decoder, windows)
        if hidden_states is None and len(windows):
            batcher.map(self._embed, len(windows))

    def _embed(self, rows: slice) -> torch.Tensor:
        hidden_states, inputs = self.decoder.embed(self.windows[rows])
        self.inputs.keep(rows, inputs)
        self._put(rows, hidden_states)
        return torch.zeros(len(hidden_states))

    def _put(self, rows: slice, hidden_states: torch.Tensor) -> None:
        """Replaces the hidden states of `rows`, without a copy if these are all windows."""
        count = len(self.windows)
        if self._is_own and len(self.hidden_states) and len(hidden_states) < count:
            self.hidden_states[rows] = hidden_states
            return
        device = self.decoder.waiting_device(hidden_states.nbytes // len(hidden_states) * count)
        if len(hidden_states) == count:
            self.hidden_states = hidden_states.to(device)
        else:
            if len(self.hidden_states):
                self.hidden_states = self.hidden_states.to(device, copy=True)
            else:
                self.hidden_states = hidden_states.new_empty(count, *hidden_states.shape[1:], device=device)
            self.hidden_states[rows] = hidden_states
        self._is_own = True

    def fork(self) -> "Activations":
        """An independent walk from the same hidden states, which are copied on write."""
        self._is_own = False
        return Activations(self.decoder, self.windows, self.batcher, self.layer, self.hidden_states, self.inputs)

    def some(self, rows: slice, places: list[int]) -> "Activations":
        """A walk over some of the windows `rows`, from the same hidden states."""
        windows, states = self.windows[rows][places], self.hidden_states[rows][places]
        return Activations(self.decoder, windows, self.batcher, self.layer, states, self.inputs.some(windows))

    @torch.no_grad()
    def look(self) -> None:
        """Runs the layer over all windows for its hooks, and discards the output.

        Hooks may end the layer's forward with `StopForward`. A batch that runs out of memory is not retried here,
        because hooks would see its windows twice: see `Batcher.retry_smaller`.
        """
        with self.decoder.at(self.layer):
            for start in range(0, len(self.windows), self.batcher.size):
                with suppress(StopForward):
                    self._run(slice(start, min(start + self.batcher.size, len(self.windows))))

    @torch.no_grad()
    def step(self, mode: Mode = _ON, see: See | None = None) -> torch.Tensor:
        """Moves the hidden states through the layer in the given mode, to the next layer; returns as `move`."""
        seen = self.move(mode, see)
        self.layer += 1
        return seen

    @torch.no_grad()
    def move(self, mode: Mode, see: See | None = None) -> torch.Tensor:
        """Moves the hidden states through the layer in the given mode; `layer` stays, as its other sublayer may follow.

        Returns `see(inputs, outputs)` of every batch, both (B, T, D) -> (B, ...), concatenated over all windows.
        Without `see` it returns zeros (N,).
        """
        if len(self.windows) == 0 or see is None and not mode.attention and not mode.ffn:
            return torch.zeros(len(self.windows))

        def move(rows: slice) -> torch.Tensor:
            before = self.states(rows)
            after = self.decoder.run_layer(self.layer, before, self.inputs.of(rows), mode)
            stream = self.decoder.stream
            seen = see(stream(before), stream(after)) if see else torch.zeros(len(after))
            if after is not before:
                self._put(rows, after)  # last, because a batch that runs out of memory is retried
            return seen

        with self.decoder.at(self.layer):
            return self.batcher.map(move, len(self.windows))

    @torch.no_grad()
    def outputs(self, mode: Mode) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields the windows of every batch and the layer's output (B, T, D) for them; the hidden states stay.

        A batch that runs out of memory is not retried here, as in `look`.
        """
        with self.decoder.at(self.layer):
            for start in range(0, len(self.windows), self.batcher.size):
                rows = slice(start, min(start + self.batcher.size, len(self.windows)))
                yield rows, self.decoder.run_layer(self.layer, self.states(rows), self.inputs.of(rows), mode)

    def advance(self) -> None:
        """Moves the hidden states through the layer. Raises `RunError` if the output is not finite."""
        is_finite = self.step(see=_are_finite).bool()
        if not is_finite.all():
            window = self.first + int((~is_finite).nonzero()[0])
            raise RunError(
                f"NaN or infinity in the output of layer {self.layer - 1} on calibration window {window}; "
                "try --dtype float32 or bfloat16, and check the checkpoint"
            )

    def losses(self, scored: int | None = None) -> torch.Tensor:
        """Mean cross-entropy (N,) of each window, in nats, on the CPU; see `tail_losses`."""

        def batch_losses(rows: slice) -> torch.Tensor:
            return tail_losses(self.decoder, self.states(rows), self.windows[rows], scored)

        return self.batcher.map(batch_losses, len(self.windows))

    def scores(self, dense_states: torch.Tensor, scored: int | None = None) -> torch.Tensor:
        """Losses and distances (N, 2 + scored) to the dense model with last hidden states (N, T, D); `tail_scores`."""

        def batch_scores(rows: slice) -> torch.Tensor:
            dense = dense_states[rows].to(self.decoder.device)
            return tail_scores(self.decoder, self.states(rows), dense, self.windows[rows], scored)

        return self.batcher.map(batch_scores, len(self.windows))

    def states(self, rows: slice) -> torch.Tensor:
        """Hidden states of `rows`, on the device."""
        return self.hidden_states[rows].to(self.decoder.device)

    def _run(self, rows: slice) -> torch.Tensor:
        return self.decoder.run_layer(self.layer, self.states(rows), self.inputs.of(rows), _ON)


class SharedInputs:
    """The layers' inputs besides hidden states.

    Masks, positions and rotary tables are the same for all windows, so they are computed once per batch size. Where
    they depend on the tokens, as in Gemma 4 of few parameters, they are computed for each batch.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor):
        self._decoder, self._windows = decoder, windows
        self._found: dict[int, tuple[slice, LayerInputs]] = {}

    def keep(self, rows: slice, inputs: LayerInputs) -> None:
        self._found[rows.stop - rows.start] = rows, inputs

    def of(self, rows: slice) -> LayerInputs:
        """The inputs for a batch."""
        found_for, inputs = self._found.get(rows.stop - rows.start, (None, None))
        if inputs is None or found_for != rows and self._depend_on_tokens:
            inputs = self._decoder.embed(self._windows[rows])[1]
            self.keep(rows, inputs)
        return inputs

    def some(self, windows: torch.Tensor) -> "SharedInputs":
        """Those for some of the windows."""
        return SharedInputs(self._decoder, windows) if self._depend_on_tokens else self

    @cached_property
    def _depend_on_tokens(self) -> bool:
        one, other = (self._decoder.embed(self._windows[ends])[1] for ends in (slice(1), slice(-1, None)))
        pairs = zip(_tensors([one.args, one.kwargs]), _tensors([other.args, other.kwargs]), strict=True)
        return not all(torch.equal(left, right) for left, right in pairs)


def _are_finite(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Whether each window's output is finite: (B, T, D) -> (B,)."""
    is_finite = after.sum(dim=(1, 2), dtype=torch.float32).isfinite()
    if not is_finite.all():  # or the sum overflowed
        is_finite = after.isfinite().flatten(1).all(dim=1)
    return is_finite


def _tensors(value) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for inner in values for tensor in _tensors(inner)]
