"""Where a model stops being finite: the first layer whose output has NaN or infinity."""

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


def describe_nonfinite(decoder: Decoder, input_ids: torch.Tensor, modes: Sequence[Mode]) -> str:
    """Says where a batch of windows stops being finite: the first such layer, or the tail."""
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
    """Raises `RunError` that says `what` stops being finite where, unless all of `found` (N, ...) of windows is."""
    is_finite = found.isfinite().flatten(1).all(dim=1) if found.dim() > 1 else found.isfinite()
    if not is_finite.all():
        first = int((~is_finite).nonzero()[0])
        raise RunError(what + describe_nonfinite(decoder, windows[first : first + 1], modes))
