"""Samples: what the models of a run write, as greedy continuations of the same prompts.

Perplexity hides damage that anybody sees in text, such as loops and wrong answers.
"""

import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lib.config.plan import Plan
from lib.config.prompts import read_prompts
from lib.data.sampling import tokenize
from lib.errors import InputError, RunError, first_line, is_out_of_memory, one_line, printable
from lib.models.decoder import Decoder
from lib.models.limits import check_tokens
from lib.runtime.batching import Batcher, Progress

NEW_TOKENS = 40
QUESTIONS = (
    "What is the capital of France?",
    "What is 17 + 25?",
    "Explain in one sentence why the sky is blue.",
)
_DEFAULT_PROMPTS, _TEXT_TOKENS = 5, 32
_GRAM = 4  # tokens
_WIDTH = 100  # characters of a line in Markdown


class Prompt(NamedTuple):
    """A prompt as a person reads it, whether the model gets it in its chat template, and the tokens that it gets."""

    text: str
    is_chat: bool
    tokens: list[int]


class Continuation(NamedTuple):
    """What a model writes after a prompt: as text, as tokens, and whether it ended by itself."""

    text: str
    tokens: list[int]  # without the one that ends it
    is_ended: bool


# Prompts --------------------------------------------------------------------------------------------------------------


