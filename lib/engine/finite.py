"""Finds the first layer whose output has NaN or infinity."""

from collections import deque
from collections.abc import Iterator, Sequence

import torch

from lib.config.plan import Mode
from lib.errors import RunError
from lib.models.decoder import Decoder


@torch.no_grad()
def layer_steps(
    decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Runs token ids (B, T) through the layers. Yields (layer, input, output), the latter two (B, T, D)."""
    hidden_states, inputs = decoder.embed(input_ids)
    for layer, mode in enumerate(modes):
        output = decoder.run_layer(layer, hidden_states, inputs, mode)
        yield layer, hidden_states, output
        hidden_states = output


def final_hidden_states(decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]) -> torch.Tensor:
    """The last layer's output (B, T, D) for token ids (B, T)."""
    _, _, output = deque(layer_steps(decoder, input_ids, modes), maxlen=1).pop()
    return output


def describe_nonfinite(decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]) -> str:
    """Says where NaN or infinity first appears for token ids (B, T): embedding, layer or loss."""
    advice = "try --dtype float32 or bfloat16, and check the checkpoint"
    for layer, hidden_states, output in layer_steps(decoder, input_ids, modes):
        if layer == 0 and not hidden_states.isfinite().all():
            return f"NaN or infinity in the embedding's output; {advice}"
        if not output.isfinite().all():
            return f"NaN or infinity in the output of layer {layer}; {advice}"
    return f"NaN or infinity in the loss, with finite outputs of all {len(modes)} layers; {advice}"


def check_finite(
    decoder: Decoder, found: torch.Tensor, windows: torch.Tensor, modes: Sequence[Mode], what: str = ""
) -> None:
    """Raises `RunError` unless all of `found` (N, ...), the results for windows (N, T), is finite.

    The message begins with `what` and names the first layer whose output is not finite.
    """
    is_finite = found.isfinite().flatten(1).all(dim=1) if found.dim() > 1 else found.isfinite()
    if not is_finite.all():
        first = int((~is_finite).nonzero()[0])
        raise RunError(what + describe_nonfinite(decoder, windows[first : first + 1], modes))
