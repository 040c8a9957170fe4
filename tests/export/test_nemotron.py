"""`--save_format nemotron-nas` holds what vLLM asks for, and the pruned model; what does not fit is refused."""

import copy
import json
import pickle
from pathlib import Path

import accelerate
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.errors import InputError
from lib.export import nemotron_nas
from lib.export.huggingface import check_format, compact, how_to_load
from lib.models.decoder import Decoder
from lib.models.loading import load_config
from tests.command import run
from tests.export.vllm_reader import VllmReader
from tests.families import FAMILIES, tiny_model, tiny_windows

LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
MODELS = {
    "GQA": ("Llama", {}),
    "tied with biases": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3 rotary": ("Llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "linear rotary": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "FFN of a multiple of 256": ("Llama", {"intermediate_size": 256, "head_dim": 8}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {"use_sliding_window": False, "layer_types": None, "tie_word_embeddings": True}),
}
PLANS = {
    "whole": Plan(4, (0, 2), (0, 2)),
    "FFN": Plan(4, (), (0, 3)),
    "attention": Plan(4, (1, 3), ()),
    "mixed": Plan(4, (2, 1), (0, 2)),  # layer 0 without FFN, 1 without attention, 2 gone
    "none": Plan(4),
}
MIXED = PLANS["mixed"]


def _save(folder: Path, name: str = "GQA", plan: Plan = MIXED, **options) -> torch.nn.Module:
    """The model in memory after it was pruned and saved."""
    family, changes = MODELS[name]
    return _prune_and_save(tiny_model(family, **changes), folder, plan, **options)


def _prune_and_save(model: torch.nn.Module, folder: Path, plan: Plan = MIXED, **options) -> torch.nn.Module:
    nemotron_nas.check_plan(plan)
    compact(Decoder(model), plan)
    nemotron_nas.save(model, folder, **options)
    return model


def _reload(folder: Path) -> torch.nn.Module:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


# What is saved --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_vllm_and_transformers_read_the_pruned_model(name, plan, tmp_path):
    model, ids = _save(tmp_path, name, plan), tiny_windows(3)
    expected = model(input_ids=ids, use_cache=False).logits
    reader = VllmReader(tmp_path)
    torch.testing.assert_close(reader(ids), expected, rtol=0, atol=1e-5)
    assert reader.num_kv_heads == model.config.num_key_value_heads
    assert torch.equal(_reload(tmp_path)(input_ids=ids, use_cache=False).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_gives_the_logits_and_the_text_of_transformers(tied, plan, tmp_path):
    mlx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    sizes = {"intermediate_size": 256, "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": tied}
    model, ids = _prune_and_save(tiny_model("Llama", **sizes), tmp_path, plan), tiny_windows(3)
    assert "mlx-lm" in nemotron_nas.runtimes(json.loads((tmp_path / "config.json").read_text()))
    loaded, _ = utils.load_model(tmp_path)
    found = torch.tensor(loaded(mlx.array(ids.tolist())).tolist())
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=0, atol=2e-4)


def test_a_folder_says_what_runs_it(tmp_path):
    """SGLang drops biases, mlx-lm has heads of the hidden size by their number; both know `ffn_mult` only."""
    wide = {"intermediate_size": 512}
    expected = {
        "narrow": ({}, ["transformers", "vLLM"]),
        "wide": (wide, ["transformers", "vLLM", "SGLang", "mlx-lm"]),
        "biases": (wide | {"attention_bias": True}, ["transformers", "vLLM", "mlx-lm"]),
        "wide heads": (wide | {"head_dim": 16}, ["transformers", "vLLM", "SGLang"]),
    }
    for name, (sizes, runtimes) in expected.items():
        (tmp_path / name).mkdir()
        _prune_and_save(tiny_model("Llama", **sizes), tmp_path / name)
        assert nemotron_nas.runtimes(json.loads((tmp_path / name / "config.json").read_text())) == runtimes, name
        assert how_to_load(tmp_path / name).endswith(f"; runs in {', '.join(runtimes[1:])} too")


@torch.no_grad()
def test_a_reloaded_model_generates_with_a_cache_what_it_does_without(tmp_path):
    model, ids = _save(tmp_path, "Qwen2"), tiny_windows(2, 8)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, use_cache=False, **options)
    reloaded = _reload(tmp_path)
    for use_cache in (False, True):
        assert torch.equal(reloaded.generate(ids, use_cache=use_cache, **options), expected)