def make_prompts(
    name: str, file: Path | None, tokenizer, windows: Collection[torch.Tensor], config: Any
) -> list[Prompt]:
    """The prompts of a file, or else questions and beginnings of evaluation windows, of each text (N, T).

    Questions and the prompts of a file go through the tokenizer's chat template; without one no questions are asked.
    None without a file and text. Raises `InputError` for a prompt that the model `name` of this config cannot take.
    """
    context = getattr(config, "max_position_embeddings", None) or 2**31
    room = context - NEW_TOKENS

    def fits(prompt: Prompt) -> bool:
        return 0 < len(prompt.tokens) <= room and max(prompt.tokens) < config.vocab_size

    if file:
        given = [_chat(text, tokenizer) or _plain(text, tokenizer) for text in read_prompts(file)]
        for prompt in given:
            if not 0 < len(prompt.tokens) <= room:
                size = f"{len(prompt.tokens)} tokens, and {NEW_TOKENS} new ones follow"
                cause = f"--prompts {file}: {one_line(prompt.text)[:60]!r} has {size}"
                raise InputError(f"{cause}; {name} has a context of {context}")
            check_tokens(name, torch.tensor(prompt.tokens), config.vocab_size)
        return given
    if not windows:
        return []
    questions = [asked for text in QUESTIONS if (asked := _chat(text, tokenizer)) and fits(asked)]
    count, length = _DEFAULT_PROMPTS - len(questions), min(_TEXT_TOKENS, room // 2)
    try:
        texts = _beginnings(torch.cat(list(windows)), tokenizer, count, length)
    except Exception as error:  # tokenizers come with models too
        if is_out_of_memory(error):
            raise
        texts = []
    return [*filter(fits, texts), *questions]


def _plain(text: str, tokenizer) -> Prompt:
    return Prompt(text, False, tokenize(text, tokenizer).tolist())


def _chat(text: str, tokenizer) -> Prompt | None:
    """A user's message in the chat template, up to where the answer begins; None if no template takes it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        messages = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return Prompt(text, True, list(tokenizer(rendered, add_special_tokens=False)["input_ids"]))
    except Exception as error:  # templates come with models, and raise what they like
        if is_out_of_memory(error):
            raise
        return None


def _beginnings(windows: torch.Tensor, tokenizer, count: int, length: int) -> list[Prompt]:
    """The first `length` tokens of up to `count` windows (N, T), evenly spread; whole words, where spaces part them."""
    found = []
    for index in dict.fromkeys(place * len(windows) // count for place in range(count)):
        start = _decode(windows[index, :length].tolist(), tokenizer, skip_special_tokens=True)
        text = start.strip("\ufffd")  # characters that were cut
        words = re.search(r"\s(\S.*)\s", text, re.DOTALL)
        text = (words[1] if words and 2 * len(words[1]) > len(text) else text).strip()
        found += [_plain(text, tokenizer)] if text else []
    return found


def _decode(tokens: Sequence[int], tokenizer, skip_special_tokens: bool = False) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


# Continuations --------------------------------------------------------------------------------------------------------


def write(
    decoder: Decoder, plan: Plan, prompts: Sequence[Prompt], tokenizer, at_once: int, progress: Progress | None = None
) -> list[Continuation] | str:
    """What the model under a plan writes after each prompt, in batches of about `at_once` tokens; or why it cannot."""
    try:
        return continuations(decoder, plan, prompts, tokenizer, at_once, progress)
    except Exception as error:  # the code of a model or tokenizer can raise anything
        if is_out_of_memory(error):
            raise
        return first_line(error)


def continuations(
    decoder: Decoder, plan: Plan, prompts: Sequence[Prompt], tokenizer, at_once: int, progress: Progress | None = None
) -> list[Continuation]:
    """What the model under a plan writes after each prompt. Raises `RunError` for logits that are no numbers."""
    ends = end_tokens(decoder.model, tokenizer)
    longest = max(len(prompt.tokens) for prompt in prompts) + NEW_TOKENS

    def follow(rows: slice) -> torch.Tensor:
        return greedy(decoder, plan, [prompt.tokens for prompt in prompts[rows]], ends)

    written = Batcher(max(1, at_once // longest)).map(follow, len(prompts), progress).tolist()
    return [_continuation(*one, ends, tokenizer) for one in zip(prompts, written, strict=True)]


def end_tokens(model: Any, tokenizer) -> list[int]:
    """The tokens that end a text, as `generate` has them; there may be several, or none."""
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    given = tokenizer.eos_token_id if given is None else given
    return [token for token in (given if isinstance(given, list) else [given]) if token is not None]


@torch.no_grad()
def greedy(decoder: Decoder, plan: Plan, prompts: Sequence[Sequence[int]], ends: Sequence[int]) -> torch.Tensor:
    """The likeliest next tokens (B, NEW_TOKENS) after each prompt; what follows a token of `ends` has no meaning.

    Each token takes a pass over all tokens before it, layer by layer as in a search. So it needs no key-value cache,
    whose slots depend on the layers that have an attention. Padding is on the right, where no earlier token sees it.
    """
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.zeros(len(prompts), int(lengths.max()) + NEW_TOKENS, dtype=torch.long)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    rows = torch.arange(len(prompts))  # those that have not ended
    for step in range(NEW_TOKENS):
        last = lengths[rows] + step - 1
        hidden_states, inputs = decoder.embed(input_ids[rows, : int(last.max()) + 1])
        for index, mode in enumerate(plan.modes):
            hidden_states = decoder.run_layer(index, hidden_states, inputs, mode)
        logits = decoder.logits(hidden_states[range(len(rows)), last][:, None])[:, 0]  # (B, V)
        if logits.isnan().any():
            raise RunError("its logits are no numbers")
        tokens = logits.argmax(-1).cpu()
        input_ids[rows, last + 1] = tokens
        rows = rows[~torch.isin(tokens, torch.tensor(ends, dtype=torch.long))]
        if not len(rows):
            break
    return torch.stack([row[length : length + NEW_TOKENS] for row, length in zip(input_ids, lengths, strict=True)])


def _continuation(prompt: Prompt, tokens: list[int], ends: Sequence[int], tokenizer) -> Continuation:
    end = next((place for place, token in enumerate(tokens) if token in ends), None)
    tokens = tokens[:end]
    start, whole = (_decode(one, tokenizer) for one in (prompt.tokens, [*prompt.tokens, *tokens]))
    # Decoded alone, a continuation would lose its first space with some tokenizers.
    text = whole[len(start) :] if whole.startswith(start) else _decode(tokens, tokenizer)
    return Continuation(text, tokens, end is not None)


# What is told of them -------------------------------------------------------------------------------------------------


def repetition(written: Sequence[Continuation]) -> float | None:
    """The share of 4-grams of tokens that occurred before in the same continuation; None without any 4-gram."""
    total = repeated = 0
    for one in written:
        grams = [tuple(one.tokens[place : place + _GRAM]) for place in range(len(one.tokens) - _GRAM + 1)]
        total, repeated = total + len(grams), repeated + len(grams) - len(set(grams))
    return repeated / total if total else None


def as_field(prompts: Sequence[Prompt], written: Mapping[str, Sequence[Continuation]]) -> dict:
    """The `samples` of result.json, for {stage: continuations of the prompts}."""
    return {
        "prompts": [{"text": prompt.text, "chat": prompt.is_chat} for prompt in prompts],
        "continuations": {
            stage: [{"text": one.text, "tokens": len(one.tokens), "ended": one.is_ended} for one in found]
            for stage, found in written.items()
        },
        "ended": {stage: sum(one.is_ended for one in found) for stage, found in written.items()},
        "repetition": {stage: repetition(found) for stage, found in written.items()},
    }


def describe(written: Mapping[str, Sequence[Continuation]]) -> list[str]:
    """Console lines: the counts of each model, for {stage: continuations}."""
    title = ["", f"Samples: continuations of up to {NEW_TOKENS} tokens"] if written else []
    counts = {stage: f"{sum(one.is_ended for one in found)} of {len(found)}" for stage, found in written.items()}
    return title + [
        f"  {stage}: {counts[stage]} end by themselves, repeated 4-grams {_percent(repetition(found))}"
        for stage, found in written.items()
    ]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def markdown(samples: Mapping[str, Any], heading: str = "#") -> str:
    """samples.md for the `samples` of result.json: counts of all models, then a section for each prompt.

    `heading` is the mark of the first heading; those of the sections have one more.
    """
    stages, count = samples["continuations"], len(samples["prompts"])
    parts = [
        f"{heading} Samples",
        f"The likeliest continuation of each prompt by each model, up to {NEW_TOKENS} tokens. Long lines are wrapped.",
        "\n".join(
            [
                "| model | ended by itself | repeated 4-grams |",
                "|---|---|---|",
                *(
                    f"| {stage} | {samples['ended'][stage]} of {count} | {_percent(samples['repetition'][stage])} |"
                    for stage in stages
                ),
            ]
        ),
    ]
    for number, prompt in enumerate(samples["prompts"]):
        how = ", in the chat template" if prompt["chat"] else ""
        parts += [f"{heading}# Prompt {number + 1}{how}", _fenced(prompt["text"])]
        for stage, written in stages.items():
            one = written[number]
            end = (
                f"ended by itself after {one['tokens']} tokens" if one["ended"] else f"cut after {one['tokens']} tokens"
            )
            parts += [f"**{stage}**, {end}", _fenced(one["text"])]
    return "\n\n".join(parts) + "\n"


def _fenced(text: str) -> str:
    """A text as a block of code, whatever it holds; lines are wrapped, since such blocks are not."""
    lines = [textwrap.fill(line, _WIDTH, replace_whitespace=False) for line in printable(text).split("\n")]
    fence = "`" * max([3, *(len(ticks) + 1 for ticks in re.findall("`+", text))])
    return "\n".join([f"{fence}text", *lines, fence])
