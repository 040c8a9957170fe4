"""Whatever is given as a model is either loaded or told what it is, and what to give instead, before torch is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies as st

from lib.config.sources import ModelSource, check_model
from lib.errors import InputError, describe_failure
from lib.models.loading import load_config, load_model, load_outline, load_tokenizer
from tests.command import ROOT, run


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """A checkpoint of the test's own."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def refusal(name: Path | str) -> str:
    """The line that a model is refused with."""
    with pytest.raises(InputError) as raised:
        check_model(str(name))
    line = describe_failure(raised.value)
    assert "\n" not in line and line.isprintable()
    return line


def change(folder: Path, **fields) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


# What it is -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "hub_id"),
    [
        ("https://huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/tree/main", "org/name"),
        ("https://huggingface.co/org/name/blob/main/model.safetensors", "org/name"),
        ("http://www.huggingface.co/org/name.v1-x?library=transformers", "org/name.v1-x"),
        ("huggingface.co/org/name", "org/name"),
        ("hf.co/org/name/", "org/name"),
        ("https://huggingface.co/gpt2", "gpt2"),
    ],
)
def test_the_address_of_a_hub_page_is_told_with_its_id(address, hub_id):
    assert refusal(address).endswith(f"is an address of the hub; give {hub_id}")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_of_a_model_is_told_with_its_folder(file, model):
    assert refusal(model / file).endswith(f"is a file of a model; give its folder {model}")


def test_a_folder_of_gguf_files_is_told_with_one_of_them(model, tmp_path):
    (tmp_path / "files").mkdir()
    for name in ("m.Q4_K_M.gguf", "m.Q8_0.gguf"):
        (tmp_path / "files" / name).write_bytes(b"GGUF")
    found = f"a folder of GGUF files; give one of them, as {tmp_path / 'files/m.Q4_K_M.gguf'}"
    assert refusal(tmp_path / "files").endswith(found)
    (model / "model.safetensors").rename(model / "m.gguf")
    assert "a folder of GGUF files" in refusal(model)


@pytest.mark.parametrize("is_alone", [False, True])
def test_an_adapter_is_told_at_once_and_how_to_merge_it(is_alone, model, capsys, monkeypatch):
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "org/name", "peft_type": "LORA"}')
    if is_alone:
        (model / "config.json").unlink()
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    assert "PEFT adapter" in refusal(model) and f'("{model}").merge_and_unload().save_pretrained(' in refusal(model)
    assert "give its folder" in refusal(model / "tokenizer.json")
    with pytest.raises(InputError, match="PEFT adapter"):  # of the hub, too, whose files are not here to check
        load_config(ModelSource(str(model)))
    assert run("--model_name", model, monkeypatch=monkeypatch) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("file", ["consolidated.00.pth", "tf_model.h5", "flax_model.msgpack", "model.onnx", "x.bin"])
def test_weights_of_another_kind_are_named(file, model):
    (model / "model.safetensors").rename(model / file)
    assert f"no weights (*.safetensors) in this folder but {file}" in refusal(model)


def test_the_folder_below_that_holds_the_model_is_named(model, tmp_path):
    model.rename(tmp_path / "checkpoint-500")
    assert f"no config.json in this folder, but there is one in {tmp_path}/checkpoint-500; give" in refusal(tmp_path)
    (tmp_path / "models--org--name/snapshots").mkdir(parents=True)
    shutil.move(tmp_path / "checkpoint-500", tmp_path / "models--org--name/snapshots/abc")
    assert "there is one in" in refusal(tmp_path / "models--org--name")


