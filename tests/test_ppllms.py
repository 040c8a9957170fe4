"""The command line: what it prints and writes, and what it says to wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lib.depth
import ppllms
from lib import cli
from lib.batching import Batcher
from lib.bi import block_influence
from lib.data import calibration_windows, evaluation_windows, load_corpus
from lib.errors import RunError
from lib.evaluate import perplexity
from lib.loading import load_model, load_tokenizer
from lib.model import Decoder
from tests import reference
from tests.families import tiny_model

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments, monkeypatch) -> int:
    """The exit status of ppllms.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["ppllms.py", *map(str, arguments)])
    return cli.run("ppllms.py", ppllms.main)


@pytest.fixture
def arguments(tiny_folder, text_file, tmp_path) -> list:
    """A run of seconds: tiny model, little text, one attention and two FFNs."""
    model = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 3]
    return [*model, "--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--output_dir", tmp_path / "run"]


def test_a_run_writes_what_it_prints(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    order = ["Parameters", "Block Influence by layer", "Candidates", "Counts", "round 1", "MHA removal layers"]
    order += ["FFN removal layers", "Parameters  ", "Perplexity", "Written"]
    places = [printed.index(order[0])]
    for part in order[1:]:
        places.append(printed.index(part, places[-1] + 1))
    assert printed == (tmp_path / "run/log.txt").read_text()

    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tool"] == "ppllms" and result["seed"] == 0 and result["nsamples"] == 3
    assert (
        len(result["bi_scores"]) == 4
        and result["candidates"] == sorted(range(4), key=result["bi_scores"].__getitem__)[:2]
    )
    assert sorted(result["candidates"]) == result["ffn_removed"] and len(result["mha_removed"]) == 1
    (only,) = result["rounds"]
    assert only["loss"] == min(only["losses"].values()) == only["losses"][str(only["selected"])]
    assert set(result["seconds"]) == {"load", "data", "bi", "search", "evaluate", "save"}
    assert result["peak_memory_bytes"] > 0
    assert {"versions", "device", "command"} <= set(result["environment"])
    parameters = result["parameters"]
    assert parameters["actual_rate"] == pytest.approx(parameters["removed"] / parameters["total"])
    assert f"{parameters['total']:,} -> {parameters['total'] - parameters['removed']:,}" in printed

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in saved.parameters()) == parameters["total"] - parameters["removed"]


def test_the_saved_model_has_the_perplexity_that_was_reported(arguments, text_file, tmp_path, monkeypatch):
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    reported = json.loads((tmp_path / "run/result.json").read_text())["perplexity"][str(text_file)]
    windows = evaluation_windows(load_corpus(str(text_file), "test"), load_tokenizer(str(tmp_path / "out")), 64)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    found = perplexity(reference.model_window_losses(saved), windows, Batcher(1))
    assert found == pytest.approx(reported["pruned"], rel=1e-5)
    assert found != pytest.approx(reported["dense"], rel=1e-4)


@pytest.mark.parametrize("value, measured", [("True", True), ("NO", False), ("0", False), ("yes", True), (None, True)])
def test_eval_ppl_takes_every_spelling(arguments, tmp_path, monkeypatch, value, measured):
    assert run(*arguments, "--eval_ppl", *([value] if value else []), monkeypatch=monkeypatch) == 0
    assert bool(json.loads((tmp_path / "run/result.json").read_text())["perplexity"]) == measured


def result_of(*arguments, monkeypatch, tmp_path) -> dict:
    """result.json of a run without evaluation."""
    assert run(*arguments, "--eval_ppl", "no", "--overwrite", monkeypatch=monkeypatch) == 0
    return json.loads((tmp_path / "run/result.json").read_text())


