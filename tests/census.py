"""Every causal language model of transformers, built small from its default configuration, through both commands.

`python -m tests.census` writes `docs/models.md`.
"""

import math
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="modules-")}

import json
import sys
from contextlib import chdir, redirect_stderr, redirect_stdout
from io import StringIO

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import alp_prune
import ppllms
from lib.cli.exit_status import run_script
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import evaluation_windows
from lib.models.loading import load_tokenizer

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"

# Configurations -------------------------------------------------------------------------------------------------------

_LAYERS = 4
_SIZES: dict[str, int] = {}  # by the names of a config's own attributes
for size, names in {
    32: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim input_embedding_size "
    "output_embedding_size lru_width attention_hidden_size embedding_dim",
    _LAYERS: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
    "num_encoder_layers num_decoder_layers num_attention_heads n_head n_heads num_heads attention_heads "
    "decoder_attention_heads encoder_attention_heads swa_num_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads "
    "rotary_dim time_step_rank mamba_dt_rank d_rel adapter_rank router_hidden_size",
    2: "num_key_value_heads num_kv_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_topk "
    "moe_k",
    48: "intermediate_size n_inner ffn_dim d_ff dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "feed_forward_size d_inner intermediate_size_mlp dense_intermediate_size",
    24: "moe_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size "
    "shared_expert_intermediate_size shared_intermediate_size",
    16: "kv_lora_rank q_lora_rank o_lora_rank hc_lowrank laurel_rank",
    8: "head_dim swa_head_dim dim_head kv_channels attention_head_dim attention_head_size d_head qk_rope_head_dim "
    "qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim "
    "mamba_head_dim mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_head mamba_headdim mamba_d_state "
    "ssm_state_size state_size mamba_chunk_size chunk_size block_size index_topk keep_window_size rel_extent "
    "hidden_size_per_layer_input",
    1: "num_shared_experts n_shared_experts moe_num_shared_experts n_group topk_group num_expert_group "
    "zero_expert_num num_dense_layers first_k_dense_replace moe_layer_start_index mamba_n_groups n_groups "
    "mamba_ngroups",
    64: "max_position_embeddings n_positions n_ctx max_seq_len context_length mamba_d_ssm",
    6: "sliding_window attention_window_size window_size attention_chunk_size",
}.items():
    _SIZES |= dict.fromkeys(names.split(), size)

_SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
# Where the default and the sizes contradict each other, or leave one kind of layer only.
_BY_HAND: dict[str, dict] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n_text": _SHARED,
    "gemma4_text": {**_SHARED, "use_double_wide_mlp": True},
    "granitemoehybrid": {"layer_types": _ALTERNATING},
    "inkling2_text": {"unpadded_vocab_size": None},
    "inkling_text": {"unpadded_vocab_size": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"]},
    "olmo_hybrid": {"layer_types": _ALTERNATING},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16}
    | {"attention_hidden_size": 64},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16, "kv_channels": 16}
    | {"attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The model types that have a causal language model in transformers, sorted: of each class one known by name."""
    classes: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        of_class = name if isinstance(name, str) else name[0]
        if classes.get(of_class) not in _KNOWN:
            classes[of_class] = model_type
    return sorted(classes.values())


def tiny_config(model_type: str, vocab_size: int, special_token: int) -> PreTrainedConfig:
    """A configuration of 4 layers and 32 channels with each kind of layer that the default has, two of each if it can.

    Raises what a configuration raises that cannot be made in this way.
    """
    default = CONFIG_MAPPING[model_type]()
    options: dict = {name: size for name, size in _SIZES.items() if name in vars(default)}
    options |= dict.fromkeys(
        [name for name in ("vocab_size", "vocab_size_per_layer_input") if hasattr(default, name)], vocab_size
    )
    options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), special_token)
    if "kv_lora_rank" in options:  # latent attention: each head has its own keys
        options["num_key_value_heads"] = options["num_attention_heads"]
    return type(default)(**{**options, **_two_of_each_kind(default), **_BY_HAND.get(model_type, {})})


