"""Prompts: questions and beginnings of text, or those of a file, as the model of the tokenizer gets them."""

import pytest
import torch

from lib.config.prompts import read_prompts
from lib.config.sources import ModelSource
from lib.evaluation.samples import QUESTIONS, make_prompts
from tests.families import tiny_model

pytestmark = pytest.mark.samples

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture
def chatting(tiny_folder):
    """The demo's tokenizer with a chat template."""
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelSource(str(tiny_folder)))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def windows(text_file, demo_tokenizer) -> torch.Tensor:
    tokens = demo_tokenizer(text_file.read_text())["input_ids"]
    return torch.tensor(tokens[: len(tokens) // 200 * 200]).view(-1, 200)


@pytest.fixture
def config():
    return tiny_model("Llama", vocab_size=4000, max_position_embeddings=256).config


def test_without_a_chat_template_the_beginnings_of_five_windows_are_continued(
    windows, config, demo_tokenizer, text_file
):
    found = make_prompts("x", None, demo_tokenizer, [windows], config)
    assert len(found) == 5 and not any(prompt.is_chat for prompt in found)
    places = [text_file.read_text().find(prompt.text) for prompt in found]
    assert -1 not in places and all(8 < len(prompt.tokens) <= 40 for prompt in found)
    assert [prompt.tokens for prompt in found] == [demo_tokenizer(prompt.text)["input_ids"] for prompt in found]
    assert all(not prompt.text[0].isspace() and not prompt.text[-1].isspace() for prompt in found)
    assert len(make_prompts("x", None, demo_tokenizer, [windows[:2]], config)) == 2  # as many as there are windows


def test_with_a_chat_template_three_are_questions_in_it(windows, config, chatting):
    found = make_prompts("x", None, chatting, [windows], config)
    assert [prompt.is_chat for prompt in found] == [False, False, True, True, True]
    for prompt, question in zip(found[2:], QUESTIONS, strict=True):
        message = [{"role": "user", "content": question}]
        expected = chatting.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert (prompt.text, prompt.tokens) == (question, expected)
        assert chatting.decode(prompt.tokens).endswith("<assistant>")


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% broken", {"other": TEMPLATE}])
def test_a_chat_template_that_takes_no_question_is_none(windows, config, chatting, template):
    chatting.chat_template = template
    assert [prompt.is_chat for prompt in make_prompts("x", None, chatting, [windows], config)] == [False] * 5


def test_a_files_prompts_are_its_lines_in_the_chat_template_if_there_is_one(config, chatting, demo_tokenizer, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff One  é `two`\r\n\n \t\nThree\u2028four".encode())
    assert read_prompts(path) == ["One  é `two`", "Three\u2028four"]
    plain, chats = (make_prompts("x", path, tokenizer, [], config) for tokenizer in (demo_tokenizer, chatting))
    assert [demo_tokenizer.decode(prompt.tokens) for prompt in plain] == read_prompts(path)
    assert chatting.decode(chats[1].tokens) == "<user>Three\u2028four<assistant>"


def test_a_tokenizer_that_decodes_nothing_leaves_only_questions(windows, config, chatting, monkeypatch):
    monkeypatch.setattr(chatting, "decode", lambda *args, **options: 1 / 0)
    assert [prompt.text for prompt in make_prompts("x", None, chatting, [windows], config)] == list(QUESTIONS)


def test_without_text_and_file_there_are_no_prompts(config, chatting):
    assert make_prompts("x", None, chatting, [], config) == []
