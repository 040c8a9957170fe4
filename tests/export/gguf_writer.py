"""Writes a Llama of transformers as the GGUF file that llama.cpp's own converter would make of it."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import nn

KINDS = ("F32", "F16", "Q8_0")


@torch.no_grad()
def write_gguf(model: nn.Module, path: Path, tokenizer: Path | None = None, kind: str = "F32", **options) -> Path:
    """Writes a `LlamaForCausalLM`, its matrices as one of `KINDS` and all else as F32; returns the path.

    `tokenizer` is a folder with a tokenizer.json, of byte-level BPE or of BPE with byte fallback; without one the file
    has no vocabulary and llama.cpp takes token ids only. `options` go to `gguf.GGUFWriter`.
    """
    writer = gguf.GGUFWriter(path, "llama", **options)
    _add_sizes(writer, model.config, kind)
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        _add_vocabulary(writer, model.config, json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8")))
    for name, tensor in _tensors(model):
        _add_tensor(writer, name, tensor.float().cpu().numpy(), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, config, kind: str) -> None:
    head_size = config.head_dim or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_vocabulary(writer: gguf.GGUFWriter, config, tokenizer: dict) -> None:
    """Tokens, their types and what joins them: merges, or scores that make llama.cpp choose the same merges."""
    special = {token["id"] for token in tokenizer["added_tokens"] if token["special"]}
    texts = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    texts |= {number: text for text, number in tokenizer["model"]["vocab"].items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in tokenizer["model"]["merges"]]

    def kind(number: int, text: str) -> gguf.TokenType:
        if number in special or number not in texts:
            return gguf.TokenType.CONTROL if number in special else gguf.TokenType.UNUSED
        return gguf.TokenType.BYTE if has_bytes and text.startswith("<0x") else gguf.TokenType.NORMAL

    has_bytes = tokenizer["model"]["byte_fallback"]
    writer.add_tokenizer_model("llama" if has_bytes else "gpt2")
    writer.add_tokenizer_pre("default" if has_bytes else "gpt-2")
    writer.add_token_list(tokens)
    if has_bytes:
        ranks = {"".join(merge): rank for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    else:
        writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_token_types([kind(number, text) for number, text in enumerate(tokens)])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(has_bytes)


def _tensors(model: nn.Module):
    """Names of llama.cpp and tensors, of those that the model has under a name of its own."""
    config = model.config
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.named_parameters():  # tied embeddings come once, as the input's
        if "q_proj" in name:
            tensor = _permute(tensor, config.num_attention_heads)
        if "k_proj" in name:
            tensor = _permute(tensor, config.num_key_value_heads)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), tensor
    if config.rope_parameters["rope_type"] != "default":
        rotary = model.get_decoder().rotary_emb.inv_freq
        exponents = torch.arange(len(rotary), dtype=torch.float32, device=rotary.device) / len(rotary)
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -exponents / rotary


def _permute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows from halves of a head to pairs, which llama.cpp rotates."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    block_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]
    stored = kind if tensor.ndim == 2 and tensor.shape[1] % block_size == 0 else "F32"
    number = gguf.GGMLQuantizationType[stored]
    # Contiguous, because the writer hands memory to the file as it lies.
    writer.add_tensor(name, np.ascontiguousarray(gguf.quants.quantize(tensor, number)), raw_dtype=number)
