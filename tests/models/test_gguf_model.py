"""A GGUF file is a model like any other, for all three scripts, and a pruned one is written in the same run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.config.plan import Plan, read_plan
from lib.config.snapshot import MODEL, Snapshot
from lib.config.sources import ModelSource
from lib.demo import DEMO_MODEL
from lib.errors import InputError, InputsChanged
from lib.export.gguf import apply_plan
from lib.models.loading import load_config, load_model, load_tokenizer
from tests.command import ROOT, run, run_alp, run_gradient
from tests.families import tiny_model

gguf = pytest.importorskip("gguf")

from tests.export.gguf_writer import KINDS, write_gguf  # noqa: E402

WORDS = ROOT / "README.md"  # a text that is read at once
TEXT = ["--dataset", WORDS, "--nsamples", 4, "--eval_datasets", WORDS, "--seqlen", 64, "--eval_windows", 2]
COUNTS = ["--mha_remove_layers", 1, "--ffn_remove_layers", 2]
UNMEASURED = ["--dataset", WORDS, "--nsamples", 2, "--seqlen", 32, "--eval_ppl", "no"]
TEXT_ALP = ["--calibration_dataset", WORDS, "--nsamples", 4, "--dataset", WORDS, "--seqlen", 64, "--eval_windows", 2]


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """The demo model as a GGUF file in a folder of its own."""
    model = load_model(ModelSource("demo"))
    return write_gguf(model, tmp_path_factory.mktemp("gguf") / "demo.Q8_0.gguf", DEMO_MODEL, "Q8_0")


# Loading --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_file(kind, tmp_path):
    dense = tiny_model("Llama")
    path = write_gguf(dense, tmp_path / "m.gguf", DEMO_MODEL, kind)
    loaded = load_model(ModelSource(str(path)))
    error = {"F32": 0, "F16": 2**-11, "Q8_0": 1 / 127}[kind]
    for name, expected in dense.state_dict().items():
        largest = error * expected.abs().max()
        assert (loaded.state_dict()[name] - expected).abs().max() <= largest, name
    assert loaded.dtype == torch.float32 and loaded.config.name_or_path == str(path)


def test_the_dtype_can_be_chosen(demo):
    assert load_model(ModelSource(str(demo), dtype="bfloat16")).dtype == torch.bfloat16


def test_the_tokenizer_is_the_one_in_the_file_whatever_lies_beside_it(demo, tmp_path):
    shutil.copy(demo, tmp_path / "m.gguf")
    (tmp_path / "tokenizer.json").write_text("not this one")
    (tmp_path / "config.json").write_text("nor this one")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "wrong"}')
    source, own = ModelSource(str(tmp_path / "m.gguf")), AutoTokenizer.from_pretrained(DEMO_MODEL)
    found, text = load_tokenizer(source), "def word(self): return 'naïve' + 12345 * 2"
    assert found(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
    assert found.eos_token == own.eos_token and load_config(source).hidden_size == load_model(source).config.hidden_size


def test_a_file_that_was_changed_is_read_anew(tmp_path):
    path = tmp_path / "m.gguf"
    for width in (48, 80):
        write_gguf(tiny_model("Llama", intermediate_size=width), path, DEMO_MODEL)
        assert load_config(ModelSource(str(path))).intermediate_size == width


def test_a_change_of_the_file_is_noticed(demo, tmp_path):
    path = Path(shutil.copy(demo, tmp_path / "m.gguf"))
    taken = Snapshot.take([(MODEL, str(path))])
    taken.check([(MODEL, str(path))])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(InputsChanged, match="m.gguf: was changed"):
        taken.check([(MODEL, str(path))])


def test_it_is_not_read_from_disk_layer_by_layer(demo):
    with pytest.raises(InputError, match="--offload disk: .*demo.Q8_0.gguf cannot be read layer by layer; use"):
        load_model(ModelSource(str(demo), offload="disk"))


# The three scripts ----------------------------------------------------------------------------------------------------


def test_a_pruned_model_is_saved_as_any_other_and_is_the_measured_one(demo, tmp_path, monkeypatch, capsys):
    assert run("--model_name", demo, *TEXT, *COUNTS, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().err == ""  # no progress bar of transformers
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert saved.num_parameters() < load_model(ModelSource("demo")).num_parameters()


def test_the_search_finds_what_it_finds_on_the_same_weights_in_a_folder(demo, tmp_path, monkeypatch):
    load_model(ModelSource(str(demo))).save_pretrained(tmp_path / "same")
    load_tokenizer(ModelSource(str(demo))).save_pretrained(tmp_path / "same")
    results = []
    for name, model in ("file", demo), ("folder", tmp_path / "same"):
        flags = ["--model_name", model, *TEXT, *COUNTS, "--output_dir", tmp_path / name]
        assert run(*flags, monkeypatch=monkeypatch) == 0
        results.append(json.loads((tmp_path / name / "result.json").read_text()))
    of_file, of_folder = results
    for field in ("mha_removed", "ffn_removed", "perplexity", "bi_scores"):
        assert of_file[field] == of_folder[field], field
    assert of_file["model_path"] == str(demo)


def test_gradients_and_sparsity(demo, tmp_path, monkeypatch, capsys):
    gradients = tmp_path / "gradients.json"
    flags = ["--dataset", WORDS, "--ngrad", 2, "--grad_seqlen", 16, "--output", gradients]
    assert run_gradient("--model", demo, *flags, monkeypatch=monkeypatch) == 0
    flags = [*TEXT_ALP, "--gradients", gradients, "--prune_method", "wanda_alp", "--save_model", tmp_path / "out"]
    assert run_alp("--model", demo, *flags, monkeypatch=monkeypatch) == 0, capsys.readouterr().err
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    weight = saved.model.layers[1].mlp.up_proj.weight
    assert 0.2 < (weight == 0).float().mean() < 0.8


# Writing a pruned GGUF file -------------------------------------------------------------------------------------------


def test_the_pruned_file_is_that_of_the_plan(demo, tmp_path, monkeypatch, capsys):
    target, folder = tmp_path / "out.gguf", tmp_path / "run"
    flags = [*UNMEASURED, *COUNTS, "--save_model", target, "--output_dir", folder]
    assert run("--model_name", demo, *flags, monkeypatch=monkeypatch) == 0
    assert f"model   {target}: llama-cli -m {target}" in capsys.readouterr().out
    apply_plan(demo, tmp_path / "other.gguf", read_plan(folder / "result.json").plan)
    assert target.read_bytes() == (tmp_path / "other.gguf").read_bytes()
    result = json.loads((folder / "result.json").read_text())
    assert (result["saved_model"], result["save_format"]) == (str(target), "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.gguf", "out.gguf", "run"]


def test_refitted_weights_are_those_of_a_model_saved_as_a_folder(demo, tmp_path, monkeypatch, capsys):
    refit = ["--compensate", "all", "--output_dir"]
    more = ["--dataset", WORDS, "--nsamples", 24, "--seqlen", 64, "--eval_ppl", "no"]
    for name in ("out", "out.gguf"):
        flags = [*more, *COUNTS, "--save_model", tmp_path / name, *refit, tmp_path / f"run-{name}"]
        assert run("--model_name", demo, *flags, monkeypatch=monkeypatch) == 0
    assert re.search(r"^Changed     \d+ tensors in the GGUF file: \d+ as (F32|Q8_0)", capsys.readouterr().out, re.M)
    saved = read_plan(tmp_path / "run-out/result.json")
    assert saved.changed and saved.changed.folder
    apply_plan(demo, tmp_path / "other.gguf", saved.plan, changed=saved.changed)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    of_gguf = read_plan(tmp_path / "run-out.gguf/result.json").changed
    assert of_gguf and of_gguf.folder is None  # the file holds them quantized


def test_an_existing_file_is_replaced_only_when_told_to(demo, tmp_path, monkeypatch, capsys):
    target, flags = tmp_path / "out.gguf", ["--model_name", demo, *UNMEASURED, *COUNTS, "--save_model"]
    target.write_bytes(b"GGUF of somebody")
    assert run(*flags, target, monkeypatch=monkeypatch) == 2
    assert "out.gguf exists; name another file or add --overwrite" in capsys.readouterr().err
    assert target.read_bytes() == b"GGUF of somebody"
    assert run(*flags, target, "--overwrite", monkeypatch=monkeypatch) == 0
    assert len(target.read_bytes()) > 1000
    (tmp_path / "notes.gguf").write_text("mine")
    assert run(*flags, tmp_path / "notes.gguf", "--overwrite", monkeypatch=monkeypatch) == 2
    assert "is no GGUF file" in capsys.readouterr().err and (tmp_path / "notes.gguf").read_text() == "mine"


def test_a_finished_run_is_not_repeated(demo, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.gguf"
    flags = ["--model_name", demo, *UNMEASURED, *COUNTS, "--save_model", target, "--output_dir", tmp_path / "run"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    assert run(*flags, "--resume", monkeypatch=monkeypatch) == 0
    assert "Finished before" in capsys.readouterr().out
    target.unlink()
    assert run(*flags, "--resume", monkeypatch=monkeypatch) == 2
    assert "its model is not there as it was saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--model_name", "demo", "--save_model", "out.gguf"], "demo is none; give a folder, and prune a GGUF file of"),
        (["--model_name", "M", "--save_model", "M"], "would replace M, which this run uses"),
        (["--model_name", "M", "--save_model", "out.gguf", "--save_format", "hf"], "--save_format: has no meaning for"),
        (
            ["--model_name", "M", "--method", "reap", "--save_model", "out.gguf"],
            "cannot hold a model with fewer experts",
        ),
        (["--model_name", "none.gguf"], "model none.gguf: no such folder or file"),
        (["--model_name", "broken.gguf"], "broken.gguf: is not a GGUF file, or a broken one (110 items are more"),
        (["--model_name", "text.gguf"], "text.gguf: is not a GGUF file, or a broken one (it does not begin"),
    ],
)
def test_what_cannot_be_is_one_line(flags, reason, demo, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(demo, "M")
    Path("M").rename("m.gguf")
    Path("broken.gguf").write_bytes(demo.read_bytes()[:400])
    Path("text.gguf").write_text("a text")
    given = ["m.gguf" if flag == "M" else flag for flag in flags]
    assert run(*given, *TEXT, monkeypatch=monkeypatch) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason.replace(" M,", " m.gguf,") in line
    assert not Path("out.gguf").exists()


def test_a_pruned_file_is_not_taken_again_and_told_so(demo, tmp_path):
    apply_plan(demo, tmp_path / "out.gguf", Plan(12, (3,), (3, 4)))
    with pytest.raises(InputError, match="out.gguf: .*; of a pruned file .deci. give the dense") as told:
        load_config(ModelSource(str(tmp_path / "out.gguf")))
    assert len(str(told.value)) < len(str(tmp_path)) + 200


def test_zeros_are_not_saved_as_gguf(demo, tmp_path, monkeypatch, capsys):
    flags = ["--model", demo, *TEXT_ALP, "--prune_method", "magnitude", "--save_model", tmp_path / "out.gguf"]
    assert run_alp(*flags, monkeypatch=monkeypatch) == 2
    assert "zeros are not saved as GGUF; give a folder" in capsys.readouterr().err


def test_other_architectures_are_read_and_only_a_llama_is_written(tmp_path, monkeypatch, capsys):
    """Qwen2 has its own graph in llama.cpp: transformers reads its file, and no pruned one can be written."""
    path = _write_qwen2(tmp_path / "q.gguf")
    flags = ["--model_name", path, *UNMEASURED, *COUNTS, "--output_dir", tmp_path / "run"]
    assert run(*flags, "--save_model", tmp_path / "out.gguf", monkeypatch=monkeypatch) == 2
    assert "architecture qwen2: only a llama's layers" in capsys.readouterr().err
    assert run(*flags, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert "Qwen2" in (tmp_path / "out/config.json").read_text()


def _write_qwen2(path: Path) -> Path:
    """A tiny Qwen2 with the tokenizer of the demo model."""

    class Writer(gguf.GGUFWriter):
        def __init__(self, path, _, **options):
            super().__init__(path, "qwen2", **options)

    model = tiny_model("Qwen2", vocab_size=len(AutoTokenizer.from_pretrained(DEMO_MODEL)), head_dim=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        return write_gguf(model, path, DEMO_MODEL)
