"""Saves pruned Llama-like models for vLLM, as its `DeciLMForCausalLM` (model type nemotron-nas).

The format follows vllm/model_executor/models/nemotron_nas.py: `block_configs` describes each layer, a removed sublayer
has neither weights nor a norm, and everything else is a Llama. vLLM reads the blocks as attributes, so the folder
carries a config class (`--trust-remote-code`). A model class lets transformers load it too.

SGLang (python/sglang/srt/models/nemotron_nas.py) and mlx-lm (mlx_lm/models/nemotron-nas.py) know the width of an FFN
only as `ffn_mult`, from which they and vLLM make a multiple of 256. So a width that is one is written in that way, and
any other as `intermediate_size`, which vLLM alone reads.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import lib.models.modeling_pruned as modeling_pruned
from lib.config.plan import Plan
from lib.errors import InputError
from lib.export.templates import DECILM_CONFIGURATION, DECILM_MODELING
from lib.models.modeling_pruned import SkippedAttention, SkippedFFN
from lib.models.offload import Ahead, OffloadedLayer, fetched_by_forward, layers_of, offloaded
from lib.storage.atomic import write_json

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "rope_parameters",
)
_OPTIONAL = ("head_dim", "bos_token_id", "eos_token_id", "pad_token_id")

# Rotary embeddings that vLLM and transformers compute alike at every length, with all their parameters.
_ROTARY = {
    "default": {"rope_theta"},
    "linear": {"rope_theta", "factor"},
    "llama3": {"rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}

_MULTIPLE = 256  # of which a width is made from `ffn_mult`

_WITH_PLAN = " (after a search: with --apply_plan result.json, which searches no more)"

# Checking -------------------------------------------------------------------------------------------------------------


def check_plan(plan: Plan) -> None:
    """Raises `InputError` for a plan under which the first remaining layer has no attention."""
    first = plan.kept_layers[0]
    if not plan.mode(first).attention:
        raise _refusal(f"vLLM needs attention in the first layer that stays, and layer {first} has lost it", _WITH_PLAN)


def check_config(config: PreTrainedConfig) -> None:
    """Raises `InputError` for a config unlike a Llama's, or with attention windows or another rotary embedding."""
    entries = (config.to_dict().get("per_layer_config") or {}).values()
    if own := sorted({name for entry in entries for name in entry} - {"skip"}):
        raise _refusal(f"all layers must be alike, and the config has {', '.join(own)} for single ones")
    missing = next((name for name in _NEEDED if getattr(config, name, None) is None), None)
    if missing:
        raise _refusal(f"the model must be like a Llama, and {type(config).__name__} has no {missing}")
    if config.hidden_act != "silu":
        raise _refusal(f"vLLM computes SiLU, and the model's activation is {config.hidden_act}")
    windows = {name for name in ("sliding_window", "attention_chunk_size") if getattr(config, name, None)}
    windows |= set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if windows:
        raise _refusal(f"every token must see all before it, and the config has {', '.join(sorted(windows))}")
    rotary = _rotary(config)
    if rotary.keys() != {"rope_type"} | _ROTARY.get(rotary.get("rope_type", ""), set()):
        raise _refusal(f"the rotary embedding must be plain {', '.join(_ROTARY)}, and the config has {rotary}")


@torch.no_grad()
def check_model(model: PreTrainedModel) -> None:
    """Raises `InputError` unless the model, dense or compacted, is a Llama in all but name.

    A Llama built from the model's own tensors must give bit-identical logits on a short input. `check_config` covers
    what a short input cannot show: attention windows, and rotary embeddings that depend on the length.
    """
    if any(p.is_meta for p in model.parameters()) and not any(map(offloaded, layers_of(model))):
        raise _refusal("a device map offloaded the weights")
    check_config(model.config)
    llama = _as_llama(model)
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    ids = ids.to(embedding.device)
    with fetched_by_forward([*layers_of(model), *llama.model.layers]):
        logits, expected = (each(input_ids=ids, use_cache=False).logits for each in (model, llama))
    if not torch.equal(logits, expected):
        raise _refusal(f"{type(model).__name__} gives other logits than a Llama with its weights")