def test_half_precision_keeps_its_type_and_bits_in_shards(tmp_path):
    tiny_model("LlamaTied").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).eval()
    _prune_and_save(model, tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    saved, config = VllmReader(tmp_path).tensors, json.loads((tmp_path / "config.json").read_text())
    for name, tensor in saved.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, model.state_dict()[name])
    assert config["dtype"] == config["torch_dtype"] == "bfloat16" and _reload(tmp_path).dtype == torch.bfloat16


def test_the_config_says_what_each_layer_holds(tmp_path):
    model = _save(tmp_path, "llama3 rotary")
    config = json.loads((tmp_path / "config.json").read_text())
    attention, ffn = {"no_op": False, "n_heads_in_group": 2}, {"no_op": False, "intermediate_size": 48}
    assert config["block_configs"] == [
        {"attention": attention, "ffn": {"no_op": True, "intermediate_size": None}},
        {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": ffn},
        {"attention": attention, "ffn": ffn},
    ]
    assert config["rope_parameters"] == model.config.rope_parameters
    assert config["rope_theta"] == 500.0  # this and the next for the vLLM of transformers 4
    assert config["rope_scaling"] == {"rope_type": "llama3", **LLAMA3}
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 0)
    assert (tmp_path / "generation_config.json").exists()


def test_the_config_outlives_copies_pickles_and_being_saved(tmp_path):
    (tmp_path / "one").mkdir()
    _save(tmp_path / "one")
    config = AutoConfig.from_pretrained(tmp_path / "one", trust_remote_code=True)
    config.save_pretrained(tmp_path / "two")
    again = AutoConfig.from_pretrained(tmp_path / "two", trust_remote_code=True)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config)(**config.to_dict()), again):
        assert other.block_configs == config.block_configs and other.rope_parameters == config.rope_parameters
        assert [block.attention.no_op for block in other.block_configs] == [False, True, False]
        assert not hasattr(other.block_configs[0].ffn, "ffn_mult")


@torch.no_grad()
def test_a_reloaded_model_can_be_saved_and_loaded_again(tmp_path):
    (tmp_path / "one").mkdir()
    model, ids = _save(tmp_path / "one", "Qwen2"), tiny_windows(1)
    _reload(tmp_path / "one").save_pretrained(tmp_path / "two")
    assert torch.equal(_reload(tmp_path / "two")(input_ids=ids).logits, model(input_ids=ids).logits)
    VllmReader(tmp_path / "two")


def test_files_that_travel_import_torch_and_transformers_besides_the_standard_library(tmp_path):
    _save(tmp_path)
    for path in tmp_path.glob("*.py"):
        imports = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(("import ", "from "))]
        assert {name.split(".")[0] for name in imports} <= {"torch", "transformers", "functools", "inspect", ""}


# What is refused ------------------------------------------------------------------------------------------------------

REASONS = {
    "Mistral": "sliding_window",
    "Qwen2": "sliding_attention",
    "Qwen3": "not have the parameters of a Llama .*k_norm",
    "Gemma": "activation is gelu_pytorch_tanh",
    "Gemma2": "no hidden_act",
    "Gemma3": "no hidden_act",
    "Phi": "no rms_norm_eps",
    "Phi3": "not have the parameters of a Llama .*gate_proj",
    "OPT": "no num_key_value_heads",
    "GPTNeoX": "no num_key_value_heads",
    "GPTNeoXSerial": "no num_key_value_heads",
    "Olmo2": "not have the parameters of a Llama .*layernorm",
    "Granite": "gives other logits than a Llama",
    "Falcon": "no num_key_value_heads",
    "FalconSerial": "no num_key_value_heads",
    "GPT2": "no num_key_value_heads",
    "Mixtral": "not have the parameters of a Llama .*mlp",
}


def _refused(model: torch.nn.Module, reason: str) -> None:
    with pytest.raises(InputError, match=f"^--save_format nemotron-nas: .*{reason}.*; use --save_format hf$"):
        nemotron_nas.check_model(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_no_llama_are_refused_with_the_reason(family):
    if family in REASONS:
        _refused(tiny_model(family), REASONS[family])
    else:
        nemotron_nas.check_model(tiny_model(family))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("Gemma", {"hidden_act": "silu"}, "gives other logits"),  # norms that multiply by 1 + weight
        ("Llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary"),
        (
            "Llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "rotary",
        ),
        ("Mistral", {"sliding_window": None, "head_dim": 16, "hidden_size": 36, "num_attention_heads": 8}, "multiple"),
    ],
)
def test_what_only_looks_like_a_llama_is_refused(family, changes, reason):
    _refused(tiny_model(family, **changes), reason)


