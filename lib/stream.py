"""The calibration engine: feeds hidden states through the decoder layers, layer by layer, and takes their losses."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from lib.batching import Batcher
from lib.errors import InputError, RunError
from lib.evaluate import WindowLosses, token_losses
from lib.model import Decoder, LayerInputs, StopForward
from lib.plan import Mode, Plan

_LOGITS_AT_ONCE = 2**27  # elements of fp32 logits, 512 MiB
_TOKENS_AT_ONCE_ON_CPU = 256  # more do not fit its caches


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
    at_once = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)  # tokens
    if hidden_states.device.type == "cpu":
        at_once = min(at_once, _TOKENS_AT_ONCE_ON_CPU)
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


def plan_window_losses(decoder: Decoder, plan: Plan) -> WindowLosses:
    """The loss function of the model under a plan: ids (B, T) -> mean cross-entropy (B,) of the last `scored` tokens.

    Raises `RunError` naming the first layer whose output is not finite, should a loss not be.
    """

    def window_losses(input_ids: torch.Tensor, scored: int) -> torch.Tensor:
        losses = tail_losses(decoder, final_hidden_states(decoder, input_ids, plan.modes), input_ids, scored)
        if not losses.isfinite().all():
            raise RunError(describe_nonfinite(decoder, input_ids, plan.modes))
        return losses

    return window_losses


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
    """The hidden states (N, T, D) of all calibration windows (N, T) before one decoder layer, moved on layer by layer.

    They stay on the device of the embedding, in the model's dtype. What the model hands to its layers besides (masks,
    positions, rotary tables) is taken once for each number of windows in a batch, since it is the same for all windows;
    raises `InputError` for a model where it is not.
    """

    def __init__(self, decoder: Decoder, windows: torch.Tensor, batcher: Batcher):
        self.decoder, self.windows, self.batcher = decoder, windows, batcher
        self.layer = 0
        self._inputs: dict[int, LayerInputs] = {}
        first, inputs = decoder.embed(windows[:1])
        _check_same(decoder, inputs, decoder.embed(windows[-1:])[1])
        self.hidden_states = first.new_empty(len(windows), *first.shape[1:])
        batcher.map(self._embed, len(windows))

    def _embed(self, rows: slice) -> torch.Tensor:
        self.hidden_states[rows], self._inputs[rows.stop - rows.start] = self.decoder.embed(self.windows[rows])
        return torch.zeros(rows.stop - rows.start)

    def _inputs_of(self, rows: slice) -> LayerInputs:
        count = rows.stop - rows.start
        if count not in self._inputs:
            self._inputs[count] = self.decoder.embed(self.windows[rows])[1]
        return self._inputs[count]

    @torch.no_grad()
    def look(self) -> None:
        """Runs the layer over all windows and drops what comes out; hooks see what they want to see.

        They may leave the layer's forward by `StopForward`. When memory runs out nothing is tried again here, for hooks
        would see the same windows twice: see `Batcher.whole`.
        """
        for start in range(0, len(self.windows), self.batcher.size):
            with suppress(StopForward):
                self._run(slice(start, min(start + self.batcher.size, len(self.windows))))

    @torch.no_grad()
    def advance(self) -> None:
        """Replaces the hidden states by what the layer makes of them. Raises `RunError` when that is not finite."""

        def step(rows: slice) -> torch.Tensor:
            output = self._run(rows)
            is_finite = output.sum(dim=(1, 2), dtype=torch.float32).isfinite()
            if not is_finite.all():  # or the sum is too large
                is_finite = output.isfinite().flatten(1).all(dim=1)
            self.hidden_states[rows] = output  # last: a batch that runs out of memory is tried again
            return is_finite

        is_finite = self.batcher.map(step, len(self.windows))
        if not is_finite.all():
            window = int((~is_finite).nonzero()[0])
            raise RunError(
                f"NaN or infinity in the output of layer {self.layer} on calibration window {window}; "
                "try --dtype float32 or bfloat16, and check the checkpoint"
            )
        self.layer += 1

    def _run(self, rows: slice) -> torch.Tensor:
        return self.decoder.run_layer(self.layer, self.hidden_states[rows], self._inputs_of(rows), Mode())


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
