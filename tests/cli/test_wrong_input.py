"""What the command line says to wrong input: one line, exit status 2, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import transformers
from safetensors.torch import load_file, save_file

import lib.depth.run
import lib.depth.searches
from lib.cli import checks
from lib.errors import RunError
from tests.command import GOES_ON, ROOT, run
from tests.families import tiny_model
from tests.runs.interruption import files_of


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--prune_rate", "0"], "--prune_rate: '0' is not a number between 0 and 1"),
        (["--prune_rate", "1.5"], "--prune_rate: '1.5' is not a number between 0 and 1"),
        (["--mha_remove_layers", "-1"], "--mha_remove_layers: '-1' is not a whole number of at least 0"),
        (["--nsamples", "0"], "--nsamples: '0' is not a whole number of at least 1"),
        (["--eval_ppl", "maybe"], "--eval_ppl: 'maybe' is neither True nor False"),
        (["--mha_ffn_ratio", "-2"], "neither a number from 0.01 to 100 nor auto"),
        (["--dataset", ""], "--dataset/--calibration_dataset: an empty name"),
        (["--save_model", ""], "--save_model: an empty name"),
        (["--device", "cpu", "--device_map", "auto"], "give one of them"),
        (["--device_map", "nonsense"], "nonsense"),
        (["--device", "meta"], "--device meta: not available"),
        (["--save_format", "onnx"], "--save_format: invalid choice: 'onnx'"),
        (["--prune_rat", "0.2"], "unrecognized arguments: --prune_rat"),
        (["--mha_remove_layers", "3"], "more than --ffn_remove_layers 2"),
        (["--mha_remove_layers", "4", "--ffn_remove_layers", "4"], "has 4 decoder layers; one must stay"),
        (["--ffn_remove_layers", "5"], "has 4 decoder layers, no more"),
        (["--num_blocks", "5"], "--num_blocks 5: .* has 4 decoder layers"),
        (["--seqlen", "65"], "--seqlen 65: .* has a context of 64 tokens"),
        (["--seqlen", "1"], "a window needs 2 tokens"),
        (["--model_name", "no/such/model"], "model no/such/model: no such folder"),
        (["--model_name", "nobody/nothing"], "nobody/nothing: .*without a network give the path of a local folder"),
        (["--dataset", "/no/such.txt"], "dataset /no/such.txt: no such file or folder"),
        (["--model_name", "~nosuchuser/model"], "model ~nosuchuser/model: no such folder"),
        (["--output_dir", "~nosuchuser/run"], "no home folder is known of that user"),
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
    assert re.search(problem, told), told
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


def test_code_that_comes_with_a_model_runs_only_when_told(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    code = "from transformers import LlamaForCausalLM\n\nclass OwnForCausalLM(LlamaForCausalLM):\n    pass\n"
    (tmp_path / "model/modeling_own.py").write_text(code)
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    flags = [*arguments, "--model_name", tmp_path / "model", "--eval_ppl", "no", "--overwrite"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    assert "(LlamaForCausalLM, " in capsys.readouterr().out
    assert run(*flags, "--trust_remote_code", monkeypatch=monkeypatch) == 0
    assert "(OwnForCausalLM, " in capsys.readouterr().out
    saving = ["--trust_remote_code", "--save_model", tmp_path / "out"]
    assert run(*flags, *saving, monkeypatch=monkeypatch) == 2
    assert "OwnForCausalLM is not a class of transformers" in capsys.readouterr().err


def test_without_a_network_the_hub_is_not_waited_for(monkeypatch):
    def refuse(*args, **options):
        raise OSError("no network")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("https_proxy", raising=False)
    monkeypatch.delenv("HTTPS_PROXY", raising=False)
    monkeypatch.setattr(checks.socket, "create_connection", refuse)
    checks.prefer_cache_without_network()
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_weights_that_are_missing_are_not_made_up(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert run(*arguments, "--model_name", tmp_path / "model", monkeypatch=monkeypatch) == 2
    assert "1 weights are not in the checkpoint (model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


def test_folders_that_overlap_are_refused_before_the_work(
    arguments, tiny_folder, text_file, tmp_path, monkeypatch, capsys
):
    copy = tmp_path / "model"
    shutil.copytree(tiny_folder, copy)
    for flags, problem in [
        (["--output_dir", tmp_path / "x/run", "--save_model", tmp_path / "x"], "would replace"),
        (["--output_dir", tmp_path / "a/../b", "--save_model", tmp_path / "b"], "would replace"),
        (["--model_name", copy, "--save_model", copy, "--overwrite"], f"would replace {copy}, which this run uses"),
        (["--save_model", copy.parent, "--overwrite"], "would replace"),
        (["--save_model", text_file.parent, "--overwrite"], f"would replace {text_file}"),
        (["--save_model", tmp_path / ("x" * 250)], "the name is too long"),
    ]:
        assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
        assert problem in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_earlier_result_is_kept_or_replaced_whole(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    first = files_of(tmp_path / "run")
    assert run(*arguments, monkeypatch=monkeypatch) == 2
    assert "add --overwrite" in capsys.readouterr().err and files_of(tmp_path / "run") == first

    def fail(*args):
        raise RunError("no")

    monkeypatch.setattr(lib.depth.searches, "block_influence", fail)
    assert run(*arguments, "--overwrite", monkeypatch=monkeypatch) == 1
    assert "nothing is finished yet, and the same command starts again" in capsys.readouterr().err
    log = first.pop("log.txt")
    left = files_of(tmp_path / "run")
    assert left.pop("log.txt").startswith(log) and left == first


def test_a_full_disk_while_saving_is_one_line_and_the_result_is_there(arguments, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lib.depth.run, "save_pruned", fail)
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 1
    told = (
        f"ppllms.py: failed: no space left to write {tmp_path / 'out'}; free some, or name a folder on another disk; "
    )
    assert capsys.readouterr().err == told + f"what is finished is kept: {GOES_ON}"
    assert json.loads((tmp_path / "run/result.json").read_text())["mha_removed"]


def test_a_family_that_does_not_fit_is_refused(arguments, tiny_folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    sizes = dict(hidden_size=32, ffn_dim=48, word_embed_proj_dim=32, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.OPTConfig(**sizes, vocab_size=2048, max_position_embeddings=64, do_layer_norm_before=False)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "model")
    flags = ["--model_name", tmp_path / "model", "--seqlen", 32]
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
    assert "OPTForCausalLM does not fit" in capsys.readouterr().err and not (tmp_path / "run").exists()


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
    assert run(*arguments, "--save_model", tmp_path / "model", monkeypatch=monkeypatch) == 2
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
