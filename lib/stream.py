"""The calibration engine: feeds hidden states through the decoder layers, layer by layer, and takes their losses."""

from collections.abc import Iterator, Sequence

import torch

from lib.errors import RunError
from lib.evaluate import WindowLosses, token_losses
from lib.model import Decoder, Mode, Plan

_LOGITS_AT_ONCE = 2**25  # elements of fp32 logits, 128 MiB


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
    hidden_states, inputs = decoder.embed(input_ids)
    for layer, mode in enumerate(modes):
        hidden_states = decoder.run_layer(layer, hidden_states, inputs, mode)
    return hidden_states


@torch.no_grad()
def tail_losses(decoder: Decoder, hidden_states: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each window, in fp32: (B, T, D) and ids (B, T) -> (B,), over the T-1 predicted tokens.

    The tail runs on pieces of at most 128 MiB of fp32 logits, whatever B, T and the vocabulary are.
    """
    rows, tokens, width = hidden_states.shape
    labels = input_ids[:, 1:].to(hidden_states.device)
    piece = min(tokens, max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size))
    flat_states = hidden_states[:, :-1].reshape(-1, width).split(piece)
    flat_labels = labels.reshape(-1).split(piece)
    losses = []
    for piece_states, piece_labels in zip(flat_states, flat_labels, strict=True):
        logits = decoder.logits(piece_states[None])[0]
        losses.append(token_losses(logits, piece_labels.to(logits.device)))
    return torch.cat(losses).view(rows, tokens - 1).mean(dim=1)


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