def _refusal(reason: str, how: str = "") -> InputError:
    return InputError(f"--save_format nemotron-nas: {reason}; use --save_format hf{how}")


def _as_llama(model: PreTrainedModel) -> LlamaForCausalLM:
    """A Llama that shares the tensors of the model. Raises `InputError` when they are not those of a Llama."""
    fields = _llama_fields(model)
    qkv_bias, out_bias = fields.pop("qkv_bias"), fields.pop("attention_bias")
    try:
        config = LlamaConfig(**fields, attention_bias=qkv_bias or out_bias)
    except StrictDataclassError as error:
        raise _refusal(f"a Llama cannot have its config ({str(error).splitlines()[-1].strip()})") from error
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        llama = LlamaForCausalLM(config).eval()
    for layer, (no_attention, no_ffn) in zip(llama.model.layers, _missing(model), strict=True):
        for name, has_bias in {"q_proj": qkv_bias, "k_proj": qkv_bias, "v_proj": qkv_bias, "o_proj": out_bias}.items():
            if not has_bias:
                getattr(layer.self_attn, name).bias = None
        if no_attention:
            layer.self_attn = SkippedAttention()
        if no_ffn:
            layer.mlp = SkippedFFN()
    _share_tensors(model, llama)
    return llama


def _share_tensors(model: PreTrainedModel, llama: LlamaForCausalLM) -> None:
    """Puts the model's tensors into a Llama on the meta device; each stays on its own device."""
    given = model.state_dict()
    shapes, wanted = ({name: tuple(t.shape) for name, t in state.items()} for state in (given, llama.state_dict()))
    strange = sorted(name for name, _ in shapes.items() ^ wanted.items())
    if strange:
        raise _refusal(f"{type(model).__name__} does not have the parameters of a Llama ({strange[0]})")
    llama.load_state_dict(given, assign=True)
    # Rotary frequencies are not in the state dict, and devices round them differently: compare them, then share them.
    llama.model.rotary_emb = rotary = LlamaRotaryEmbedding(llama.config)
    frequencies = getattr(getattr(model.model, "rotary_emb", None), "inv_freq", torch.zeros(0))
    near = frequencies.shape == rotary.inv_freq.shape
    if not near or not torch.allclose(frequencies.float().cpu(), rotary.inv_freq, rtol=1e-5, atol=0):
        raise _refusal(f"{type(model).__name__} does not have the rotary frequencies of a Llama")
    rotary.register_buffer("inv_freq", frequencies, persistent=False)
    ahead: Ahead | None = None
    for index, layer in enumerate(layers_of(model)):
        if weights := offloaded(layer):
            ahead = ahead or Ahead(weights.device)
            OffloadedLayer(llama.model.layers[index], index, weights.device, weights, ahead)
    is_offloaded = any(map(offloaded, layers_of(model)))
    if hasattr(model, "hf_device_map") and not is_offloaded:  # over several devices: inputs move, weights stay
        from accelerate import dispatch_model

        dispatch_model(llama, model.hf_device_map)


# Saving ---------------------------------------------------------------------------------------------------------------


