"""Saved models load in stock transformers and are the pruned model in memory."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    Qwen2_5_VLConfig,
)
from transformers import LlamaForCausalLM as Llama

from lib.config.plan import Mode, Plan
from lib.config.sources import ModelSource
from lib.errors import InputError, RunError
from lib.export.huggingface import check_format, how_to_load, save_pruned, save_weights
from lib.export.reload import SaveError
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from tests.families import FAMILIES, HYBRID_FAMILIES, tiny_model, tiny_windows

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))  # layer 0 without attention, 1 without FFN, 2 gone
WHOLE = Plan(4, mha_removed=(2,), ffn_removed=(2,))


def _reload(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


def _generate(model, ids, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)


@torch.no_grad()
@pytest.mark.parametrize("plan", [MIXED, WHOLE], ids=["mixed", "whole"])
@pytest.mark.parametrize("save_format", ["hf", "masked"])
@pytest.mark.parametrize("family", [*FAMILIES, *HYBRID_FAMILIES])
def test_reloaded_models_are_the_pruned_one_and_generate_with_a_cache(family, save_format, plan, tmp_path):
    model, ids = tiny_model(family), tiny_windows(3)
    decoder = Decoder(model)
    left = decoder.total_parameters - decoder.removed_parameters(plan)
    decoder.apply(plan)
    expected = model(input_ids=ids, use_cache=False).logits
    save_pruned(decoder, plan, None, tmp_path / "out", save_format)
    reloaded = _reload(tmp_path / "out")
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    assert torch.equal(reloaded(input_ids=ids).logits, expected)
    if save_format == "hf":
        assert sum(parameter.numel() for parameter in reloaded.parameters()) == left
    uncached = _generate(reloaded, ids, use_cache=False)
    for which in (reloaded, model):
        assert torch.equal(_generate(which, ids, use_cache=True), uncached)


def test_whole_layers_leave_a_stock_checkpoint(tmp_path):
    save_pruned(Decoder(tiny_model("Gemma2")), WHOLE, None, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert not list((tmp_path / "out").glob("*.py"))
    assert config["architectures"] == ["Gemma2ForCausalLM"] and config["num_hidden_layers"] == 3
    assert config["layer_types"] == ["sliding_attention", "full_attention", "full_attention"]
    assert "per_layer_config" not in config and "auto_map" not in config
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # no remote code


def test_partly_pruned_layers_are_listed_in_the_config(tmp_path):
    save_pruned(Decoder(tiny_model("Llama")), MIXED, None, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    skipped = {int(layer): entry for layer, entry in config["per_layer_config"].items()}
    assert skipped == {0: {"skip": ["attention"]}, 1: {"skip": ["mlp"]}}
    assert config["num_hidden_layers"] == 3
    assert config["auto_map"] == {
        "AutoConfig": "modeling_pruned.PrunedLlamaConfig",
        "AutoModelForCausalLM": "modeling_pruned.PrunedLlamaForCausalLM",
    }
    assert config["architectures"] == ["PrunedLlamaForCausalLM"] and config["model_type"] == "pruned_llama"


def test_a_masked_model_is_the_stock_architecture_at_full_size(tmp_path):
    model = tiny_model("OPT")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    save_pruned(Decoder(model), MIXED, None, tmp_path / "out", "masked")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {name: parameter.shape for name, parameter in reloaded.named_parameters()} == shapes
    layer = reloaded.model.decoder.layers[1]
    assert not layer.fc2.weight.any() and not layer.fc2.bias.any() and layer.fc1.weight.any()


@pytest.mark.parametrize("family", ["Llama", "LlamaTied"])
def test_sharded_and_tied_checkpoints(family, tmp_path):
    model, ids = tiny_model(family), tiny_windows(1)
    save_pruned(Decoder(model), MIXED, None, tmp_path / "out", max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    reloaded = _reload(tmp_path / "out")
    assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)
    tied = reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()
    assert tied == (family == "LlamaTied")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_can_be_saved_and_loaded_again(family, tmp_path):
    model, ids = tiny_model(family), tiny_windows(1)
    save_pruned(Decoder(model), MIXED, None, tmp_path / "one")
    _reload(tmp_path / "one").save_pretrained(tmp_path / "two")
    expected = model(input_ids=ids).logits
    assert torch.equal(_reload(tmp_path / "two")(input_ids=ids).logits, expected)
    assert torch.equal(load_model(ModelSource(str(tmp_path / "two")))(input_ids=ids).logits, expected)


def test_half_precision_stays(tmp_path):
    tiny_model("Llama").save_pretrained(tmp_path / "dense")
    model, ids = _reload(tmp_path / "dense", dtype=torch.bfloat16), tiny_windows(1)
    model.requires_grad_(False)
    save_pruned(Decoder(model), MIXED, None, tmp_path / "out")
    reloaded = _reload(tmp_path / "out", dtype="auto")
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_tokenizer_and_generation_config_travel_along(tmp_path, demo_tokenizer):
    model = tiny_model("Llama", vocab_size=len(demo_tokenizer))
    model.generation_config.max_new_tokens = 7
    save_pruned(Decoder(model), MIXED, demo_tokenizer, tmp_path / "out")
    text = "The quick brown fox"
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == demo_tokenizer(text).input_ids
    assert _reload(tmp_path / "out").generation_config.max_new_tokens == 7


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Gemma2", "OPT"])
def test_padded_batches_generate_what_their_rows_do(family, tmp_path):
    save_pruned(Decoder(tiny_model(family)), MIXED, None, tmp_path / "out")
    model, ids = _reload(tmp_path / "out"), tiny_windows(2, 8)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :4]], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = model.generate(torch.cat([padded, ids[1:]]), attention_mask=mask, **options)
    assert torch.equal(batch[0, 8:], _generate(model, ids[:1, :4], max_new_tokens=8)[0, 4:])
    assert torch.equal(batch[1], _generate(model, ids[1:], max_new_tokens=8)[0])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_offloaded_weights_are_saved_pruned_or_refused(tmp_path):
    tiny_model("Llama").save_pretrained(tmp_path / "dense")
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {f"model.layers.{i}": "cpu" if i < 2 else "disk" for i in range(4)}

    def offloaded():
        options = {"device_map": device_map, "offload_folder": tmp_path / "offload"}
        return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **options).eval()

    decoder, ids = Decoder(offloaded()), tiny_windows(1)
    with pytest.raises(InputError, match="offloaded"):
        check_format(decoder, "masked")
    plan = Plan(4, (3,), (1, 3))
    save_pruned(decoder, plan, None, tmp_path / "out")
    dense = Decoder(tiny_model("Llama"))
    dense.apply(plan)
    assert torch.equal(_reload(tmp_path / "out")(input_ids=ids).logits, dense.model(input_ids=ids).logits)
    with pytest.raises(RunError, match="a device map offloaded"):
        save_pruned(Decoder(offloaded()), plan, None, tmp_path / "masked", "masked")


@pytest.mark.parametrize(
    ("family", "fields"),
    [("GPT2", dict(scale_attn_by_inverse_layer_idx=True)), ("DeepseekV3", dict(first_k_dense_replace=1))],
)
def test_layers_that_are_built_by_their_number_keep_it_and_removed_ones_are_empty(family, fields, tmp_path):
    """GPT-2 can scale attention by the layer's number, and the first layers of a mixture of experts may be dense."""
    decoder, ids, plan = Decoder(tiny_model(family, **fields)), tiny_windows(1), Plan(4, (0, 2), (0, 2, 3))
    with decoder.under(plan):
        expected = decoder.model(input_ids=ids, use_cache=False).logits
    left = decoder.total_parameters - decoder.removed_parameters(plan)
    save_pruned(decoder, plan, None, tmp_path / "out")
    saved = _reload(tmp_path / "out")
    aligned = copy.deepcopy(saved)  # as the dense model's weights; those in a file are not, which rounds otherwise
    assert torch.equal(aligned(input_ids=ids, use_cache=False).logits, expected)
    assert saved.num_parameters() == left and saved.config.num_hidden_layers == 4
    again = Decoder(load_model(ModelSource(str(tmp_path / "out"))))
    assert again.given_modes == [Mode(False, False), Mode(), Mode(False, False), Mode(ffn=False)]
    save_pruned(again, Plan(4, ffn_removed=(1,)), None, tmp_path / "again")
    assert Decoder(load_model(ModelSource(str(tmp_path / "again")))).given_modes[1] == Mode(ffn=False)


