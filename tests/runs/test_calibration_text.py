"""Runs calibrate on the texts that are asked for: mixed, made by the model itself, chats; and wrong ones are told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import alp_prune
import lib.depth.searches
import lib.runs.own_text
import lib.sensitivity.compute
import lib.sparsity.run
import ppllms
import save_gradient
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows, sampled_windows
from lib.engine.own_text import sample_windows
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from tests.command import run
from tests.runs.interruption import Interruption, files_of

CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.fixture
def rows(tmp_path) -> Path:
    """Forty documents of different text."""
    path = tmp_path / "rows.jsonl"
    texts = [f"Number {i}: " + " ".join(str(i * j % 97) for j in range(60)) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def used(monkeypatch) -> list[torch.Tensor]:
    """What Block Influence, the pruner and the gradients have seen so far, in order, as copies."""
    seen: list[torch.Tensor] = []
    for owner, name, place in (
        (lib.depth.searches, "block_influence", 1),
        (lib.sparsity.run, "prune_layers", 4),
        (lib.sensitivity.compute, "connection_sensitivity", 1),
    ):
        monkeypatch.setattr(owner, name, _looked_at(getattr(owner, name), place, seen))
    return seen


def _looked_at(function: Callable, place: int, seen: list[torch.Tensor]) -> Callable:
    def look(*args):
        seen.append(args[place].clone())
        return function(*args)

    return look


def own_text(folder: Path, count: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    decoder = Decoder(load_model(ModelSource(str(folder))))
    return sample_windows(decoder, torch.zeros(count, dtype=torch.long), seqlen, seed)


def result_in(folder: Path) -> dict:
    return json.loads((folder / "run/result.json").read_text())


def test_depth_pruning_takes_documents_of_each_text_by_its_share(
    arguments, rows, text_file, used, demo_tokenizer, tmp_path, monkeypatch, capsys
):
    mixture = [f"{rows}:3", f"{text_file}:1"]
    flags = ["--seqlen", 32, "--nsamples", 10, "--seed", 2, "--compensate", "nearest"]
    assert run(*arguments, "--dataset", *mixture, *flags, monkeypatch=monkeypatch) == 0
    one, two = (load_corpus(str(path), "train") for path in (rows, text_file))
    parts = [calibration_windows(text, demo_tokenizer, n, 32, 2) for text, n in ((one, 8), (two, 2))]
    assert torch.equal(used[0], torch.cat(parts))
    told, result = capsys.readouterr().out, result_in(tmp_path)
    assert f"{len(parts[0])} of {rows}, 2 of {text_file}, seed 2\n" in told
    assert result["dataset"] == " ".join(mixture) and result["windows"] == len(used[0])
    kept = result["compensation"]
    assert (kept["dataset"], kept["shares"]) == ([str(rows), str(text_file)], [3, 1])
    assert kept["tokens"] + kept["held_out_tokens"] == used[0].numel(), "it is on the same windows"


def test_weight_pruning_and_gradients_take_windows_of_each_text_by_its_share(
    alp_arguments, rows, text_file, used, demo_tokenizer, tmp_path, monkeypatch
):
    flags = ["--calibration_dataset", text_file, rows, "--seqlen", 32, "--nsamples", 5, "--overwrite"]
    one, two = (load_corpus(str(path), "train") for path in (text_file, rows))

    def mixed(counts: tuple[int, int], seqlen: int) -> torch.Tensor:
        parts = zip((one, two), counts, strict=True)
        return torch.cat([sampled_windows(text, demo_tokenizer, count, seqlen, 0) for text, count in parts])

    for _ in range(2):  # gradients are computed, then found
        assert run(*alp_arguments, *flags, monkeypatch=monkeypatch, script=alp_prune) == 0
        assert torch.equal(used.pop(), mixed((3, 2), 32))
    assert len(used) == 1 and torch.equal(used[0], mixed((2, 1), 16))
    assert result_in(tmp_path)["gradients"]["dataset"] == f"{text_file}:1 {rows}:1"
    (path,) = Path("gradients").glob("*.json")
    command = ["--model", alp_arguments[1], "--dataset", text_file, rows, "--ngrad", 3, "--grad_seqlen", 16]
    assert run(*command, "--overwrite", monkeypatch=monkeypatch, script=save_gradient) == 0
    assert [path] == list(Path("gradients").glob("*.json")), "both scripts name the file alike"
    assert torch.equal(used[1], used[0])


def test_a_model_is_pruned_on_text_of_its_own(arguments, tiny_folder, used, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "self", "--seqlen", 16, "--eval_windows", 3, "--overwrite"]
    found = []
    for more in ([], ["--seed", 0, "--batch_size", 1], ["--seed", 1], ["--offload", "cpu"]):
        assert run(*arguments, *flags, *more, monkeypatch=monkeypatch) == 0
        assert torch.equal(used[-1], own_text(tiny_folder, 3, 16, seed=1 if 1 in more[1:2] else 0))
        assert result_in(tmp_path)["dataset"] == "self" and result_in(tmp_path)["windows"] == 3
        found.append(result_in(tmp_path)["perplexity"])
    assert found[0] == found[1] == found[3]
    told = capsys.readouterr().out
    assert 'Text        self (calibration): sampled from the model, begins "' in told
    assert "Calibration self: 3 windows of 16 tokens, seed 1\n" in told


def test_weights_are_pruned_on_text_of_the_models_own(
    alp_arguments, text_file, tiny_folder, used, demo_tokenizer, monkeypatch, capsys
):
    flags = ["--calibration_dataset", f"{text_file}:1", "self:3", "--seqlen", 32, "--overwrite"]
    for _ in range(2):  # gradients are computed, then found
        assert run(*alp_arguments, *flags, monkeypatch=monkeypatch, script=alp_prune) == 0
        (written,) = sampled_windows(load_corpus(str(text_file), "train"), demo_tokenizer, 1, 32, 0)
        assert torch.equal(used.pop(), torch.cat([written[None], own_text(tiny_folder, 3, 32)]))
    assert len(used) == 1 and torch.equal(used[0][1:], own_text(tiny_folder, 2, 16))
    told = capsys.readouterr().out
    assert "self (gradients): sampled" in told and "self (calibration): sampled" in told


def test_a_resumed_run_takes_the_text_that_was_sampled(arguments, used, tmp_path, monkeypatch):
    """Though the model would make another now, as on another device."""
    flags = [*arguments, "--dataset", "self", "--seqlen", 16]
    with monkeypatch.context() as patches:
        steps = Interruption(patches, at=3).steps
        assert run(*flags, monkeypatch=patches) == 130 and steps[0] == "save_sealed"
    monkeypatch.setattr(lib.runs.own_text, "sample_windows", None)
    assert run(*flags, "--resume", monkeypatch=monkeypatch) == 0
    whole = result_in(tmp_path)
    monkeypatch.undo()
    assert run(*flags, "--overwrite", monkeypatch=monkeypatch) == 0
    assert all(result_in(tmp_path)[name] == whole[name] for name in ("bi_scores", "rounds", "perplexity", "key"))


def test_text_that_was_changed_in_the_state_is_refused(arguments, tmp_path, monkeypatch, capsys):
    flags = [*arguments, "--dataset", "self", "--seqlen", 16]
    with monkeypatch.context() as patches:
        Interruption(patches, at=3)
        assert run(*flags, monkeypatch=patches) == 130
    path = tmp_path / "run/state/own_text.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    capsys.readouterr()
    assert run(*flags, "--resume", monkeypatch=monkeypatch) == 2
    assert "own_text.safetensors: broken, so that run cannot go on" in capsys.readouterr().err


def test_a_table_samples_once_for_each_seed(arguments, tmp_path, monkeypatch):
    asked, sample = [], lib.runs.own_text.sample_windows

    def counted(*args):
        asked.append(args[3])
        return sample(*args)

    monkeypatch.setattr(lib.runs.own_text, "sample_windows", counted)
    counts = arguments.index("--mha_remove_layers")
    flags = [*arguments[:counts], *arguments[counts + 4 :], "--dataset", "self", "--seqlen", 16]
    flags += ["--method", "shortgpt", "sleb", "--prune_rate", 0.1, "--seed", 0, 1, "--compensate", "nearest"]
    assert run(*flags, "--nsamples", 20, monkeypatch=monkeypatch) == 0
    lines = [json.loads(line)["result"] for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]
    assert asked == [0, 1] and [line["windows"] for line in lines] == [20] * 4


@pytest.mark.parametrize("script", [ppllms, alp_prune])
def test_chats_are_calibrated_on_in_the_template_of_the_model(
    script, arguments, alp_arguments, tiny_folder, used, demo_tokenizer, tmp_path, monkeypatch, capsys
):
    model, chats, text = tmp_path / "chat model", tmp_path / "chats.jsonl", tmp_path / "rendered.jsonl"
    model.mkdir()
    for name, content in files_of(tiny_folder).items():
        (model / name).write_bytes(content)
    (model / "chat_template.jinja").write_text(CHAT)
    turns = [[("user", f"What is {i} of {i * 7}? " * 6), ("assistant", f"It is {i * i}. " * 9)] for i in range(12)]
    messages = [[{"role": role, "content": content} for role, content in one] for one in turns]
    chats.write_text("".join(json.dumps({"messages": one}) + "\n" for one in messages))
    rendered = ["".join(f"[{role}]{content}" for role, content in one) for one in turns]
    text.write_text("".join(json.dumps({"text": one}) + "\n" for one in rendered))
    flags = arguments if script is ppllms else [*alp_arguments, "--prune_method", "wanda"]
    model_flag, text_flag = ("--model_name", "--dataset") if script is ppllms else ("--model", "--calibration_dataset")
    for source in (chats, text):
        more = [model_flag, model, text_flag, source, "--seqlen", 16, "--overwrite"]
        assert run(*flags, *more, monkeypatch=monkeypatch, script=script) == 0
    assert torch.equal(used[0], used[1])
    assert "chats of `messages`, in the tokenizer's chat template" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--dataset", "demo:0", "self:1"], "--dataset: 0 is no share of a text; give a number above 0"),
        (["--dataset", "demo", "self:-1"], "--dataset: -1 is no share"),
        (["--dataset", "demo:nan", "self:1"], "--dataset: nan is no share"),
        (["--dataset", "demo", "demo"], "--dataset: names a text twice"),
        (["--dataset", "demo:99", "self:1"], "calibration text demo:99 self:1: self gives none of 3 samples"),
        (["--compensate", "all", "--compensate_dataset", "demo:0", "self:1"], "--compensate_dataset: 0 is no share"),
        (["--eval_datasets", "self"], "--eval_datasets self: is text for calibration"),
        (["--eval_datasets", "demo:0.5", "c4:0.5"], "--eval_datasets demo:0.5: only calibration texts are mixed"),
        (["--dataset", "self", "--offload", "disk"], "calibration text self: each token would read the whole model"),
    ],
)
def test_wrong_texts_are_told_in_one_line_before_anything_is_written(
    arguments, flags, problem, tmp_path, monkeypatch, capsys
):
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"ppllms.py: error: {problem}") and told.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script, flags, problem",
    [
        (alp_prune, ["--calibration_dataset", "demo:inf", "self:1"], "--calibration_dataset: inf is no share"),
        (alp_prune, ["--dataset", "self"], "--dataset self: is text for calibration"),
        (alp_prune, ["--calibration_dataset", "demo:99", "self:1", "--nsamples", 9], "self gives none of 9 samples"),
        (alp_prune, ["--calibration_dataset", "self", "--offload", "disk"], "would read the whole model from disk"),
        (save_gradient, ["--dataset", "demo:0.5"], "--dataset demo:0.5: is the share of a single text"),
        (save_gradient, ["--dataset", "self", "--offload", "disk"], "would read the whole model from disk"),
    ],
)
def test_the_other_scripts_tell_it_too(script, flags, problem, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    of_text = ["--dataset", "demo"] if script is alp_prune else []
    assert run("--model", tiny_folder, *of_text, *flags, monkeypatch=monkeypatch, script=script) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1 and not list(tmp_path.iterdir())