def _two_of_each_kind(config: PreTrainedConfig) -> dict[str, list]:
    """The lists with an entry for each layer, cut to 4 layers: the first two of each kind, in order."""
    count, given = config.num_hidden_layers, vars(config).items()
    lists = {name: value for name, value in given if isinstance(value, list) and len(value) == count}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True)) or [()] * count
    earlier = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    chosen = sorted(range(count), key=lambda index: (earlier[index] // 2, earlier[index], index))[:_LAYERS]
    return {name: [value[index] for index in sorted(chosen)] for name, value in lists.items() if name[0] != "_"}


# Runs -----------------------------------------------------------------------------------------------------------------

_SEQLEN, _EVALUATED = 32, 6  # tokens, and windows, spread over the text; recurrences are slow without their kernels


@dataclass(frozen=True)
class Outcome:
    """What came of a command: a refusal, or a saved model that is the one that was measured."""

    refusal: str | None = None
    note: str = ""

    def __str__(self) -> str:
        return self.refusal or f"yes{self.note}"


class Census:
    """Runs models through both commands, in a folder of its own."""

    def __init__(self, folder: Path, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.text, self.prompt = folder / "words.txt", folder / "prompt.txt"
        self.prompt.write_text("Layer 3 of")
        self.text.write_text(
            "".join(f"Layer {i} of {i * 7 % 31} was removed, and nothing changed. " for i in range(60))
        )

    @torch.no_grad()
    def build(self, model_type: str) -> Path:
        """The checkpoint of a small random model. Raises what transformers raises if it cannot build one."""
        config = tiny_config(model_type, len(self.tokenizer), self.tokenizer.eos_token_id)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        model(input_ids=torch.arange(8)[None], use_cache=False)
        model.save_pretrained(self.folder / model_type)
        self.tokenizer.save_pretrained(self.folder / model_type)
        return self.folder / model_type

    def depth(self, model: Path) -> Outcome:
        """By PP-LLMs, or BlockPruner where no layer has both attention and FFN."""
        flags = ["--model_name", model, "--dataset", self.text, "--eval_datasets", self.text, "--nsamples", 3]
        found = self._run(ppllms, model, *flags, "--mha_remove_layers", 1, "--ffn_remove_layers", 2)
        if found.refusal and "no layer has both attention and FFN" in found.refusal:
            found = self._run(ppllms, model, *flags, "--method", "blockpruner", "--prune_rate", 0.12)
            found = replace(found, note=", but not `--method ppllms`")
        return found

    def sparsity(self, model: Path) -> Outcome:
        """By SparseGPT, with ALP."""
        flags = ["--model", model, "--dataset", self.text, "--calibration_dataset", self.text, "--nsamples", 3]
        flags += ["--grad_nsamples", 2, "--grad_seqlen", 16, "--prune_method", "sparsegpt_alp"]
        return self._run(alp_prune, model, *flags)

    def _run(self, script, model: Path, *flags) -> Outcome:
        """Runs a script, and checks what it saved: perplexities before and after, and the number of parameters."""
        place = Path(tempfile.mkdtemp(dir=self.folder))
        words = [*flags, "--seqlen", _SEQLEN, "--eval_windows", _EVALUATED, "--prompts", self.prompt]
        words += ["--output_dir", place / "run", "--save_model", place / "out"]
        told, given, name = StringIO(), sys.argv, Path(script.__file__).name
        try:
            sys.argv = [name, *map(str, words)]
            with chdir(place), redirect_stdout(StringIO()), redirect_stderr(told):
                status = run_script(name, script.main)
        finally:
            sys.argv = given
        if status:
            (line,) = told.getvalue().splitlines()
            assert status == 2, f"failed late: {line}"
            return Outcome(line.partition("error: ")[2].replace(str(model), "the model"))
        result = json.loads((place / "run/result.json").read_text())
        reported = result["perplexity"][str(self.text)]
        for folder, stage in ((model, "dense"), (place / "out", "pruned")):
            found = self._perplexity(folder)
            assert math.isclose(found, reported[stage], rel_tol=1e-4), f"{stage}: {found}, reported {reported[stage]}"
        if script is ppllms:
            left = result["parameters"]["total"] - result["parameters"]["removed"]
            saved = AutoModelForCausalLM.from_pretrained(place / "out", trust_remote_code=True)
            assert sum(one.numel() for one in saved.parameters()) == left
        return Outcome()

    @torch.no_grad()
    def _perplexity(self, folder: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        text, tokenizer = load_corpus(str(self.text), "test"), load_tokenizer(ModelSource(str(folder)))
        losses = []
        for window in evaluation_windows(text, tokenizer, _SEQLEN, most=_EVALUATED):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
        return math.exp(sum(losses) / len(losses))


# The page -------------------------------------------------------------------------------------------------------------

# As people know them; the others go by their model type.
_KNOWN = {
    "apertus": "Apertus 8B, 70B",
    "arcee": "AFM 4.5B",
    "afmoe": "Trinity",
    "bamba": "Bamba 9B",
    "bitnet": "BitNet b1.58",
    "bloom": "BLOOM, BLOOMZ",
    "cohere": "Command R, Aya",
    "cohere2": "Command R7B, Command A",
    "deepseek_v2": "DeepSeek-V2, V2-Lite",
    "deepseek_v3": "DeepSeek-V3, R1, Kimi K2",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v4": "DeepSeek-V4",
    "dots1": "dots.llm1",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "ernie4_5_moe": "ERNIE 4.5 21B-A3B, 300B-A47B",
    "exaone4": "EXAONE 4",
    "falcon": "Falcon 7B, 40B",
    "falcon_h1": "Falcon-H1",
    "falcon_mamba": "Falcon Mamba 7B",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 270M, 1B",
    "gemma3n_text": "Gemma 3n E2B, E4B",
    "gemma4_text": "Gemma 4",
    "glm": "GLM-4 9B",
    "glm4": "GLM-4-0414",
    "glm4_moe": "GLM-4.5, 4.6, 4.7",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "glm_moe_dsa": "GLM-5",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder, SantaCoder",
    "gpt_neo": "GPT-Neo",
    "gpt_neox": "Pythia, GPT-NeoX 20B",
    "gpt_oss": "GPT-OSS 20B, 120B",
    "gptj": "GPT-J 6B",
    "granite": "Granite 3",
    "granitemoe": "Granite 3 1B-A400M, 3B-A800M",
    "granitemoehybrid": "Granite 4.0 H",
    "hunyuan_v1_dense": "Hunyuan 0.5B to 7B",
    "hunyuan_v1_moe": "Hunyuan-A13B",
    "jamba": "Jamba",
    "jetmoe": "JetMoE 8B",
    "kimi_linear": "Kimi Linear 48B-A3B",
    "lfm2": "LFM2 350M to 2.6B",
    "lfm2_moe": "LFM2 8B-A1B",
    "llama": "Llama 2, 3, 3.1, 3.2; SmolLM2; many others",
    "llama4_text": "the text model of Llama 4",
    "longcat_flash": "LongCat-Flash",
    "mamba": "Mamba",
    "mamba2": "Mamba-2, Codestral Mamba",
    "minicpm3": "MiniCPM3 4B",
    "minimax": "MiniMax-Text-01, M1",
    "minimax_m2": "MiniMax-M2",
    "ministral": "Ministral 8B",
    "ministral3": "Ministral 3",
    "mistral": "Mistral 7B, Nemo, Small",
    "mixtral": "Mixtral 8x7B, 8x22B",
    "modernbert-decoder": "Ettin decoders",
    "mpt": "MPT 7B, 30B",
    "nemotron": "Minitron, Nemotron-4",
    "nemotron_h": "Nemotron-H, Nemotron Nano 2 and 3",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmo_hybrid": "OLMo Hybrid",
    "olmoe": "OLMoE 1B-7B",
    "openai-gpt": "GPT",
    "opt": "OPT",
    "persimmon": "Persimmon 8B",
    "phi": "Phi-1, 1.5, 2",
    "phi3": "Phi-3, 3.5 mini, 4",
    "phimoe": "Phi-3.5-MoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen2_moe": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "qwen3": "Qwen3 0.6B to 32B",
    "qwen3_5_text": "Qwen3.5, text",
    "qwen3_5_moe_text": "Qwen3.5 MoE, text",
    "qwen3_moe": "Qwen3-30B-A3B, 235B-A22B",
    "qwen3_next": "Qwen3-Next-80B-A3B",
    "recurrent_gemma": "RecurrentGemma",
    "seed_oss": "Seed-OSS 36B",
    "smollm3": "SmolLM3 3B",
    "stablelm": "StableLM 2",
    "starcoder2": "StarCoder2",
    "xglm": "XGLM",
    "zamba": "Zamba",
    "zamba2": "Zamba2",
}

_PAGE = """# Models

A decoder fits if each of its layers adds the outputs of its sublayers to its input: those that mix tokens (attention,
linear attention, a state space, a recurrence, a convolution), which are called attention here, and those that do not
(an MLP, a mixture of experts), which are called FFN. A layer may have one of the two only. Whether a model fits is
found on the model itself, by its structure and by running it on two tokens; what does not fit is refused in one line.

The tables are written by `python -m tests.census`, with transformers {version}: every causal language model of
transformers, made small from its default configuration (4 layers, 32 channels, random weights), goes through both
commands. "Yes" means that the command ran to its end, that transformers loads the saved model, and that perplexities
before and after are those of the models' own forward, computed apart. So this says that a family works, not how well it
can be pruned. {yes[0]} of {count} work with `ppllms.py`, {yes[1]} with `alp_prune.py`.

What to know of some of them:

- **Layers that are built by their number** (mixtures of experts with dense first layers, Jamba, DiffLlama, Gemma 4):
  where a removed layer would change what others are built as, it stays under its number as an empty one, without
  weights. Such a checkpoint is loaded with `trust_remote_code=True`.
- **Hybrids** (Qwen3-Next, Jamba, Falcon-H1, Nemotron-H, LFM2): one full attention always stays, because caches take the
  number of tokens from it.
- **Gemma 4 E2B and E4B**, whose last layers read the keys and values of layers before them: the attentions of the
  layers that are read stay.
- **Mamba and Nemotron-H**, whose layers have one sublayer each: `--method ppllms` needs layers with both, the other
  methods do not.
- **Weight pruning** leaves routers, gates of shared experts, depthwise convolutions and the projections of a state
  space's time steps (`dt_proj`) as they are, and does not count them. See also
  [mixtures of experts](sparsity.md#models).
- **Models of more than text** (Gemma 3 from 4B, Qwen2.5-VL and Qwen3-VL, Mistral Small 3.1, LLaVA): the text model is
  pruned, the rest is saved as it came, and images still work. Of Qwen3-VL, which adds features of images after its
  first layers by their number, leave these layers in. Llama 4 is pruned and saved as its text model alone.

## Decoders

| models | `model_type` | `ppllms.py` | `alp_prune.py` |
|---|---|---|---|
{decoders}

## Not decoders

- Encoders: {encoders}.
- Halves of encoder-decoder models: {halves}.
- Not built, because their default configuration cannot be made small in this way, or is one of several parts:
  {unbuilt}.
"""


def write_page(rows: dict[str, tuple[Outcome, Outcome] | None]) -> str:
    """The page of what came of each model type; None for one that could not be built."""
    built = {name: pair for name, pair in rows.items() if pair is not None}
    encoders = [name for name, (depth, _) in built.items() if "is an encoder" in str(depth)]
    halves = [name for name, (depth, _) in built.items() if "half of an encoder-decoder" in str(depth)]
    decoders = {name: pair for name, pair in built.items() if name not in {*encoders, *halves}}
    is_refused = {name: all(one.refusal for one in pair) for name, pair in decoders.items()}
    names = sorted(decoders, key=lambda name: (is_refused[name], _KNOWN.get(name, name).lower()))
    lines = [f"| {_KNOWN.get(name, '')} | `{name}` | {cells(*decoders[name])} |" for name in names]
    unbuilt = [name for name, pair in rows.items() if pair is None]
    return _PAGE.format(
        version=transformers.__version__,
        yes=[sum(not pair[which].refusal for pair in decoders.values()) for which in (0, 1)],
        count=len(built),
        decoders="\n".join(lines),
        **{
            name: ", ".join(f"`{one}`" for one in found)
            for name, found in (("encoders", encoders), ("halves", halves), ("unbuilt", unbuilt))
        },
    )


def cells(depth: Outcome, sparsity: Outcome) -> str:
    """Both outcomes as cells of a row; a reason that both give stands there once."""
    is_same = depth.refusal is not None and depth.refusal == sparsity.refusal
    return f"{depth} | {'likewise' if is_same else sparsity}"


def main() -> None:
    from lib.runtime.setup import quiet_libraries

    quiet_libraries()
    rows: dict[str, tuple[Outcome, Outcome] | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        census = Census(Path(folder), load_tokenizer(ModelSource("demo")))
        for model_type in families():
            try:
                model = census.build(model_type)
            except Exception as error:  # whatever a configuration or a model raises
                print(f"{model_type}: not built ({error})")
                rows[model_type] = None
                continue
            rows[model_type] = census.depth(model), census.sparsity(model)
            print(model_type, *rows[model_type], sep="; ")
    PAGE.write_text(write_page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
