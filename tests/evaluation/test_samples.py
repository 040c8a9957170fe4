"""Samples: continuations are those of stock transformers and of an obvious loop; what is told of them is counted."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.evaluation import samples
from lib.evaluation.samples import NEW_TOKENS, Continuation, Prompt, as_field, markdown
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from tests.families import FAMILIES, tiny_model, tiny_windows

pytestmark = pytest.mark.samples

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))  # layer 0 without attention, 1 without FFN, 2 gone
PROMPTS = [Prompt("", False, row[:length].tolist()) for row, length in zip(tiny_windows(3), (3, 16, 9), strict=True)]


class Letters:
    """A tokenizer whose tokens are characters."""

    eos_token_id, chat_template = None, None

    def __call__(self, text, **options):
        return {"input_ids": list(map(ord, text))}

    def decode(self, tokens, **options):
        return "".join(map(chr, tokens))


def tokens_of(decoder: Decoder, plan: Plan, at_once: int = 1000) -> list[list[int]]:
    return [one.tokens for one in samples.continuations(decoder, plan, PROMPTS, Letters(), at_once)]


def without_end(model) -> torch.nn.Module:
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def by_an_obvious_loop(model, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(samples.NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


# Continuations --------------------------------------------------------------------------------------------------------


@pytest.fixture
def is_short(monkeypatch):
    """Twelve new tokens, more than any sliding window of the families."""
    monkeypatch.setattr(samples, "NEW_TOKENS", 12)


@pytest.mark.usefixtures("is_short")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_continuation_is_that_of_an_obvious_loop(family):
    decoder = Decoder(without_end(tiny_model(family)))
    for plan in (MIXED, Plan(4)):
        found = tokens_of(decoder, plan)
        decoder.apply(plan)
        assert found == [by_an_obvious_loop(decoder.model, prompt.tokens) for prompt in PROMPTS]


@pytest.mark.usefixtures("is_short")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_models_continuation_is_that_of_the_saved_model_in_transformers(family, tmp_path):
    decoder = Decoder(without_end(tiny_model(family)))
    found = tokens_of(decoder, MIXED)
    save_pruned(decoder, MIXED, None, tmp_path / "out")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    for tokens, prompt in zip(found, PROMPTS, strict=True):
        ids = torch.tensor([prompt.tokens])
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": samples.NEW_TOKENS}
        expected = saved.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert tokens == expected[0, ids.shape[1] :].tolist()


def test_continuations_do_not_depend_on_the_batch_nor_on_where_layers_wait(tmp_path):
    tiny_model("Qwen2").save_pretrained(tmp_path)
    resident, elsewhere = (Decoder(load_model(ModelSource(str(tmp_path), offload=mode))) for mode in ("none", "cpu"))
    assert elsewhere.is_offloaded
    assert tokens_of(resident, MIXED, 1) == tokens_of(resident, MIXED) == tokens_of(elsewhere, MIXED)


@pytest.mark.parametrize("are_several", [False, True])
def test_a_continuation_ends_at_the_first_of_the_models_end_tokens(are_several):
    decoder = Decoder(without_end(tiny_model("Llama")))
    endless = tokens_of(decoder, Plan(4))
    first, other = endless[0][5], endless[1][7]
    ends = {first, other} if are_several else {first}
    decoder.model.generation_config.eos_token_id = sorted(ends) if are_several else first
    found = samples.continuations(decoder, Plan(4), PROMPTS, Letters(), 1000)
    for one, whole in zip(found, endless, strict=True):
        places = [place for place, token in enumerate(whole) if token in ends]
        assert one.tokens == whole[: min(places, default=None)] and one.is_ended == bool(places)
        assert one.text == "".join(map(chr, one.tokens))
    assert any(one.is_ended for one in found)


def test_without_end_tokens_of_the_model_those_of_the_tokenizer_count(demo_tokenizer):
    model = without_end(tiny_model("Llama"))
    assert samples.end_tokens(model, demo_tokenizer) == [demo_tokenizer.eos_token_id]
    assert samples.end_tokens(model, Letters()) == []


def test_logits_that_are_no_numbers_are_told_and_no_text_is_made_of_them():
    model = tiny_model("Llama")
    model.lm_head.weight.fill_(float("nan"))
    assert samples.write(Decoder(model), Plan(4), PROMPTS, Letters(), 1000) == "its logits are no numbers"


def test_the_first_space_of_a_continuation_stays():
    class Stripping(Letters):
        def decode(self, tokens, **options):
            return super().decode(tokens).lstrip()

    decoder = Decoder(without_end(tiny_model("Llama")))
    prompt = Prompt("", False, [ord("A"), ord("B")])
    (found,) = samples.continuations(decoder, Plan(4), [prompt], Stripping(), 1000)
    assert found.text == "".join(map(chr, found.tokens))


# What is told of them -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([[1, 2, 3, 4, 1, 2, 3, 4]], 1 / 5),  # 1234 2341 3412 4123 1234
        ([[7] * 10], 6 / 7),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 0.0),  # repeats within a continuation count, not between two
        ([[7] * 10, [1, 2, 3, 4]], 6 / 8),
        ([[1, 2, 3], []], None),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_were_there_before(tokens, expected):
    found = samples.repetition([Continuation("", one, False) for one in tokens])
    assert found == (None if expected is None else pytest.approx(expected))


def shown_in(text: str) -> tuple[list[str], list[str]]:
    """The blocks of code in Markdown, and the lines outside of them, by the rules of CommonMark."""
    blocks, outside, fence = [], [], None
    for line in text.split("\n"):
        ticks = re.match(r"`{3,}", line)
        if fence is None and ticks:
            fence, block = ticks[0], []
        elif fence is not None and ticks and len(ticks[0]) >= len(fence) and not line.strip("`"):
            blocks.append("\n".join(block))
            fence = None
        else:
            (outside if fence is None else block).append(line)
    assert fence is None, "a block is not closed"
    return blocks, outside


@pytest.mark.parametrize(
    "text",
    ["# no heading", "```\ncode\n```\n`````", "<b>&amp; *x* | y", "a\x1b[31mb\u202e\r", "  two\n\n\n lines ", "", "`"],
)
def test_markdown_shows_any_text_as_it_is(text):
    prompts = [Prompt("one", False, [1]), Prompt(text, True, [1])]
    written = [Continuation("two", [1, 2, 3, 4], True), Continuation(text, [5] * NEW_TOKENS, False)]
    blocks, outside = shown_in(markdown(as_field(prompts, {"dense": written, "pruned": written[::-1]})))
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    as_lines = [line.rstrip() for line in shown.split("\n")]
    found = [[line.rstrip() for line in block.split("\n")] for block in blocks]
    assert found == [["one"], ["two"], as_lines, as_lines, as_lines, ["two"]]
    headings = [line for line in outside if line.startswith("#")]
    assert headings == ["# Samples", "## Prompt 1", "## Prompt 2, in the chat template"]
    assert "| dense | 1 of 2 | 94.7% |" in outside  # 36 of 38


def test_memory_that_is_short_makes_the_batches_smaller(monkeypatch):
    decoder, whole, tried = Decoder(without_end(tiny_model("Llama"))), samples.greedy, []
    expected = tokens_of(decoder, MIXED)

    def greedy(decoder, plan, prompts, ends):
        tried.append(len(prompts))
        if len(prompts) > 1:
            raise torch.OutOfMemoryError("x")
        return whole(decoder, plan, prompts, ends)

    monkeypatch.setattr(samples, "greedy", greedy)
    assert tokens_of(decoder, MIXED) == expected and tried == [3, 1, 1, 1]
