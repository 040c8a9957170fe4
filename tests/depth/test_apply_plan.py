"""`--apply_plan`: what a run found is done again, without a search."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.depth.prepare
import lib.depth.searches
from lib.config.plan import read_plan
from tests.command import run
from tests.families import tiny_model


@pytest.fixture(scope="module")
def searched(tiny_folder, text_file, tmp_path_factory) -> Path:
    """A folder with the output `found` of a run, and with the model `searched` that it saved."""
    folder = tmp_path_factory.mktemp("once")
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 3]
    flags += ["--mha_remove_layers", 1, "--ffn_remove_layers", 2]
    flags += ["--output_dir", folder / "found", "--save_model", folder / "searched"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(*flags, monkeypatch=monkeypatch) == 0
    return folder


@pytest.fixture
def found(searched, tmp_path) -> Path:
    """The result.json of a run that saved its model in `searched`."""
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    return tmp_path / "found/result.json"


def state_of(folder) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).state_dict()


def test_it_makes_the_model_that_the_search_made(found, text_file, tmp_path, monkeypatch, capsys):
    def never(*args):
        raise AssertionError("searched")

    for module, name in (
        (lib.depth.searches, "block_influence"),
        (lib.depth.searches, "greedy_search"),
        (lib.depth.prepare, "calibration_windows"),
    ):
        monkeypatch.setattr(module, name, never)
    flags = ["--apply_plan", found, "--eval_datasets", text_file, "--output_dir", tmp_path / "applied"]
    assert run(*flags, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0  # the model is that of the plan
    before, after = (json.loads(path.read_text()) for path in (found, tmp_path / "applied/result.json"))
    same = ["model", "num_layers", "mha_removed", "ffn_removed", "perplexity", "seqlen", "dtype"]
    assert {name: before[name] for name in same} == {name: after[name] for name in same}
    assert after["applied_plan"] == str(found) and after["parameters"]["removed"] == before["parameters"]["removed"]
    searched, applied = state_of(tmp_path / "searched"), state_of(tmp_path / "out")
    assert searched.keys() == applied.keys() and all(torch.equal(searched[name], applied[name]) for name in searched)
    assert f"Plan        {found}" in capsys.readouterr().out
    assert read_plan(tmp_path / "applied/result.json").plan == read_plan(found).plan  # and can be applied again


def test_without_evaluation_no_text_is_read(found, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.depth.prepare, "load_corpus", None)
    flags = ["--apply_plan", found, "--eval_ppl", "no", "--output_dir", tmp_path / "applied"]
    assert run(*flags, "--save_model", tmp_path / "out", "--save_format", "masked", monkeypatch=monkeypatch) == 0
    assert not (tmp_path / "out/modeling_pruned.py").exists()


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"tool": "alp_prune"}, "holds no plan (no result.json of ppllms.py)"),
        ({"mha_removed": [0, 9]}, "mha_removed [0, 9] must name different layers below 4"),
        ({"ffn_removed": [1, 1]}, "ffn_removed [1, 1] must name different layers"),
        ({"ffn_removed": "12"}, "the fields of a result have other types"),
        ({"ffn_removed": 3}, "holds no plan"),
        ({"num_layers": None}, "numbers of layers and parameters must be whole"),
        ({"mha_removed": [0, 1, 2, 3]}, "removes every attention"),
        ({"model": "a\0b", "model_path": None}, "the model must have a name"),
        ({"model": " "}, "the model must have a name"),
        ({"num_layers": 6}, "was made for 6 decoder layers, but"),
    ],
)
def test_a_file_that_is_no_plan_for_the_model_is_refused(found, tmp_path, monkeypatch, capsys, change, problem):
    content = json.loads(found.read_text())
    found.write_text(json.dumps(content | change))
    flags = ["--apply_plan", found, "--eval_ppl", "no", "--output_dir", tmp_path / "applied"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and problem in told and "--apply_plan" in told
    assert not (tmp_path / "applied").exists()


def test_a_missing_broken_or_incomplete_file_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    cases = [(None, "cannot be read"), ("{", "holds no plan"), ('{"tool": "ppllms"}', "has no 'mha_re")]
    for content, problem in (*cases, ("[" * 100_000, "holds no plan")):
        if content:
            path.write_text(content)
        assert run("--apply_plan", path, monkeypatch=monkeypatch) == 2
        assert problem in capsys.readouterr().err


def test_a_folder_without_a_plan_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "result.txt").touch()
    assert run("--apply_plan", tmp_path, monkeypatch=monkeypatch) == 2
    assert f"--apply_plan {tmp_path}: holds no plan.json, which" in capsys.readouterr().err


def test_a_plan_for_what_is_gone_is_refused(found, tmp_path, monkeypatch, capsys):
    content = json.loads(found.read_text())
    partial = json.loads((tmp_path / "searched/config.json").read_text())["per_layer_config"]
    layer = next(int(layer) for layer, entry in partial.items() if entry["skip"] == ["mlp"])
    found.write_text(json.dumps(content | {"num_layers": 3, "mha_removed": [], "ffn_removed": [layer]}))
    flags = ["--apply_plan", found, "--model_name", tmp_path / "searched", "--eval_ppl", "no"]
    assert run(*flags, "--output_dir", tmp_path / "applied", monkeypatch=monkeypatch) == 2
    assert f"layer {layer} of {tmp_path / 'searched'} has no FFN to remove" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, problem",
    [
        (["--prune_rate", 0.25], "--prune_rate: has no meaning with --apply_plan"),
        (["--nsamples", 128], "--nsamples: has no meaning with --apply_plan"),
        (["--gguf", "a.gguf", "b.gguf", "--seqlen", 8], "--seqlen: has no meaning with --gguf"),
        (["--save_format", "hf"], "--save_format: needs --save_model"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(found, monkeypatch, capsys, flags, problem):
    assert run("--apply_plan", found, *flags, monkeypatch=monkeypatch) == 2
    assert problem in capsys.readouterr().err


def test_a_gguf_needs_a_plan(monkeypatch, capsys):
    assert run("--gguf", "a.gguf", "b.gguf", monkeypatch=monkeypatch) == 2
    assert "--gguf: needs --apply_plan" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--output_dir", "--save_model"])
def test_the_plan_is_not_replaced_by_what_it_makes(found, monkeypatch, capsys, flag):
    (found.parent / "config.json").write_text("{}")  # as if a model stood beside it
    before = found.read_text()
    command = ["--apply_plan", found, "--eval_ppl", "no", "--overwrite", flag, found.parent]
    assert run(*command, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert f"{flag} {found.parent}" in told and "would replace" in told and found.read_text() == before
    if flag == "--output_dir":  # a folder further up is another matter
        assert run(*command[:-1], found.parent.parent, monkeypatch=monkeypatch) == 0 and found.read_text() == before


def test_what_leaves_no_attention_is_refused(found, tmp_path, monkeypatch, capsys):
    """The first plan has left attention in some layers; the second names just those."""
    config = json.loads((tmp_path / "searched/config.json").read_text())
    partial = {int(layer): entry["skip"] for layer, entry in config["per_layer_config"].items()}
    with_attention = [layer for layer in range(3) if "attention" not in partial.get(layer, [])]
    content = json.loads(found.read_text()) | {"num_layers": 3, "ffn_removed": []}
    flags = ["--model_name", tmp_path / "searched", "--eval_ppl", "no", "--overwrite", "--output_dir", tmp_path / "out"]
    found.write_text(json.dumps(content | {"mha_removed": with_attention[:-1]}))
    assert run("--apply_plan", found, *flags, "--save_model", tmp_path / "one", monkeypatch=monkeypatch) == 0
    found.write_text(json.dumps(content | {"mha_removed": with_attention[-1:]}))
    again = [*flags[2:], "--model_name", tmp_path / "one"]
    assert run("--apply_plan", found, *again, monkeypatch=monkeypatch) == 2
    assert "without any attention; one must stay" in capsys.readouterr().err


def test_another_model_of_as_many_layers_is_remarked_on(found, tmp_path, demo_tokenizer, monkeypatch, capsys):
    tiny_model("Mixtral", vocab_size=len(demo_tokenizer)).save_pretrained(tmp_path / "other")
    demo_tokenizer.save_pretrained(tmp_path / "other")
    command = ["--apply_plan", found, "--eval_ppl", "no", "--output_dir", tmp_path / "applied"]
    assert run(*command, monkeypatch=monkeypatch) == 0
    assert "is this another?" not in capsys.readouterr().out
    assert run(*command, "--overwrite", "--model_name", tmp_path / "other", monkeypatch=monkeypatch) == 0
    assert "is this another?" in capsys.readouterr().out
    assert json.loads((tmp_path / "applied/result.json").read_text())["parameters"]["target_rate"] is None


def test_the_plan_finds_its_model_from_another_folder(arguments, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    assert run(*arguments, "--model_name", tiny_folder.name, "--eval_ppl", "no", monkeypatch=monkeypatch) == 0
    monkeypatch.chdir(tmp_path)
    command = ["--apply_plan", "run/result.json", "--eval_ppl", "no", "--output_dir", "applied"]
    assert run(*command, monkeypatch=monkeypatch) == 0


# A row of a table -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table(tiny_folder, text_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("table") / "table"
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 3]
    flags += ["--method", "shortgpt", "random", "--prune_rate", 0.05, 0.1, "--seed", 0, 1, "--output_dir", folder]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(*flags, monkeypatch=monkeypatch) == 0
    return folder


@pytest.mark.parametrize("row", ["random 0.1 seed 1", "shortgpt 0.05 seed 0"])
def test_the_plan_of_a_row_of_a_table_is_applied(row, table, tmp_path, monkeypatch):
    method, rate, _, seed = row.split()
    results = [json.loads(line)["result"] for line in (table / "results.jsonl").read_text().splitlines()]
    (expected,) = (
        one
        for one in results
        if (one["method"], str(one["parameters"]["target_rate"]), str(one["seed"])) == (method, rate, seed)
    )
    flags = ["--apply_plan", f"{table}#{row}", "--eval_ppl", "no", "--save_model", tmp_path / "out"]
    assert run(*flags, "--output_dir", tmp_path / "run", monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["mha_removed"], result["ffn_removed"]) == (expected["mha_removed"], expected["ffn_removed"])
    assert (tmp_path / "out/config.json").exists()


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("#random 0.1", "#random 0.1: 2 rows begin so; there are shortgpt 0.05 seed 0, "),
        ("#sleb", "#sleb: 0 rows begin so; there are "),
        ("#", "rows begin so"),
        ("", "is of a table; give a row of it, as "),
        ("/results.jsonl", "holds no plan"),
        ("-none#x", "is no output folder of a table of ppllms.py"),
    ],
)
def test_what_is_no_row_is_told_with_those_that_are(row, problem, table, monkeypatch, capsys):
    assert run("--apply_plan", f"{table}{row}", monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert problem in told and told.count("\n") == 1


def test_rows_that_anybody_may_have_written_are_no_crash(table, tmp_path, monkeypatch, capsys):
    for content in (b"[]\n", b'{"result": 1}\n', b'{"result": {}}\n', b"\xff", b'{"result": {"model": 1}}\n'):
        (tmp_path / "results.jsonl").write_bytes(content)
        assert run("--apply_plan", f"{tmp_path}#x", monkeypatch=monkeypatch) == 2
        assert capsys.readouterr().err.count("\n") == 1