@pytest.fixture
def documents(tmp_path_factory) -> Path:
    """Forty documents of different text."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"text": f"Number {i}: " + " ".join(str(i * j % 97) for j in range(60))}) for i in range(40)]
    path.write_text("\n".join(lines))
    return path


def test_text_flags_choose_the_windows(arguments, documents, tiny_folder, tmp_path, monkeypatch):
    tokenizer, decoder = load_tokenizer(str(tiny_folder)), Decoder(load_model(str(tiny_folder)))
    corpus = load_corpus(str(documents), "train")
    for seed, nsamples, seqlen, used in [(0, 3, 64, None), (5, 3, 64, None), (0, 9, 64, 2), (0, 3, 16, 1)]:
        flags = {"--seed": seed, "--nsamples": nsamples, "--seqlen": seqlen, "--dataset": documents}
        flags |= {"--bi_windows": used} if used else {}
        flat = [part for flag in flags.items() for part in flag]
        result = result_of(*arguments, *flat, monkeypatch=monkeypatch, tmp_path=tmp_path)
        windows = calibration_windows(corpus, tokenizer, nsamples, seqlen, seed)
        assert result["windows"] == len(windows) and result["bi_windows"] == (used or len(windows))
        assert result["bi_scores"] == pytest.approx(block_influence(decoder, windows[:used], Batcher(4)), abs=1e-6)


def test_running_flags_reach_the_model(arguments, tmp_path, monkeypatch):
    loaded, sizes = [], []
    load, batch = lib.depth.load_model, lib.depth.Batcher
    monkeypatch.setattr(lib.depth, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(lib.depth, "Batcher", lambda size: sizes.append(size) or batch(size))
    result = {"monkeypatch": monkeypatch, "tmp_path": tmp_path}
    assert result_of(*arguments, "--dtype", "bfloat16", **result)["dtype"] == "bfloat16"
    assert loaded[0].dtype == torch.bfloat16
    result_of(*arguments, "--device_map", "auto", "--batch_size", 3, **result)
    assert sizes[1] == 3
    assert result_of(*arguments, "--num_blocks", 4, **result)["num_layers"] == 4


def test_save_format_masked_keeps_the_architecture(arguments, tmp_path, monkeypatch):
    flags = ["--save_model", tmp_path / "out", "--save_format", "masked"]
    parameters = result_of(*arguments, *flags, monkeypatch=monkeypatch, tmp_path=tmp_path)["parameters"]
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(p.numel() for p in saved.parameters()) == parameters["total"]
    assert not list((tmp_path / "out").glob("*.py"))


def test_counts_follow_the_rate_and_the_ratio(arguments, tmp_path, monkeypatch, capsys):
    at = arguments.index("--mha_remove_layers")
    automatic = [*arguments[:at], *arguments[at + 4 :], "--eval_ppl", "no", "--prune_rate", 0.1]
    assert run(*automatic, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (len(result["mha_removed"]), len(result["ffn_removed"])) == (1, 2)
    assert run(*automatic, "--mha_ffn_ratio", 3, "--overwrite", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (len(result["mha_removed"]), len(result["ffn_removed"])) == (1, 3)
    assert "with about 3 FFNs for each MHA" in capsys.readouterr().out
    # Here an FFN has 1.5 times the parameters of an attention, a ratio that no pair of four layers has.
    assert run(*automatic, "--mha_ffn_ratio", "auto", "--overwrite", monkeypatch=monkeypatch) == 2
    assert "--mha_ffn_ratio 1.5: no pair of counts fits a model of 4 layers" in capsys.readouterr().err


def test_a_failed_save_keeps_the_result(arguments, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise RunError("--save_format hf: no")

    monkeypatch.setattr(lib.depth, "save_pruned", fail)
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["mha_removed"]
    assert capsys.readouterr().err == "ppllms.py: failed: --save_format hf: no\n"


def test_without_matplotlib_there_is_a_result_and_a_word_about_it(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.png"))


def test_running_out_of_memory_says_what_to_lower(arguments, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(lib.depth, "block_influence", fail)
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    assert "lower --seqlen" in capsys.readouterr().err


def test_a_reader_that_goes_away_does_not_end_the_run(arguments, tmp_path):
    command = [sys.executable, ROOT / "ppllms.py", *arguments, "--eval_ppl", "no"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert (process.wait(120), process.stderr.read()) == (0, b"")
    assert "MHA removal layers" in (tmp_path / "run/log.txt").read_text()
    assert (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_run_that_is_stopped_leaves_no_half_result(tiny_folder, text_file, tmp_path, kind):
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 10000]
    flags += ["--seqlen", 4, "--batch_size", 1, "--output_dir", tmp_path / "run", "--save_model", tmp_path / "out"]
    flags += ["--mha_remove_layers", 2, "--ffn_remove_layers", 3]
    process = subprocess.Popen(
        list(map(str, [sys.executable, ROOT / "ppllms.py", *flags])), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    for line in process.stdout:
        if b"Greedy search" in line:
            process.send_signal(kind)
            break
    _, told = process.communicate(timeout=60)
    assert process.returncode == (1 if kind == signal.SIGINT else -signal.SIGKILL)
    assert told == (
        b"ppllms.py: stopped before the end; the same command starts again\n" if kind == signal.SIGINT else b""
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["log.txt", "run"]


# Wrong input


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--prune_rate", "0"], "--prune_rate: '0' is not a number between 0 and 1"),
        (["--prune_rate", "1.5"], "--prune_rate: '1.5' is not a number between 0 and 1"),
        (["--mha_remove_layers", "-1"], "--mha_remove_layers: '-1' is not a whole number of at least 0"),
        (["--nsamples", "0"], "--nsamples: '0' is not a whole number of at least 1"),
        (["--eval_ppl", "maybe"], "--eval_ppl: 'maybe' is neither True nor False"),
        (["--mha_ffn_ratio", "-2"], "neither a number from 0.01 to 100 nor auto"),
        (["--dataset", ""], "--dataset: an empty name"),
        (["--save_model", ""], "--save_model: an empty name"),
        (["--device", "cpu", "--device_map", "auto"], "give one of them"),
        (["--device_map", "nonsense"], "nonsense"),
        (["--device", "meta"], "--device meta: not available"),
        (["--save_format", "onnx"], "--save_format: invalid choice: 'onnx'"),
        (["--model_nam", "x", "--bogus"], "--bogus"),
        (["--mha_remove_layers", "3"], "more than --ffn_remove_layers 2"),
        (["--mha_remove_layers", "4", "--ffn_remove_layers", "4"], "has 4 layers; one must stay"),
        (["--ffn_remove_layers", "5"], "has only 4 layers"),
        (["--num_blocks", "5"], "--num_blocks 5: .* has 4 decoder layers"),
        (["--seqlen", "65"], "--seqlen 65: .* has a context of 64 tokens"),
        (["--seqlen", "1"], "a window needs 2 tokens"),
        (["--model_name", "no/such/model"], "model no/such/model: no such folder"),
        (["--model_name", "nobody/nothing"], "nobody/nothing: .*without a network give the path of a local folder"),
        (["--dataset", "/no/such.txt"], "dataset /no/such.txt: no such file or folder"),
        (["--eval_datasets", "/no/such.txt"], "dataset /no/such.txt: no such file or folder"),
        (["--dataset", "missing.jsonl"], "dataset missing.jsonl: no such file or folder"),
        (["--dataset", "nobody/nothing"], "dataset nobody/nothing: .*without a network give the path of a local copy"),
        (["--output_dir", "/dev/null/run"], "--output_dir /dev/null/run: /dev/null is not a folder"),
        (["--device", "cuda:9"], "--device cuda:9: not available"),
        (["--device", "gpu"], "--device gpu: not available"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(arguments, tmp_path, monkeypatch, capsys, flags, problem):
    with pytest.raises(SystemExit) as ended:
        sys.exit(run(*arguments, *flags, monkeypatch=monkeypatch))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and told.startswith("ppllms.py: error: ")
    assert __import__("re").search(problem, told), told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "missing, problem",
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_an_incomplete_model_folder_is_told(arguments, tiny_folder, tmp_path, monkeypatch, capsys, missing, problem):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    assert run(*arguments, "--model_name", tmp_path / "model", monkeypatch=monkeypatch) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["cut weights", "no JSON", "unknown type"])
def test_a_broken_model_folder_is_told(arguments, tiny_folder, tmp_path, monkeypatch, capsys, damage):
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights, config = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "no JSON":
        config.write_text("{")
    else:
        config.write_text(config.read_text().replace('"llama"', '"lama"'))
    assert run(*arguments, "--model_name", tmp_path / "model", monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(tmp_path / "model") in told and not (tmp_path / "run").exists()


def test_a_model_that_is_pruned_already_is_refused(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--save_model", tmp_path / "pruned", monkeypatch=monkeypatch) == 0
    again = [*arguments, "--overwrite", "--model_name", tmp_path / "pruned", "--trust_remote_code"]
    assert run(*again, monkeypatch=monkeypatch) == 2
    assert "has been pruned already" in capsys.readouterr().err


def test_weights_that_are_missing_are_not_made_up(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert run(*arguments, "--model_name", tmp_path / "model", monkeypatch=monkeypatch) == 2
    assert "1 weights are not in the checkpoint (model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_folders_that_overlap_are_refused_before_the_work(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    for flags, problem in [
        (["--output_dir", tmp_path / "x/run", "--save_model", tmp_path / "x"], "--output_dir lies in it"),
        (["--output_dir", tmp_path / "a/../b", "--save_model", tmp_path / "b"], "--output_dir lies in it"),
        (["--model_name", copy, "--save_model", copy, "--overwrite"], "is the model that is pruned"),
        (["--save_model", copy.parent, "--overwrite"], "holds no model, so --overwrite does not replace it"),
        (["--save_model", tmp_path / ("x" * 250)], "the name is too long"),
    ]:
        assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
        assert problem in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_earlier_result_is_kept_or_replaced_whole(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    first = (tmp_path / "run/result.json").read_text()
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert "add --overwrite" in capsys.readouterr().err and (tmp_path / "run/result.json").read_text() == first

    def fail(*args):
        raise RunError("no")

    monkeypatch.setattr(lib.depth, "block_influence", fail)
    assert run(*arguments, "--overwrite", monkeypatch=monkeypatch) == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["log.txt"]


def test_a_full_disk_while_saving_is_one_line_and_the_result_is_there(arguments, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lib.depth, "save_pruned", fail)
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == "ppllms.py: failed: [Errno 28] No space left on device\n"
    assert json.loads((tmp_path / "run/result.json").read_text())["mha_removed"]


def test_a_family_that_does_not_fit_is_refused(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    import transformers

    shutil.copytree(tiny_folder, tmp_path / "model")
    config = transformers.BloomConfig(vocab_size=2048, hidden_size=32, n_layer=4, n_head=4, seq_length=64)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "model")
    flags = ["--model_name", tmp_path / "model", "--seqlen", 32]
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
    assert "BloomForCausalLM does not fit" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_too_little_text_a_foreign_tokenizer_and_a_full_folder_are_told(
    arguments, tiny_folder, text_file, demo_tokenizer, tmp_path, monkeypatch, capsys
):
    (tmp_path / "short.txt").write_text("Too short.")
    assert run(*arguments, "--dataset", tmp_path / "short.txt", monkeypatch=monkeypatch) == 2
    assert "too few for one window of 64" in capsys.readouterr().err
    tiny_model("Llama").save_pretrained(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "model")
    assert run(*arguments, "--model_name", tmp_path / "model", monkeypatch=monkeypatch) == 2
    assert "use the tokenizer that belongs to it" in capsys.readouterr().err
    assert run(*arguments, "--save_model", text_file.parent, monkeypatch=monkeypatch) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_and_argument_errors_do_not_import_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for flags, status in (["--help"], 0), (["--prune_rate", "2"], 2), (["--model_name", "./no"], 2):
        done = subprocess.run(
            [sys.executable, ROOT / "ppllms.py", *flags], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == status and "torch was imported" not in done.stderr
    assert done.stderr.count("\n") == 1
