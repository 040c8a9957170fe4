"""Samples: continuations are those of stock transformers and of an obvious loop; what is told of them is counted."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import alp_prune
import ppllms
from lib.config.plan import Plan
from lib.config.prompts import read_prompts
from lib.config.sources import ModelSource
from lib.evaluation import samples
from lib.evaluation.samples import NEW_TOKENS, QUESTIONS, Continuation, Prompt, as_field, make_prompts, markdown
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from tests.command import run
from tests.families import FAMILIES, tiny_model, tiny_windows
from tests.runs.interruption import files_of

pytestmark = pytest.mark.samples

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))  # layer 0 without attention, 1 without FFN, 2 gone
PROMPTS = [Prompt("", False, row[:length].tolist()) for row, length in zip(tiny_windows(3), (3, 16, 9), strict=True)]
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


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


# Prompts --------------------------------------------------------------------------------------------------------------


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


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("The layer\n\nNothing changed. The\n")
    return path


def result_in(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def test_a_run_shows_what_each_model_writes(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--compensate", "all", "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    found, printed = result_in(tmp_path / "run"), capsys.readouterr().out
    shown = (tmp_path / "run/samples.md").read_text()
    assert shown == markdown(found["samples"]) and len(found["samples"]["prompts"]) == 5
    stages = ["dense", "pruned", "compensated"]
    assert list(found["samples"]["continuations"]) == stages
    assert re.findall(r"^  (\w+): \d of 5 end by themselves, repeated 4-grams [\d.]+%$", printed, re.M) == stages
    assert f"samples {tmp_path / 'run/samples.md'}" in printed and found["seconds"]["samples"] > 0


@torch.no_grad()
def test_the_saved_model_writes_what_was_shown(
    arguments, alp_arguments, demo_tokenizer, prompts, tmp_path, monkeypatch
):
    save = ["--save_model", tmp_path / "out", "--prompts", prompts, "--overwrite"]
    sparse = [*alp_arguments, "--prune_method", "wanda", "--wbits", 4]
    for script, flags, stage in ((ppllms, arguments, "pruned"), (alp_prune, sparse, "quantized")):
        assert run(*flags, *save, script=script, monkeypatch=monkeypatch) == 0
        found = result_in(tmp_path / "run")["samples"]
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        for prompt, one in zip(read_prompts(prompts), found["continuations"][stage], strict=True):
            ids = demo_tokenizer(prompt, return_tensors="pt")["input_ids"]
            expected = saved.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)[0]
            text = demo_tokenizer.decode(expected.tolist())
            assert text.removesuffix("<|endoftext|>") == prompt + one["text"]
        assert found["continuations"]["dense"] != found["continuations"][stage]


def test_there_are_no_samples_without_text_but_of_given_prompts(arguments, prompts, tmp_path, monkeypatch):
    flags = [*arguments, "--overwrite"]
    for more, count in ([[], 5], [["--eval_ppl", "no"], 0], [["--eval_ppl", "no", "--prompts", prompts], 2]):
        assert run(*flags, *more, monkeypatch=monkeypatch) == 0
        found = result_in(tmp_path / "run").get("samples", {"prompts": []})
        assert len(found["prompts"]) == count
        assert (tmp_path / "run/samples.md").exists() == bool(count)  # an earlier one is not left


def test_a_table_has_no_samples(arguments, tmp_path, monkeypatch):
    assert run(*arguments, "--seed", 0, 1, monkeypatch=monkeypatch) == 0
    lines = (tmp_path / "run/results.jsonl").read_text().splitlines()
    assert all("samples" not in json.loads(line)["result"] for line in lines)
    assert not (tmp_path / "run/samples.md").exists() and "Samples" not in (tmp_path / "run/log.txt").read_text()


def test_with_layers_on_disk_there_are_none_and_it_is_told_once(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--offload", "disk", monkeypatch=monkeypatch) == 0
    told = re.findall("^Samples .*", capsys.readouterr().out, re.M)
    assert told == ["Samples     none: every new token would read all layers from disk"]
    assert "samples" not in result_in(tmp_path / "run")


def test_a_model_that_cannot_write_ends_no_run(arguments, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise TypeError("forward() got an unexpected\nkeyword")

    monkeypatch.setattr(samples, "greedy", fail)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    told = re.findall("^Samples .*", capsys.readouterr().out, re.M)
    assert told == [
        f"Samples     none of the {stage} model: forward() got an unexpected" for stage in ("dense", "pruned")
    ]
    assert "samples" not in result_in(tmp_path / "run") and not (tmp_path / "run/samples.md").exists()


@pytest.mark.parametrize(
    "error, words", [(torch.OutOfMemoryError("x"), "out of memory"), (KeyboardInterrupt(), "stopped")]
)
def test_too_little_memory_and_ctrl_c_end_it_as_elsewhere(arguments, tmp_path, monkeypatch, capsys, error, words):
    def fail(*args):
        raise error

    with monkeypatch.context() as patches:
        patches.setattr(samples, "greedy", fail)
        assert run(*arguments, monkeypatch=patches) in (1, 130)
    told = capsys.readouterr().err
    assert words in told and "what is finished is kept" in told and told.count("\n") == 1
    assert run(*arguments, "--resume", monkeypatch=monkeypatch) == 0 and "samples" in result_in(tmp_path / "run")


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


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no such file; give a text file with one prompt a line"),
        (b"", "holds no prompt"),
        (b" \n\n\t\n", "holds no prompt"),
        ("caf\u00e9".encode("latin-1"), "is not UTF-8; convert it"),
        ("one\ntwo".encode("utf-16"), "is not UTF-8; convert it"),
        ("one\ntwo".encode("utf-16-le"), "holds NUL characters"),
        (b"x\n" * 101, "holds 101 prompts; give at most 100"),
        (b"x" * 2**20 + b"x", "cannot be read"),
        ("folder", "cannot be read"),
        (b"one\n" + b"layer " * 400, "'layer layer layer"),
    ],
)
@pytest.mark.parametrize("script", [ppllms, alp_prune], ids=lambda script: script.__name__)
def test_a_file_without_prompts_is_refused_in_a_line(
    arguments, alp_arguments, tmp_path, monkeypatch, capsys, script, content, words
):
    path = tmp_path / "prompts.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    before, flags = files_of(tmp_path), arguments if script is ppllms else alp_arguments
    assert run(*flags, "--prompts", path, script=script, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert f"--prompts {path}: " in told and words in told and told.count("\n") == 1
    assert files_of(tmp_path) == before


def test_prompts_are_refused_where_they_have_no_meaning(arguments, prompts, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--prompts", prompts, "--seed", 0, 1, monkeypatch=monkeypatch) == 2
    assert "--prompts: are of a single run" in capsys.readouterr().err
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    own = [*arguments, "--overwrite", "--prompts", tmp_path / "run/samples.md"]
    assert run(*own, monkeypatch=monkeypatch) == 2
    assert "is one of the output folder's own files; name a copy" in capsys.readouterr().err
