"""`--gguf_weights`: the GGUF file of a pruned model that any tool has trained since; no weight is left out."""

import copy
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.config.plan import Plan
from lib.export.gguf import apply_plan
from lib.export.gguf_changed import Trained
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from tests.command import run

pytest.importorskip("gguf")

from tests.export.gguf_writer import write_gguf  # noqa: E402
from tests.export.test_gguf_changed import PLAN, _saved, _tensors, _tiny  # noqa: E402


@torch.no_grad()
def _train(model: torch.nn.Module) -> torch.nn.Module:
    """The model with other values in all of its weights, norms, biases and embeddings too."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def _trained_folder(model: torch.nn.Module, folder: Path, save_format: str = "hf", plan: Plan = PLAN) -> Path:
    """What a trainer leaves of a pruned model: config and weights, no plan."""
    folder.mkdir()
    save_pruned(Decoder(copy.deepcopy(model)), plan, None, folder, save_format)
    return folder


@pytest.mark.parametrize(
    ("save_format", "sizes"),
    [
        ("hf", {"num_key_value_heads": 2}),
        ("hf", {"attention_bias": True, "mlp_bias": True}),
        ("hf", {"tie_word_embeddings": True}),
        ("masked", {}),
        ("nemotron-nas", {}),
        ("dense", {}),
    ],
)
def test_gguf_weights_gives_the_file_that_the_trained_model_would_have_been_pruned_to(
    save_format, sizes, tmp_path, monkeypatch, capsys
):
    trained = _train(_tiny(**sizes))
    result = _saved(_tiny(**sizes), tmp_path)
    plan = Plan(4) if save_format == "dense" else PLAN
    folder = _trained_folder(trained, tmp_path / "trained", save_format.replace("dense", "hf"), plan)
    source, written = write_gguf(_tiny(**sizes), tmp_path / "in.gguf", kind="F16"), tmp_path / "out.gguf"
    flags = ["--apply_plan", result, "--gguf", source, written, "--gguf_weights", folder]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    apply_plan(write_gguf(trained, tmp_path / "trained.gguf", kind="F16"), tmp_path / "same.gguf", PLAN)
    found, same = _tensors(written), _tensors(tmp_path / "same.gguf")
    assert list(found) == list(same)
    differing = {name for name in found if found[name].data.tobytes() != same[name].data.tobytes()}
    assert not differing - {"blk.1.ffn_norm.weight"}, "the norm before a removed FFN may be that of the given file"
    assert f"tensors from {folder}: " in capsys.readouterr().out


def test_a_trainer_that_saves_tied_embeddings_twice_changes_nothing(tmp_path):
    trained = _train(_tiny(tie_word_embeddings=True))
    source = write_gguf(trained, tmp_path / "in.gguf")
    folder = _trained_folder(trained, tmp_path / "trained")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    apply_plan(source, tmp_path / "out.gguf", PLAN, changed=Trained(folder, PLAN))
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("adapter", "holds a PEFT adapter"),
        ("no weights", "holds no weights in safetensors; give the folder of the trained model"),
        ("broken", "cannot be read as safetensors"),
        ("no config", "the plan does not fit its config.json"),
        ("another plan", "leaves 3 of 4 layers, and the model has 2"),
        ("more tokens", r"tensor token_embd.weight is \[32, 64\], and \[32, 72\] in"),
        ("biases", "has no tensor for model.layers.0.self_attn.k_proj.bias of"),
        ("untied", "has no tensor for lm_head.weight of"),
        ("twice", "has no tensor for other.norm.weight of"),
        ("a weight less", "tensor output_norm.weight is in no file of"),
    ],
)
def test_a_folder_whose_weights_have_no_place_is_refused(case, reason, tmp_path, monkeypatch, capsys):
    sizes = {"tie_word_embeddings": True, "vocab_size": 64}
    result, source = _saved(_tiny(**sizes), tmp_path), write_gguf(_tiny(**sizes), tmp_path / "in.gguf")
    sizes |= {
        "more tokens": {"vocab_size": 72},
        "biases": {"attention_bias": True},
        "untied": {"tie_word_embeddings": False},
    }.get(case, {})
    plan = Plan(4, (1, 2), (1, 2)) if case == "another plan" else PLAN
    folder = _trained_folder(_tiny(**sizes), tmp_path / "trained", plan=plan)
    weights = folder / "model.safetensors"
    if case == "adapter":
        (folder / "adapter_config.json").write_text("{}")
    elif case == "no weights":
        weights.rename(tmp_path / "elsewhere")
    elif case == "broken":
        weights.write_bytes(weights.read_bytes()[:40])
    elif case == "no config":
        (folder / "config.json").unlink()
    elif case in ("a weight less", "twice"):
        held = load_file(weights)
        norm = held["model.norm.weight"] if case == "twice" else held.pop("model.norm.weight")
        save_file(held | ({"other.norm.weight": norm.clone()} if case == "twice" else {}), weights)
    flags = ["--apply_plan", result, "--gguf", source, tmp_path / "out.gguf", "--gguf_weights", folder]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert re.search(reason, error) and error.count("\n") == 1 and not (tmp_path / "out.gguf").exists()


def test_gguf_weights_needs_the_files(tmp_path, monkeypatch, capsys):
    flags = ["--apply_plan", _saved(_tiny(), tmp_path), "--gguf_weights", tmp_path / "out"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    assert "--gguf_weights: needs --gguf IN OUT" in capsys.readouterr().err