def save(model: PreTrainedModel, folder: Path, max_shard_size: str = "5GB") -> None:
    """Writes a compacted model into an existing folder: shards, configs and the code that loads them.

    Raises `InputError` as `check_model` and `check_plan` do, before it writes anything.
    """
    check_model(model)
    lost = _missing(model)
    check_plan(
        Plan(len(lost), mha_removed=tuple(index for index, (no_attention, _) in enumerate(lost) if no_attention))
    )
    tensors, fields = model.state_dict(), _llama_fields(model)
    if fields["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for index, missing in enumerate(lost):
        for norm, is_missing in zip(("input_layernorm", "post_attention_layernorm"), missing, strict=True):
            if is_missing:
                del tensors[f"model.layers.{index}.{norm}.weight"]
    _save_tensors(model, tensors, folder, max_shard_size)
    write_json(folder / "config.json", fields | _nas_fields(model))
    (folder / "configuration_decilm.py").write_text(DECILM_CONFIGURATION, encoding="utf-8")
    source = Path(modeling_pruned.__file__).read_text(encoding="utf-8")
    (folder / "modeling_decilm.py").write_text(source + DECILM_MODELING, encoding="utf-8")
    model.generation_config.save_pretrained(folder)


def _save_tensors(model: PreTrainedModel, tensors: dict[str, torch.Tensor], folder: Path, max_shard_size: str) -> None:
    """Writes tensors in shards; offloaded tensors are in memory for one shard at a time."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        here = {
            name: load_offloaded_parameter(model, name) if tensors[name].is_meta else tensors[name] for name in names
        }
        contiguous = {name: tensor.contiguous() for name, tensor in here.items()}
        save_file(contiguous, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def _missing(model: PreTrainedModel) -> list[tuple[bool, bool]]:
    """For each layer: (attention is removed, FFN is removed)."""
    return [
        (
            isinstance(getattr(layer, "self_attn", None), SkippedAttention),
            isinstance(getattr(layer, "mlp", None), SkippedFFN),
        )
        for layer in layers_of(model)
    ]


def _llama_fields(model: PreTrainedModel) -> dict[str, Any]:
    """The model's config as fields of `LlamaConfig`; biases and tied embeddings are read from the weights."""
    fields: dict[str, Any] = {name: getattr(model.config, name, None) for name in _NEEDED + _OPTIONAL}
    fields["head_dim"] = fields["head_dim"] or fields["hidden_size"] // fields["num_attention_heads"]
    names = {".".join(name.split(".")[-2:]) for name in model.state_dict()}
    return fields | {
        "rope_parameters": _rotary(model.config),
        "tie_word_embeddings": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "qkv_bias": "q_proj.bias" in names,
        "attention_bias": "o_proj.bias" in names,
        "mlp_bias": "down_proj.bias" in names,
    }


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary parameters of the config, without entries that have no effect."""
    empty = (("type", config.rope_parameters.get("rope_type")), ("partial_rotary_factor", 1.0))
    return {key: value for key, value in config.rope_parameters.items() if (key, value) not in empty}


def _width(intermediate_size: int, hidden_size: int) -> dict[str, Any]:
    """The entry of a block for the width of its FFN."""
    if intermediate_size % _MULTIPLE:
        return {"intermediate_size": intermediate_size}
    return {"ffn_mult": 3 * intermediate_size / (2 * hidden_size)}


def runtimes(config: dict[str, Any]) -> list[str]:
    """What runs a saved folder with this config.json, by the rules of each.

    SGLang has no biases but those of queries, keys and values, and drops others without a word. mlx-lm has biases in
    all projections of attention or in none, and heads of the hidden size divided by their number.
    """
    found = ["transformers", "vLLM"]
    has_mult = config["intermediate_size"] % _MULTIPLE == 0
    if has_mult and not config["attention_bias"] and not config["mlp_bias"]:
        found.append("SGLang")
    is_even = config["head_dim"] * config["num_attention_heads"] == config["hidden_size"]
    if has_mult and is_even and config["qkv_bias"] == config["attention_bias"]:
        found.append("mlx-lm")
    return found


def _nas_fields(model: PreTrainedModel) -> dict[str, Any]:
    """The fields of config.json besides those of a Llama."""
    config, rotary = model.config, _rotary(model.config)
    group, dtype = config.num_attention_heads // config.num_key_value_heads, str(model.dtype).removeprefix("torch.")
    width = _width(config.intermediate_size, config.hidden_size)
    blocks = [
        {
            "attention": {"no_op": no_attention, "n_heads_in_group": None if no_attention else group},
            "ffn": {"no_op": no_ffn, **(dict.fromkeys(width) if no_ffn else width)},
        }
        for no_attention, no_ffn in _missing(model)
    ]
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "block_configs": blocks,
        "dtype": dtype,
        "torch_dtype": dtype,  # this and the two below: for transformers 4 and the vLLM releases that used it
        "rope_theta": rotary.pop("rope_theta"),
        "rope_scaling": None if rotary["rope_type"] == "default" else rotary,
    }
