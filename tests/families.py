"""A tiny random model of every supported family: 4 layers, so that each kind of removal fits in one plan."""

import torch
import transformers

_COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_GQA = dict(num_key_value_heads=2)
_EXPERTS = dict(moe_intermediate_size=24, num_experts_per_tok=2)
_LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
_DEEPSEEK = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
_SLIDING = dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"] * 2)

FAMILIES = {
    "Llama": ("LlamaConfig", {**_GQA}),
    "LlamaTied": ("LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "Mistral": ("MistralConfig", {**_GQA, "sliding_window": 6}),
    "Qwen2": ("Qwen2Config", {**_GQA, **_SLIDING, "use_sliding_window": True}),
    "Qwen3": ("Qwen3Config", {**_GQA, "head_dim": 8}),
    "Gemma": ("GemmaConfig", {**_GQA, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", {**_GQA, **_SLIDING, "head_dim": 8}),
    "Gemma3": ("Gemma3TextConfig", {**_GQA, **_SLIDING, "head_dim": 8}),
    "Phi": ("PhiConfig", {}),
    "Phi3": ("Phi3Config", {**_GQA}),
    "OPT": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "GPTNeoX": ("GPTNeoXConfig", {}),
    "GPTNeoXSerial": ("GPTNeoXConfig", {"use_parallel_residual": False}),
    "Olmo2": ("Olmo2Config", {**_GQA}),
    "Granite": ("GraniteConfig", {**_GQA, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "Falcon": ("FalconConfig", {"ffn_hidden_size": 48, "alibi": False}),
    "FalconSerial": ("FalconConfig", {"ffn_hidden_size": 48, "parallel_attn": False, "multi_query": False}),
    "GPT2": ("GPT2Config", {"n_inner": 48}),
    "Mixtral": ("MixtralConfig", {**_GQA, "num_local_experts": 3, "num_experts_per_tok": 2}),
}

# With experts, in the other forms that transformers keeps them in; what tests of `FAMILIES` hold, Mixtral stands for.
MOE_FAMILIES = {
    "Qwen2Moe": ("Qwen2MoeConfig", {**_GQA, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40}),
    "Qwen3Moe": ("Qwen3MoeConfig", {**_GQA, **_EXPERTS, "num_experts": 4, "head_dim": 8, "norm_topk_prob": True}),
    "Olmoe": ("OlmoeConfig", {**_GQA, **_EXPERTS, "num_experts": 4}),
    "GraniteMoe": ("GraniteMoeConfig", {**_GQA, **_EXPERTS, "num_local_experts": 4}),
    "DeepseekV3": ("DeepseekV3Config", {**_EXPERTS, **_LATENT, **_DEEPSEEK}),
    "Ernie4_5Moe": (
        "Ernie4_5_MoeConfig",
        {**_GQA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
    ),
}

_MAMBA = dict(mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_chunk_size=8)
_DELTA = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)
_STATE = dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8)

# Whose layers differ, mix tokens in other ways than attention, have one sublayer only, or return more than others.
HYBRID_FAMILIES = {
    "GptOss": ("GptOssConfig", {**_GQA, **_SLIDING, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3Next": (
        "Qwen3NextConfig",
        {**_GQA, **_EXPERTS, **_DELTA, "num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 40}
        | {"layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "Jamba": (
        "JambaConfig",
        {**_GQA, "num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2}
        | {"attn_layer_offset": 1, "use_mamba_kernels": False},
    ),
    "FalconH1": ("FalconH1Config", {**_GQA, **_MAMBA, "mamba_d_ssm": 64, "head_dim": 8}),
    "Lfm2": ("Lfm2Config", {**_GQA, "layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}),
    "Mamba2": ("Mamba2Config", {**_STATE}),
    "NemotronH": (
        "NemotronHConfig",
        {**_GQA, **_EXPERTS, "head_dim": 8, "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 24}
        | {"ssm_state_size": 8, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8}
        | {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"]},
    ),
    "Bloom": ("BloomConfig", {}),
    "Gemma4": (
        "Gemma4TextConfig",
        {**_GQA, **_SLIDING, "head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": 96},
    ),
}


def tiny_model(family: str, **changes) -> torch.nn.Module:
    """The family's tiny model in fp32, its weights large enough that every layer matters, biases and norms included."""
    name, options = (FAMILIES | MOE_FAMILIES | HYBRID_FAMILIES)[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**_COMMON, **options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


def tiny_windows(count: int = 5, seqlen: int = 16) -> torch.Tensor:
    """(count, seqlen) random token ids without the special ones."""
    return torch.randint(3, 96, (count, seqlen), generator=torch.Generator().manual_seed(1))


# All of their weights are those of nn.Linear.
LINEAR_FAMILIES = [family for family in FAMILIES if family not in ("GPT2", "Mixtral")]
OTHER_FAMILIES = ["GPT2", "Mixtral", *MOE_FAMILIES, *(family for family in HYBRID_FAMILIES if family != "Bloom")]
