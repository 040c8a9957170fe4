"""A checkpoint is loaded whole or refused: nothing of it is left out or made up, and harmless extras do not stop it."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lib.config.sources import ModelSource
from lib.errors import InputError
from lib.models.loading import load_model
from tests.families import FAMILIES, tiny_model

LAYERS = {
    "OPT": "model.decoder.layers",
    "GPTNeoX": "gpt_neox.layers",
    "Falcon": "transformer.h",
    "GPT2": "transformer.h",
}


def _save(family: str, folder: Path, config: dict | None = None, weights: dict | None = None, **changes) -> Path:
    """A checkpoint of a tiny model whose config or weights are changed on disk; None removes an entry."""
    tiny_model(family, **changes).save_pretrained(folder)
    for path, new in (folder / "config.json", config), (folder / "model.safetensors", weights):
        if new:
            held = json.loads(path.read_text()) if path.suffix == ".json" else load_file(path)
            held = {key: value for key, value in {**held, **new}.items() if value is not None}
            path.write_text(json.dumps(held)) if path.suffix == ".json" else save_file(held, path, {"format": "pt"})
    return folder


def _refusal(folder: Path) -> str:
    with pytest.raises(InputError) as raised:
        load_model(ModelSource(str(folder), device="cpu"))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("family", ["Llama", "OPT", "GPTNeoX", "Falcon", "GPT2", "Mixtral"])
def test_more_layers_than_the_config_has_are_refused_by_name(family, tmp_path):
    number = "n_layer" if family == "GPT2" else "num_hidden_layers"
    told = _refusal(_save(family, tmp_path / "model", {number: 3}))
    assert "weights that its config has no place for" in told and f"{LAYERS.get(family, 'model.layers')}.3." in told


def test_more_layers_are_found_in_a_checkpoint_without_the_prefix_of_the_model(tmp_path):
    folder = _save("Llama", tmp_path / "model", {"num_hidden_layers": 3})
    weights = {name.removeprefix("model."): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert "9 weights that its config has no place for (layers.3.input_layernorm.weight" in _refusal(folder)


def test_biases_and_norms_that_the_config_does_not_have_are_refused_by_name(tmp_path):
    told = _refusal(_save("LlamaTied", tmp_path / "biases", {"attention_bias": False}))
    assert "has 16 weights that its config has no place for (model.layers.0.self_attn.k_proj.bias" in told
    told = _refusal(_save("Llama", tmp_path / "norm", weights={"model.norm.bias": torch.ones(32)}))
    assert "has 1 weights that its config has no place for (model.norm.bias" in told
    told = _refusal(_save("Llama", tmp_path / "q", weights={"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    assert "q_norm" in told


def test_scales_of_a_quantization_that_the_config_does_not_mention_are_refused(tmp_path):
    scale = {"model.layers.0.mlp.up_proj.weight_scale_inv": torch.ones(1, 1)}
    assert "up_proj.weight_scale_inv" in _refusal(_save("Llama", tmp_path / "model", weights=scale))


def test_weights_of_another_size_are_refused_with_both_sizes(tmp_path):
    told = _refusal(_save("Llama", tmp_path / "model", {"intermediate_size": 40}))
    assert "12 weights have another size" in told and "[32, 48] in the checkpoint and [32, 40] by the config" in told


def test_sizes_that_the_files_cannot_hold_are_refused_before_memory_is_taken(tmp_path):
    told = _refusal(_save("Llama", tmp_path / "model", {"vocab_size": 10**7, "hidden_size": 2**15}))
    assert "bytes of weights cannot hold" in told and "config.json" in told


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"]),
        (
            "Llama",
            ["model.vision_tower.encoder.layers.7.mlp.fc1.bias", "visual.blocks.0.qkv.weight", "v_head.bias"],
        ),
        ("Llama", ["mtp.layers.0.self_attn.q_proj.weight", "mtp.fc.weight", "multi_modal_projector.linear_1.weight"]),
        ("GPT2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias", "h.1.attn.masked_bias"]),
        ("GPTNeoX", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.masked_bias"]),
        ("LlamaTied", ["lm_head.weight"]),
    ],
)
def test_buffers_of_old_checkpoints_and_parts_that_are_no_decoder_do_no_harm(family, more, tmp_path):
    model = tiny_model(family)
    weights = {name: model.get_input_embeddings().weight if "lm_head" in name else torch.ones(2) for name in more}
    load_model(ModelSource(str(_save(family, tmp_path / "model", weights=weights)), device="cpu"))


def test_the_text_part_of_a_multimodal_checkpoint_is_loaded_alone(tmp_path):
    text = dict(vocab_size=96, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=2)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28)
    vision |= dict(patch_size=14, vision_output_dim=32, projector_input_dim=32, projector_output_dim=32)
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(tmp_path)
    assert any(name.startswith("vision_model.") for name in load_file(tmp_path / "model.safetensors"))
    assert type(load_model(ModelSource(str(tmp_path), device="cpu"))).__name__ == "Llama4ForCausalLM"


def test_layers_that_predict_further_tokens_do_no_harm(tmp_path):
    folder = _save("Llama", tmp_path / "model", {"num_hidden_layers": 3, "num_nextn_predict_layers": 1})
    assert len(load_model(ModelSource(str(folder), device="cpu")).model.layers) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was_saved(family, tmp_path):
    load_model(ModelSource(str(_save(family, tmp_path / "model")), device="cpu"))
