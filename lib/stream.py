"""The calibration engine: feeds hidden states through the decoder layers, layer by layer, and takes their losses."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch

from lib.batching import Batcher, Progress
from lib.config.plan import Mode, Plan
from lib.errors import InputError, RunError
from lib.evaluate import WindowLosses, token_losses
from lib.model import Decoder, LayerInputs, StopForward
from lib.offload import free_host_memory

_LOGITS_AT_ONCE = 2**27  # elements of fp32 logits, 512 MiB
_LOGITS_AT_ONCE_ON_CPU, _TOKENS_AT_LEAST = 2**21, 256  # more of a large vocabulary do not fit its caches
_HOST_SHARE = 0.4  # of the free host memory, for hidden states that wait
_ON = Mode()

See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # a batch's input and output of a layer -> a row a window


@torch.no_grad()
def layer_steps(
    decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Walks token ids (B, T) through the layers: yields (layer, its input, its output), both (B, T, D)."""
    hidden_states, inputs = decoder.embed(input_ids)
    for layer, mode in enumerate(modes):
        output = decoder.run_layer(layer, hidden_states, inputs, mode)
        yield layer, hidden_states, output
        hidden_states = output


def final_hidden_states(decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]) -> torch.Tensor:
    """The last layer's output (B, T, D) for token ids (B, T)."""
    _, _, output = deque(layer_steps(decoder, input_ids, modes), maxlen=1).pop()
    return output


@torch.no_grad()
def tail_losses(
    decoder: Decoder, hidden_states: torch.Tensor, input_ids: torch.Tensor, scored: int | None = None
) -> torch.Tensor:
    """Mean cross-entropy of each window, in fp32: (B, T, D) and ids (B, T) -> (B,), over its last `scored` tokens.

    None: over all T-1 that are predicted. The tail runs on pieces of at most 512 MiB of fp32 logits, whatever B, T and
    the vocabulary are.
    """
    labels = input_ids[:, 1:].to(hidden_states.device)
    scored = scored or labels.shape[1]
    labels, hidden_states = labels[:, -scored:], hidden_states[:, :-1][:, -scored:]
    vocabulary = decoder.config.vocab_size
    at_once = max(1, _LOGITS_AT_ONCE // vocabulary)  # tokens
    if hidden_states.device.type == "cpu":
        at_once = min(at_once, max(_TOKENS_AT_LEAST, _LOGITS_AT_ONCE_ON_CPU // vocabulary))
    rows = max(1, at_once // labels.shape[1])  # whole windows in a piece, or a piece of one window
    piece = min(at_once, labels.shape[1])
    losses = []
    for row_states, row_labels in zip(hidden_states.split(rows), labels.split(rows), strict=True):
        pieces = []
        for states, piece_labels in zip(row_states.split(piece, dim=1), row_labels.split(piece, dim=1), strict=True):
            logits = decoder.logits(states)
            pieces.append(token_losses(logits, piece_labels.to(logits.device)))
        losses.append(torch.cat(pieces, dim=1).mean(dim=1))
    return torch.cat(losses)


def describe_nonfinite(decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]) -> str:
    """Says where a batch of windows stops being finite: the first such layer, or the tail."""
    advice = "try --dtype float32 or bfloat16, and check the checkpoint"
    for layer, hidden_states, output in layer_steps(decoder, input_ids, modes):
        if layer == 0 and not hidden_states.isfinite().all():
            return f"NaN or infinity in the embedding's output; {advice}"
        if not output.isfinite().all():
            return f"NaN or infinity in the output of layer {layer}; {advice}"
    return f"NaN or infinity in the loss, with finite outputs of all {len(modes)} layers; {advice}"


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
        self.hidden_states = hidden_states
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
            if self.hidden_states is None:
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


Tick = Callable[[], object]  # to be called after every layer


def map_windows(
    decoder: Decoder,
    count: int,
    batcher: Batcher,
    function: Callable[[slice, Tick], torch.Tensor],
    bytes_per_window: int,
    progress: Progress | None = None,
) -> torch.Tensor:
    """The results of `function` over windows 0..count-1, one row a window, in their order; on the CPU.

    Each process does its share. `function` gets as many windows at once as it should walk up the layers together: a
    batch, or, where layers come and go, all for whose hidden states (`bytes_per_window`) there is memory, so that every
    layer comes once; it has to work in batches itself.
    """
    share = batcher.share(count)
    together = batcher
    if decoder.is_offloaded:
        fitting = int(free_host_memory() * _HOST_SHARE / bytes_per_window)
        together = Batcher(max(1, fitting // batcher.size) * batcher.size)
    found = share if share.start < share.stop else slice(0, 1)  # of no windows the shape of the result is known too

    def of_rows(rows: slice) -> torch.Tensor:
        with _ticking(progress, rows.stop - rows.start, decoder.num_layers) as tick:
            return function(slice(found.start + rows.start, found.start + rows.stop), tick)

    result = together.map(of_rows, found.stop - found.start)
    return batcher.ranks.gather(result[: share.stop - share.start])


@contextmanager
def _ticking(progress: Progress | None, windows: int, layers: int) -> Iterator[Tick]:
    """A function that moves `progress` on by one layer of some windows; after the block all are done, or none."""
    told = 0.0

    def tick() -> None:
        nonlocal told
        if progress and told < windows:
            told += windows / layers
            progress(windows / layers)

    try:
        yield tick
    except BaseException:
        windows = 0  # the same windows are tried again
        raise
    finally:
        if progress:
            progress(windows - told)


def waiting_bytes(decoder: Decoder, seqlen: int, streams: int) -> int:
    """Memory of the hidden states of one window, for so many walks at once and one batch's copy."""
    return seqlen * decoder.config.hidden_size * next(decoder.model.parameters()).element_size() * (streams + 1)


def plan_window_losses(
    decoder: Decoder, plan: Plan, batcher: Batcher, progress: Progress | None = None
) -> WindowLosses:
    """The loss function of the model under a plan: ids (N, T) -> mean cross-entropy (N,) of the last `scored` tokens.

    Raises `RunError` naming the first layer whose output is not finite, should a loss not be.
    """

    def window_losses(windows: torch.Tensor, scored: int) -> torch.Tensor:
        def losses_of(rows: slice, tick: Tick) -> torch.Tensor:
            states = Activations(decoder, windows[rows], batcher)
            for mode in plan.modes:
                states.step(mode)
                tick()
            losses = states.losses(scored)
            check_finite(decoder, losses, windows[rows], plan.modes)
            return losses

        size = waiting_bytes(decoder, windows.shape[1], 1)
        return map_windows(decoder, len(windows), batcher, losses_of, size, progress)

    return window_losses


def check_finite(
    decoder: Decoder, found: torch.Tensor, windows: torch.Tensor, modes: Sequence[Mode], what: str = ""
) -> None:
    """Raises `RunError` that says `what` stops being finite where, unless all of `found` (N, ...) of windows is."""
    is_finite = found.isfinite().flatten(1).all(dim=1) if found.dim() > 1 else found.isfinite()
    if not is_finite.all():
        first = int((~is_finite).nonzero()[0])
        raise RunError(what + describe_nonfinite(decoder, windows[first : first + 1], modes))


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
