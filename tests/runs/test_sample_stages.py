"""Samples of a run: each stage of it writes, or is told not to; and prompts that cannot be taken."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import alp_prune
import ppllms
from lib.config.prompts import read_prompts
from lib.evaluation import samples
from lib.evaluation.samples import NEW_TOKENS, markdown
from tests.command import run
from tests.runs.interruption import files_of

pytestmark = pytest.mark.samples


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