def test_a_model_that_a_reload_would_change_is_refused(tmp_path, monkeypatch):
    decoder, rebuilt = Decoder(tiny_model("Llama")), Llama.__init__

    def other(self, config):
        rebuilt(self, config)
        self.model.layers[0].self_attn.scaling = 2.0

    monkeypatch.setattr(Llama, "__init__", other)
    with pytest.raises(SaveError, match="a reload would have 0.self_attn.scaling = 2.0 in place of"):
        save_pruned(decoder, WHOLE, None, tmp_path / "out")


IMAGE, START, END = 90, 91, 92  # special tokens of the model below


@pytest.fixture
def sees_images(tmp_path) -> Callable[[], Decoder]:
    """Loads a tiny Gemma 3 with a vision tower, as 4B and more have, from a folder with a file of its processor."""
    text = {**FAMILIES["Gemma3"][1], "num_hidden_layers": 4, "hidden_size": 32, "intermediate_size": 48}
    text |= {"vocab_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model/preprocessor_config.json").write_text('{"image_size": 28}')
    return lambda: Decoder(load_model(ModelSource(str(tmp_path / "model"))))


@torch.no_grad()
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModelForImageTextToText])
@pytest.mark.parametrize("plan, save_format", [(MIXED, "hf"), (WHOLE, "hf"), (MIXED, "masked"), (None, "weights")])
def test_a_saved_model_of_more_than_text_still_sees_images(sees_images, plan, save_format, loader, tmp_path):
    ids = tiny_windows(1) % 90
    ids[0, 2:6] = IMAGE
    image = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == IMAGE).long(), "use_cache": False}
    decoder = sees_images()
    with decoder.under(plan or Plan(4)):
        expected = decoder.model(input_ids=ids, **image).logits
    if plan:
        save_pruned(decoder, plan, None, tmp_path / "out", save_format)
    else:
        save_weights(decoder, None, tmp_path / "out")
    saved = loader.from_pretrained(tmp_path / "out", trust_remote_code=plan is MIXED and save_format == "hf").eval()
    assert torch.allclose(saved(input_ids=ids, **image).logits, expected, atol=1e-6)
    assert not torch.allclose(saved(input_ids=ids % 90, use_cache=False).logits, expected, atol=1e-2)
    assert (tmp_path / "out/preprocessor_config.json").read_text() == '{"image_size": 28}'


def test_a_model_of_images_alone_in_its_class_is_loaded_and_saved_too(tmp_path, demo_tokenizer):
    """As Qwen2.5-VL, which transformers does not list among the models for text."""
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    text |= dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2)
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32)
    model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path / "model")
    decoder = Decoder(load_model(ModelSource(str(tmp_path / "model"))))
    with decoder.under(MIXED):
        expected = decoder.model(input_ids=tiny_windows(1), use_cache=False).logits
    save_pruned(decoder, MIXED, None, tmp_path / "out")
    assert how_to_load(tmp_path / "out").startswith("AutoModelForImageTextToText")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert torch.equal(saved(input_ids=tiny_windows(1), use_cache=False).logits, expected)
    assert Decoder(load_model(ModelSource(str(tmp_path / "out")))).given_modes[0] == Mode(attention=False)
