"""Losses from the last layer's hidden states, computed by the model's own tail."""

import torch

from lib.models.decoder import Decoder


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats: logits (..., V) of any dtype, labels (...) -> fp32 (...)."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


_LOGITS_AT_ONCE = 2**27  # fp32 elements, 512 MiB
_LOGITS_AT_ONCE_ON_CPU, _TOKENS_AT_LEAST = 2**21, 256  # larger pieces overflow the CPU's caches


@torch.no_grad()
def tail_losses(
    decoder: Decoder, hidden_states: torch.Tensor, input_ids: torch.Tensor, scored: int | None = None
) -> torch.Tensor:
    """Mean cross-entropy in nats of each window's last `scored` tokens: (B, T, D) and ids (B, T) -> fp32 (B,).

    `None` scores all T-1 predicted tokens. The tail runs on pieces of at most 512 MiB of fp32 logits, whatever B, T and
    the vocabulary size.
    """
    labels = input_ids[:, 1:].to(hidden_states.device)
    scored = scored or labels.shape[1]
    labels, hidden_states = labels[:, -scored:], hidden_states[:, :-1][:, -scored:]
    vocabulary = decoder.config.vocab_size
    at_once = max(1, _LOGITS_AT_ONCE // vocabulary)  # tokens
    if hidden_states.device.type == "cpu":
        at_once = min(at_once, max(_TOKENS_AT_LEAST, _LOGITS_AT_ONCE_ON_CPU // vocabulary))
    rows = max(1, at_once // labels.shape[1])  # whole windows per piece, or one piece of a window
    piece = min(at_once, labels.shape[1])
    losses = []
    for row_states, row_labels in zip(hidden_states.split(rows), labels.split(rows), strict=True):
        pieces = []
        for states, piece_labels in zip(row_states.split(piece, dim=1), row_labels.split(piece, dim=1), strict=True):
            logits = decoder.logits(states)
            pieces.append(token_losses(logits, piece_labels.to(logits.device)))
        losses.append(torch.cat(pieces, dim=1).mean(dim=1))
    return torch.cat(losses)
