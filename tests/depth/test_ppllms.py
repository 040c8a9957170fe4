"""The command line: what it prints and writes."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.depth.prepare
import lib.depth.run
import lib.depth.searches
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import calibration_windows, evaluation_windows
from lib.depth.block_influence import block_influence
from lib.errors import RunError
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.reporting.plots import has_matplotlib
from lib.runtime.batching import Batcher
from tests import reference
from tests.command import GOES_ON, run, stopped


@pytest.mark.draws
def test_a_run_writes_what_it_prints(arguments, tmp_path, monkeypatch, capsys):
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    order = ["Parameters", "Block Influence by layer", "Candidates", "Counts", "round 1", "MHA removal layers"]
    order += ["FFN removal layers", "Parameters  ", "Perplexity", "Prefill", "Samples", "Written"]
    places = [printed.index(order[0])]
    for part in order[1:]:
        places.append(printed.index(part, places[-1] + 1))
    assert printed == (tmp_path / "run/log.txt").read_text()
    assert not has_matplotlib() or (tmp_path / "run/block_influence.png").stat().st_size > 10_000

    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["tool"] == "ppllms" and result["seed"] == 0 and result["nsamples"] == 3
    assert (
        len(result["bi_scores"]) == 4
        and result["candidates"] == sorted(range(4), key=result["bi_scores"].__getitem__)[:2]
    )
    assert sorted(result["candidates"]) == result["ffn_removed"] and len(result["mha_removed"]) == 1
    (only,) = result["rounds"]
    assert only["loss"] == min(only["losses"].values()) == only["losses"][str(only["selected"])]
    parts = {"snapshot", "load", "data", "bi", "search", "evaluate", "speed", "samples", "save", "check"}
    assert set(result["seconds"]) == parts
    assert result["peak_memory_bytes"] > 0
    speed = result["tokens_per_second"]
    assert set(speed) == {"dense", "pruned"} and min(speed.values()) > 0
    assert f"{speed['dense']:,.0f} -> {speed['pruned']:,.0f} tokens/s here" in printed
    assert {"versions", "device", "command"} <= set(result["environment"])
    parameters = result["parameters"]
    assert parameters["actual_rate"] == pytest.approx(parameters["removed"] / parameters["total"])
    assert f"{parameters['total']:,} -> {parameters['total'] - parameters['removed']:,}" in printed

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in saved.parameters()) == parameters["total"] - parameters["removed"]


def test_a_run_goes_on_when_its_speed_takes_too_much_memory(arguments, tmp_path, monkeypatch, capsys):
    def run_out(*_):
        raise MemoryError

    monkeypatch.setattr(lib.depth.run, "tokens_per_second", run_out)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "run/result.json").read_text())
    assert "Prefill             not measured: too little memory" in printed and "Samples" in printed
    assert "tokens_per_second" not in result and result["perplexity"]


def test_the_saved_model_has_the_perplexity_that_was_reported(arguments, text_file, tmp_path, monkeypatch):
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    reported = json.loads((tmp_path / "run/result.json").read_text())["perplexity"][str(text_file)]
    windows = evaluation_windows(
        load_corpus(str(text_file), "test"), load_tokenizer(ModelSource(str(tmp_path / "out"))), 64
    )
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    found = perplexity(reference.model_window_losses(saved), windows).value
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
    tokenizer, decoder = (
        load_tokenizer(ModelSource(str(tiny_folder))),
        Decoder(load_model(ModelSource(str(tiny_folder)))),
    )
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
    load, batch = lib.depth.prepare.load_model, lib.depth.prepare.Batcher
    monkeypatch.setattr(lib.depth.prepare, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(lib.depth.prepare, "Batcher", lambda size, *ranks: sizes.append(size) or batch(size, *ranks))
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

    monkeypatch.setattr(lib.depth.run, "save_pruned", fail)
    assert run(*arguments, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["mha_removed"]
    assert capsys.readouterr().err == "ppllms.py: failed: --save_format hf: no; what is finished is kept: " + GOES_ON


def test_without_matplotlib_there_is_a_result_and_a_word_about_it(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(*arguments, monkeypatch=monkeypatch) == 0
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.png"))


def test_running_out_of_memory_says_what_to_lower(arguments, monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(lib.depth.searches, "block_influence", fail)
    assert run(*arguments, monkeypatch=monkeypatch) == 1
    assert "lower --seqlen" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_run_that_is_stopped_leaves_no_half_result(tiny_folder, text_file, tmp_path, kind):
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 10000]
    flags += ["--seqlen", 4, "--batch_size", 1, "--output_dir", tmp_path / "run", "--save_model", tmp_path / "out"]
    flags += ["--mha_remove_layers", 2, "--ffn_remove_layers", 3]
    status, told = stopped("ppllms.py", *flags, at=b"Greedy search", kind=kind)
    assert status == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    advice = f"ppllms.py: stopped; what is finished is kept: {GOES_ON}".encode()
    assert told == (advice if kind == signal.SIGINT else b"")
    found = sorted(path.name for path in tmp_path.rglob("*") if not path.name.startswith("."))
    assert found == ["lock", "log.txt", "run", "run.json", "state", "state.json"]
