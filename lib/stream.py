"""The calibration engine: feeds hidden states through the decoder layers, layer by layer, and takes their losses."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from lib.errors import RunError
from lib.evaluate import WindowLosses, token_losses
from lib.model import Decoder, Mode, Plan

_LOGITS_AT_ONCE = 2**27  # elements of fp32 logits, 512 MiB
_TOKENS_AT_ONCE_ON_CPU = 256  # more do not fit its caches


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
def tail_losses(decoder: Decoder, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each window, in fp32: (B, T, D) and ids (B, T) -> (B,), over the T-1 predicted tokens.

    The tail runs on pieces of at most 512 MiB of fp32 logits, whatever B, T and the vocabulary are.
    """
    labels = input_ids[:, 1:].to(hidden_states.device)
    at_once = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)  # tokens
    if hidden_states.device.type == "cpu":
        at_once = min(at_once, _TOKENS_AT_ONCE_ON_CPU)
    rows = max(1, at_once // labels.shape[1])  # whole windows in a piece, or a piece of one window
    piece = min(at_once, labels.shape[1])
    losses = []
    for row_states, row_labels in zip(hidden_states[:, :-1].split(rows), labels.split(rows), strict=True):
        pieces = []
        for states, piece_labels in zip(row_states.split(piece, dim=1), row_labels.split(piece, dim=1), strict=True):
            logits = decoder.logits(states)
            pieces.append(token_losses(logits, piece_labels.to(logits.device)))
        losses.append(torch.cat(pieces, dim=1).mean(dim=1))
    return torch.cat(losses)


def plan_window_losses(decoder: Decoder, plan: Plan) -> WindowLosses:
    """The loss function of the model under a plan: ids (B, T) -> mean cross-entropy (B,).

    Raises `RunError` naming the first layer whose output is not finite, should a loss not be.
    """

    def window_losses(input_ids: torch.Tensor) -> torch.Tensor:
        losses = tail_losses(decoder, final_hidden_states(decoder, input_ids, plan.modes), input_ids)
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
