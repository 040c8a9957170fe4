"""Losses and distances from the last layer's hidden states, computed by the model's own tail."""

from collections.abc import Callable

import torch

from lib.models.decoder import Decoder


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token in nats: logits (..., V) of any dtype, labels (...) -> fp32 (...)."""
    logarithms = logits.log_softmax(-1, dtype=torch.float32)  # a GPU makes no fp32 copy of the logits for this
    return -logarithms.gather(-1, labels[..., None])[..., 0]


def token_divergences(dense_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || model) of each token in nats: logits (..., V) of any dtype -> fp32 (...), at least 0."""
    dense, other = (some.log_softmax(-1, dtype=torch.float32) for some in (dense_logits, logits))
    shares = dense.exp()
    terms = (dense - other).mul_(shares).masked_fill_(shares == 0, 0)  # what the dense model rules out counts nothing
    return terms.sum(-1).clamp_(min=0)


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

    def losses(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = decoder.logits(states)
        return token_losses(logits, labels.to(logits.device))

    return _by_token(decoder, losses, _scored(hidden_states, input_ids, scored)).mean(dim=1)


@torch.no_grad()
def tail_scores(
    decoder: Decoder,
    hidden_states: torch.Tensor,
    dense_states: torch.Tensor,
    input_ids: torch.Tensor,
    scored: int | None = None,
) -> torch.Tensor:
    """Losses as `tail_losses`, and the distance to the dense model, whose last hidden states are `dense_states`.

    (B, T, D) twice and ids (B, T) -> fp32 (B, 2 + scored): the mean cross-entropy, the share of tokens whose most
    likely next token is the dense model's, and KL(dense || model) of each token. Pieces are as in `tail_losses`.
    """

    def scores(states: torch.Tensor, labels: torch.Tensor, dense_states: torch.Tensor) -> torch.Tensor:
        logits, dense_logits = decoder.logits(states), decoder.logits(dense_states)
        is_same = logits.argmax(-1) == dense_logits.argmax(-1)
        losses, divergences = token_losses(logits, labels.to(logits.device)), token_divergences(dense_logits, logits)
        return torch.stack([losses, is_same.to(losses), divergences], dim=-1)

    parts = _scored(hidden_states, input_ids, scored)
    found = _by_token(decoder, scores, (*parts, _scored(dense_states, input_ids, scored)[0]))
    losses, is_same, divergences = found.unbind(-1)
    return torch.cat([losses.mean(dim=1, keepdim=True), is_same.mean(dim=1, keepdim=True), divergences], dim=1)


def _scored(
    hidden_states: torch.Tensor, input_ids: torch.Tensor, scored: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states (B, scored, D) that predict the last `scored` tokens, and these (B, scored)."""
    labels = input_ids[:, 1:].to(hidden_states.device)
    scored = scored or labels.shape[1]
    return hidden_states[:, :-1][:, -scored:], labels[:, -scored:]


def _by_token(
    decoder: Decoder, function: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """A function of hidden states and labels (B, T, ...), in pieces of a bounded number of logits: (B, T, ...)."""
    first, vocabulary, models = tensors[0], decoder.config.vocab_size, len(tensors) - 1  # but for the labels
    at_once = max(1, _LOGITS_AT_ONCE // (vocabulary * models))  # tokens
    if first.device.type == "cpu":
        at_once = min(at_once, max(_TOKENS_AT_LEAST, _LOGITS_AT_ONCE_ON_CPU // vocabulary))
    tokens = first.shape[1]
    rows, piece = max(1, at_once // tokens), min(at_once, tokens)  # whole windows per piece, or a piece of a window
    found = []
    for of_rows in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        pieces = zip(*(part.split(piece, dim=1) for part in of_rows), strict=True)
        found.append(torch.cat([function(*of_piece) for of_piece in pieces], dim=1))
    return torch.cat(found)
