"""Hidden states to losses, by the model's own tail."""

import torch

from lib.models.decoder import Decoder


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats: logits (..., V) of any dtype, labels (...) -> fp32 (...)."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


_LOGITS_AT_ONCE = 2**27  # elements of fp32 logits, 512 MiB
_LOGITS_AT_ONCE_ON_CPU, _TOKENS_AT_LEAST = 2**21, 256  # more of a large vocabulary do not fit its caches


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
