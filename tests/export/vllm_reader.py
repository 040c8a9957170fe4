"""A strict reader of nemotron-nas folders in plain torch, by the rules of vLLM (models/nemotron_nas.py and llama.py).

vLLM keeps a residual stream apart from the hidden states: a norm adds the two before it normalizes, a sublayer that is
gone takes its norm along, and in the first layer there is no residual yet. Tensors that no parameter waits for, and
parameters that no tensor fills, are errors here.
"""

import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from torch.nn.functional import embedding, linear, scaled_dot_product_attention, silu
from transformers import AutoConfig


class VllmReader:
    """The model of a folder: `reader(input_ids)` gives its logits."""

    def __init__(self, folder: Path):
        self.config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert self.config.architectures == ["DeciLMForCausalLM"] and self.config.model_type == "nemotron-nas"
        assert len(self.config.block_configs) == self.config.num_hidden_layers
        assert self.config.hidden_act == "silu" and not hasattr(self.config, "layer_types")
        self.tensors = _read_tensors(folder)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        assert shapes == self._parameters()

    @property
    def num_kv_heads(self) -> int:
        """The key-value heads that vLLM plans its cache with: those of the first block that has attention."""
        return self._kv_heads(next(block for block in self.config.block_configs if not block.attention.no_op))

    def _parameters(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of all that vLLM fills."""
        config, width = self.config, self.config.hidden_size
        found = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
        if not config.tie_word_embeddings:
            found["lm_head.weight"] = (config.vocab_size, width)
        out_bias = config.attention_bias
        qkv_bias = config.qkv_bias if hasattr(config, "qkv_bias") else out_bias

        def add_linear(name: str, out_features: int, in_features: int, has_bias: bool) -> None:
            found[f"{name}.weight"] = (out_features, in_features)
            if has_bias:
                found[f"{name}.bias"] = (out_features,)

        for index, block in enumerate(config.block_configs):
            layer = f"model.layers.{index}"
            if not block.attention.no_op:
                heads, kv_heads = config.num_attention_heads, self._kv_heads(block)
                found[f"{layer}.input_layernorm.weight"] = (width,)
                for name, count in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
                    add_linear(f"{layer}.self_attn.{name}", count * config.head_dim, width, qkv_bias)
                add_linear(f"{layer}.self_attn.o_proj", width, heads * config.head_dim, out_bias)
            if not block.ffn.no_op:
                inner = self._width(block.ffn)
                found[f"{layer}.post_attention_layernorm.weight"] = (width,)
                for name, sizes in {
                    "gate_proj": (inner, width),
                    "up_proj": (inner, width),
                    "down_proj": (width, inner),
                }.items():
                    add_linear(f"{layer}.mlp.{name}", *sizes, config.mlp_bias)
        return found

    def _width(self, ffn) -> int:
        """`ffn_mult` wins, and becomes the next multiple of 256."""
        if hasattr(ffn, "ffn_mult"):
            return math.ceil(int(2 * ffn.ffn_mult * self.config.hidden_size / 3) / 256) * 256
        return ffn.intermediate_size

    def _kv_heads(self, block) -> int:
        return self.config.num_attention_heads // block.attention.n_heads_in_group

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) -> logits (B, T, V)."""
        hidden_states, residual = embedding(input_ids, self.tensors["model.embed_tokens.weight"]), None
        for index, block in enumerate(self.config.block_configs):
            layer = f"model.layers.{index}"
            if not block.attention.no_op:
                hidden_states, residual = self._norm(f"{layer}.input_layernorm", hidden_states, residual)
                hidden_states = self._attention(f"{layer}.self_attn", hidden_states, self._kv_heads(block))
            if not block.ffn.no_op:
                assert residual is not None, "vLLM cannot start with an FFN"
                hidden_states, residual = self._norm(f"{layer}.post_attention_layernorm", hidden_states, residual)
                hidden_states = self._ffn(f"{layer}.mlp", hidden_states)
        hidden_states, _ = self._norm("model.norm", hidden_states, residual)
        head = "model.embed_tokens" if self.config.tie_word_embeddings else "lm_head"
        return linear(hidden_states, self.tensors[f"{head}.weight"])

    def _linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        return linear(inputs, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def _norm(self, name: str, hidden_states: torch.Tensor, residual: torch.Tensor | None):
        """The normalized sum of hidden states and residual, and the sum."""
        total = hidden_states if residual is None else hidden_states + residual
        scale = torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.tensors[f"{name}.weight"] * (total * scale), total

    def _ffn(self, name: str, hidden_states: torch.Tensor) -> torch.Tensor:
        gated = silu(self._linear(f"{name}.gate_proj", hidden_states)) * self._linear(f"{name}.up_proj", hidden_states)
        return self._linear(f"{name}.down_proj", gated)

    def _attention(self, name: str, hidden_states: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Causal attention; head h of the queries looks at head h // group of the keys and values."""
        query, key, value = (
            self._linear(f"{name}.{which}_proj", hidden_states)
            .unflatten(-1, (-1, self.config.head_dim))
            .transpose(1, 2)
            for which in "qkv"
        )  # (B, heads, T, head_dim)
        query, key = self._rotate(query), self._rotate(key)
        of_head = torch.arange(query.shape[1]) // (query.shape[1] // kv_heads)
        mixed = scaled_dot_product_attention(query, key[:, of_head], value[:, of_head], is_causal=True)
        return self._linear(f"{name}.o_proj", mixed.transpose(1, 2).flatten(2))

    def _rotate(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotary embedding over the whole head, its first half paired with its second."""
        frequencies = rotary_frequencies(self.config.rope_parameters, self.config.head_dim)
        angles = torch.arange(heads.shape[2])[:, None] * frequencies  # (T, head_dim / 2)
        first, second = heads.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_frequencies(rotary: dict, head_dim: int) -> torch.Tensor:
    """(head_dim / 2,) radians per position. llama3: long waves go `factor` times slower, with a smooth passage."""
    frequencies = rotary["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    if rotary["rope_type"] == "default":
        return frequencies
    if rotary["rope_type"] == "linear":
        return frequencies / rotary["factor"]
    assert rotary["rope_type"] == "llama3"
    low, high = rotary["low_freq_factor"], rotary["high_freq_factor"]
    waves = rotary["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((waves - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rotary["factor"]


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder's safetensors files, which its index, if there are several, must list."""
    tensors, places = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                assert name not in tensors
                tensors[name], places[name] = file.get_tensor(name), path.name
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(set(places.values())) > 1)
    assert not index.exists() or json.loads(index.read_text())["weight_map"] == places
    return tensors
