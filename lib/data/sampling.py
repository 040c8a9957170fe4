"""Turns documents into windows of tokens (N, T), with the sampling of the reference code."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from lib.config.mixture import SELF, Mixture
from lib.data.recognition import Corpus
from lib.errors import InputError


def calibration_windows(corpus: Corpus, tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Calibration windows (N, seqlen) for PPLLMs, sampled as in its reference code.

    The first `nsamples` documents of `shuffle(seed)` are joined by spaces and cut into windows; the remainder is
    dropped, so N depends on the documents' length. A corpus of one document gives its first `nsamples` windows. Raises
    `InputError` if there is no full window.
    """
    count = len(corpus.documents)
    if count == 1:
        tokens = tokenize_start(corpus.documents[0] or "", tokenizer, nsamples * seqlen)
        return cut_windows(tokens, seqlen, corpus.name)[:nsamples]
    order = np.random.default_rng(seed).permutation(count)[:nsamples]  # same as datasets.Dataset.shuffle
    text = " ".join(corpus.documents[int(index)] or "" for index in order)
    return cut_windows(tokenize(text, tokenizer), seqlen, corpus.name)


def sampled_windows(corpus: Corpus, tokenizer, nsamples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Calibration windows (nsamples, seqlen) for ALP, sampled as in the Wanda and GPTQ code.

    Each is a random span of a random document. A document of `seqlen` tokens or fewer is replaced by another draw. In a
    corpus of one document, only the start of the span is drawn. Raises `InputError` if no document is long enough.
    """
    draw = random.Random(seed)
    count = len(corpus.documents)
    tokens: dict[int, torch.Tensor | None] = {}  # by document; None if too short
    longest, windows = 0, []
    for _ in range(nsamples):
        while True:
            index = draw.randint(0, count - 1) if count > 1 else 0
            if index not in tokens:
                found = tokenize(corpus.documents[index] or "", tokenizer)
                longest = max(longest, len(found))
                tokens[index] = found if len(found) > seqlen else None
            document = tokens[index]
            if document is not None:
                break
            if len(tokens) == count and not any(found is not None for found in tokens.values()):
                raise InputError(
                    f"dataset {corpus.name}: no document has more than {seqlen} tokens, the longest {longest}; "
                    "give longer text, or smaller windows"
                )
        start = draw.randint(0, len(document) - seqlen - 1)
        windows.append(document[start : start + seqlen])
    return torch.stack(windows)


Draw = Callable[[Corpus, Any, int, int, int], torch.Tensor]  # `calibration_windows` or `sampled_windows`


def draw_parts(
    mixture: Mixture, corpora: Mapping[str, Corpus], tokenizer, nsamples: int, seqlen: int, seed: int, draw: Draw
) -> dict[str, torch.Tensor]:
    """The windows (N, seqlen) of each text of a mixture, drawn for its share of the samples.

    Windows of the model's own text are `unsampled`. Raises `InputError` for text that is too short, or gives no sample.
    """
    return {
        text: unsampled_windows(tokenizer, count, seqlen)
        if text == SELF
        else draw(corpora[text], tokenizer, count, seqlen, seed)
        for text, count in mixture.counts(nsamples).items()
    }


_UNSAMPLED = -1  # a token that the model has yet to make


def unsampled_windows(tokenizer, count: int, seqlen: int) -> torch.Tensor:
    """Windows (count, seqlen) that hold only the token that a text begins with: BOS, or EOS for want of one.

    Raises `InputError` if the tokenizer has neither.
    """
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    first = next((token for token in ends if token is not None), None)
    if first is None:
        raise InputError(f"calibration text {SELF}: the tokenizer has no BOS or EOS that text begins with; name a text")
    windows = torch.full((count, seqlen), _UNSAMPLED)
    windows[:, 0] = first
    return windows


def unsampled(windows: torch.Tensor) -> torch.Tensor:
    """Which of the windows (N, T) the model has yet to make: bool (N,)."""
    return windows[:, -1] == _UNSAMPLED


def evaluation_windows(
    corpus: Corpus, tokenizer, seqlen: int, stride: int | None = None, most: int | None = None
) -> torch.Tensor:
    """Evaluation windows (N, seqlen) of all documents, joined as is customary for the source.

    Windows are adjacent, or start every `stride` tokens of the same text. The remainder is dropped. At most `most` of
    them are taken, evenly spread over the text.
    """
    text = corpus.separator.join(document or "" for document in corpus.documents)
    windows = cut_windows(tokenize(text, tokenizer), seqlen, corpus.name)[: corpus.max_windows]
    if stride:
        windows = windows.flatten().unfold(0, seqlen, stride)
    return windows[evenly_spread(len(windows), most)] if most else windows


def evenly_spread(count: int, most: int) -> torch.Tensor:
    """At most `most` of the places 0..count-1, evenly spread, ascending: (min(count, most),)."""
    wanted = min(count, most)
    return torch.arange(wanted) * count // wanted


def tokenize(text: str, tokenizer) -> torch.Tensor:
    """Token ids (length,) of a text, including special tokens that the tokenizer adds by default.

    Raises `InputError` for a tokenizer that makes so many of a few characters that memory would not hold all.
    """
    for part in (*(text[:length] for length in _TRIED_FIRST if length < len(text)), text):
        tokens = tokenizer(part, verbose=False)["input_ids"]
        if len(tokens) > _ADDED_AT_MOST + _PER_CHARACTER * len(part):
            raise InputError(
                f"the tokenizer makes {len(tokens):,} tokens of {len(part):,} characters, far more than a text has; "
                "give the model its own tokenizer"
            )
    return torch.tensor(tokens, dtype=torch.long)


_TRIED_FIRST = (1, 30, 1000)  # characters
_PER_CHARACTER, _ADDED_AT_MOST = 64, 1000  # tokens


def tokenize_start(text: str, tokenizer, count: int) -> torch.Tensor:
    """At least the first `count` tokens of a text, or all if there are fewer, without tokenizing a long text whole.

    The text is cut at a space. The tokens next to the cut are dropped, because the cut may have changed them.
    """
    length = 8 * (count + _NEAR_THE_CUT)
    while (end := text.find(" ", length)) != -1:
        tokens = tokenize(text[:end], tokenizer)[:-_NEAR_THE_CUT]
        if len(tokens) >= count:
            return tokens
        length *= 2
    return tokenize(text, tokenizer)


_NEAR_THE_CUT = 64  # tokens


def cut_windows(tokens: torch.Tensor, seqlen: int, source: str) -> torch.Tensor:
    """(length,) -> (length // seqlen, seqlen), without the remainder. Raises `InputError` if no window is left."""
    count = len(tokens) // seqlen
    if count == 0:
        raise InputError(
            f"dataset {source}: {len(tokens)} tokens are too few for one window of {seqlen}; "
            "give more text (or more --nsamples), or a smaller --seqlen"
        )
    return tokens[: count * seqlen].view(count, seqlen)