def test_rotary_frequencies_of_another_kind_are_refused():
    model = tiny_model("Llama")
    model.model.rotary_emb.inv_freq *= 1.001
    _refused(model, "rotary frequencies")


def test_weights_elsewhere_are_refused():
    model = tiny_model("Llama")
    model.lm_head.to("meta")
    _refused(model, "offloaded")


def test_a_first_layer_without_attention_is_refused_before_anything_is_written(tmp_path):
    for plan in (Plan(4, (0,), ()), Plan(4, (0, 1), (0,))):
        with pytest.raises(InputError, match="attention in the first layer"):
            nemotron_nas.check_plan(plan)
        model = tiny_model("Llama")
        compact(Decoder(model), plan)
        with pytest.raises(InputError, match="attention in the first layer"):
            nemotron_nas.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_checking_leaves_the_model_as_it_was():
    model = tiny_model("LlamaTied")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    nemotron_nas.check_model(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_every_attention_kernel_is_held_against_itself(kernel):
    model = tiny_model("Llama")
    model.set_attn_implementation(kernel)
    nemotron_nas.check_model(model)


def test_a_model_spread_over_devices_is_checked_where_it_is(monkeypatch):
    model, maps = tiny_model("Llama"), []
    model.hf_device_map = {"": "cpu"}
    monkeypatch.setattr(accelerate, "dispatch_model", lambda llama, device_map: maps.append(device_map))
    nemotron_nas.check_model(model)
    assert maps == [model.hf_device_map]


# The command line -----------------------------------------------------------------------------------------------------


def test_a_run_saves_for_vllm(arguments, tmp_path, monkeypatch, capsys):
    flags = ["--save_model", tmp_path / "out", "--save_format", "nemotron-nas"]
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 0
    assert 'out", trust_remote_code=True)' in capsys.readouterr().out
    result = json.loads((tmp_path / "run/result.json").read_text())
    reader, parameters = VllmReader(tmp_path / "out"), result["parameters"]
    blocks = reader.config.block_configs
    assert len(blocks) == 3 and sum(block.ffn.no_op for block in blocks) == 1
    assert sum(tensor.numel() for tensor in reader.tensors.values()) < parameters["total"] - parameters["removed"]
    assert (tmp_path / "out/tokenizer.json").exists()


def test_what_does_not_fit_is_refused_before_a_run(arguments, tmp_path, monkeypatch, capsys, demo_tokenizer):
    tiny_model("Qwen3", vocab_size=len(demo_tokenizer)).save_pretrained(tmp_path / "model")
    demo_tokenizer.save_pretrained(tmp_path / "model")
    flags = ["--model_name", tmp_path / "model", "--save_model", tmp_path / "out", "--save_format", "nemotron-nas"]
    assert run(*arguments, *flags, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "use --save_format hf" in told and not (tmp_path / "run").exists()


def test_a_first_layer_without_attention_is_refused_before_a_search_and_before_a_plan_is_applied(tmp_path):
    compact(decoder := Decoder(tiny_model("Llama")), Plan(4, (0,)))
    decoder = Decoder(decoder.model)
    for plan in None, Plan(4), Plan(4, (1,)):
        with pytest.raises(InputError, match="attention in the first layer that stays"):
            check_format(decoder, "nemotron-nas", plan)
    check_format(decoder, "nemotron-nas", Plan(4, (), (0,)))  # what is left of the first layer goes
    compact(decoder := Decoder(tiny_model("Llama")), Plan(4, (1,)))
    decoder = Decoder(decoder.model)
    check_format(decoder, "nemotron-nas")
    with pytest.raises(InputError, match="attention in the first layer that stays.*--apply_plan"):
        check_format(decoder, "nemotron-nas", Plan(4, (0,), (0,)))  # 1 becomes the first


def test_the_folder_is_not_pruned_again(tmp_path):
    compact(decoder := Decoder(tiny_model("Llama")), MIXED)
    nemotron_nas.save(decoder.model, tmp_path)
    with pytest.raises(InputError, match="format nemotron-nas; give the model saved as hf"):
        load_config(ModelSource(str(tmp_path), trust_remote_code=True))