def test_links_that_lead_nowhere_pipes_and_names_that_are_no_text_are_told(model, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    assert "is a link that leads nowhere" in refusal(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    assert "is not a folder" in refusal(tmp_path / "pipe")
    assert "its path is not UTF-8" in refusal(tmp_path / os.fsdecode(b"caf\xe9"))
    assert "no such folder" in refusal("a\0b/c")
    for file in "model.safetensors", "config.json", "tokenizer.json":
        (model / file).rename(tmp_path / file)
        (model / file).symlink_to(file)
        assert "in this folder" in refusal(model) or "a link that leads nowhere" in refusal(model)
        (model / file).unlink()
        os.mkfifo(model / file)
        assert "in this folder" in refusal(model) or f"{file} is no file" in refusal(model)
        (model / file).unlink()
        (tmp_path / file).rename(model / file)
    check_model(str(model))


def test_a_link_to_itself_is_one_line_wherever_it_is_given(tmp_path, model, monkeypatch, capsys):
    (tmp_path / "loop").symlink_to("loop")
    for flags in (["--model_name", tmp_path / "loop"], ["--model_name", model, "--save_model", tmp_path / "loop/x"]):
        with pytest.raises(SystemExit, match="2"):
            run(*flags, monkeypatch=monkeypatch)
        assert capsys.readouterr().err.count("\n") == 1


def test_a_tokenizer_too_large_to_be_one_is_refused(model):
    os.truncate(model / "tokenizer.json", 2**29)
    assert "tokenizer.json has 536,870,912 bytes, more than a tokenizer" in refusal(model)


# Configs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", 10**18),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -3),
        ("num_hidden_layers", "4"),
        ("num_hidden_layers", 4.0),
        ("num_hidden_layers", True),
        ("hidden_size", 10**12),
        ("hidden_size", -32),
        ("vocab_size", 0),
        ("num_attention_heads", [4, "\x1b[31m", 4, 4]),
        ("num_local_experts", 10**9),
        ("max_position_embeddings", -1),
    ],
)
def test_sizes_that_are_none_or_absurd_are_refused_before_anything_is_built(name, value, model):
    change(model, **{name: value})
    assert f"config.json: {name} is " in refusal(model) and "not a number from" in refusal(model)
    with pytest.raises(InputError, match="not a number from"):  # of the hub, too, whose files are not here to check
        load_config(ModelSource(str(model)))
    change(model, **{name: None}, text_config={name: value})
    assert f"config.json: {name} is " in refusal(model)


def load_config_or_refuse(folder: Path) -> None:
    """Loads config, outline, tokenizer and weights; any error is one line."""
    source = ModelSource(str(folder), device="cpu")
    try:
        check_model(source.name)
        load_outline(load_config(source))
        load_tokenizer(source)
        load_model(source)
    except InputError as error:
        assert "\n" not in describe_failure(error)


@pytest.mark.parametrize(
    "content", [b"[" * 10**5, b'{"a":' * 10**5, b"[]", b"3", b"null", b"{", b"\xff\xfe{", b"", b" " * (2**24 + 1)]
)
def test_a_config_that_is_no_object_is_refused(content, model):
    (model / "config.json").write_bytes(content)
    assert "config.json cannot be read" in refusal(model) or "config.json holds no object" in refusal(model)


FIELDS = ("hidden_size", "num_hidden_layers", "model_type", "architectures", "rope_parameters", "hidden_act", "dtype")
FIELDS += ("tie_word_embeddings", "rms_norm_eps", "eos_token_id", "head_dim", "layer_types", "text_config", "auto_map")
FIELDS += ("per_layer_config", "quantization_config", "num_nextn_predict_layers", "vocab_size", "attention_bias")
VALUES = [None, True, -1, 0, 1, 2**31, 2**63, 1e308, "", "\x1b[2J", "llama", [], [0], ["x"] * 4, {}, {"a": {"b": []}}]


@hypothesis.settings(max_examples=40, derandomize=True, deadline=None, database=None)
@hypothesis.given(fields=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(VALUES), min_size=1, max_size=2))
def test_a_config_with_strange_values_is_refused_in_one_line_or_loaded(fields, tiny_folder, tmp_path_factory):
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("changed") / "model")
    load_config_or_refuse(change(folder, **fields))
    shutil.rmtree(folder)


def test_the_checks_of_files_need_no_torch():
    code = "import sys, lib.config.sources; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# Files that break while they are read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}", b"\x02" + bytes(7) + b"{}"]
)
@pytest.mark.parametrize(
    "file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_broken_file_is_one_line(file, content, model):
    (model / file).write_bytes(content)
    load_config_or_refuse(model)


@pytest.mark.parametrize("contents", [["e" * 10**5], ["ee"] * 40], ids=["long", "often"])
def test_a_tokenizer_that_makes_text_explode_is_refused(contents, model):
    path = model / "tokenizer.json"
    steps = [{"type": "Replace", "pattern": {"String": "e"}, "content": content} for content in contents]
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "normalizer": {"type": "Sequence", "normalizers": steps}})
    )
    with pytest.raises(InputError, match="can make text [0-9,]+ times as long; copy the model's own tokenizer.json"):
        load_tokenizer(ModelSource(str(model)))


def test_errors_of_safetensors_are_one_line_wherever_they_come_up():
    from safetensors import SafetensorError

    assert describe_failure(SafetensorError("I/O error:\nInput/output error (os error 5)")) == (
        "Input/output error; the disk or its connection has a fault; name a folder on another"
    )
