"""Checks of windows against the model, before a run starts."""

import torch
from torch import nn

from lib.errors import InputError

LONGEST_DEFAULT_WINDOW = 2048


def window_length(name: str, config, given: int | None, flag: str = "--seqlen") -> int:
    """Sequence length: as given, else the model's context up to 2048. Raises `InputError` if it does not fit."""
    context = getattr(config, "max_position_embeddings", None) or given or LONGEST_DEFAULT_WINDOW
    seqlen = given or min(LONGEST_DEFAULT_WINDOW, context)
    if seqlen > context:
        raise InputError(f"{flag} {seqlen}: {name} has a context of {context} tokens")
    if seqlen < 2:
        raise InputError(f"{flag} {seqlen}: a window needs 2 tokens, one to predict the other")
    return seqlen


def check_stride(stride: int | None, seqlen: int) -> None:
    """Raises `InputError` if windows would skip tokens between them."""
    if stride is not None and stride > seqlen:
        raise InputError(f"--eval_stride {stride}: is more than the {seqlen} tokens of a window; lower it")


def check_tokens(name: str, windows: torch.Tensor, vocab_size: int) -> None:
    """Raises `InputError` for token ids (N, T) outside the model's vocabulary."""
    if windows.max() >= vocab_size:
        raise InputError(
            f"model {name}: its tokenizer gives token {int(windows.max())}, but the model has only {vocab_size}; "
            "use the tokenizer that belongs to it"
        )


def dtype_name(model: nn.Module) -> str:
    """`float32`, `bfloat16`, ..."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")
