"""Source code saved with pruned models, so that stock transformers and vLLM load them with `trust_remote_code`."""

# `modeling_pruned.py` of an `hf` folder: the source of `lib/models/modeling_pruned.py`, then this.
PRUNED_CLASS = """
from transformers import {stock}  # noqa: E402

{pruned} = pruned_class({stock})
{config} = {pruned}.config_class
{config}.register_for_auto_class()
{pruned}.register_for_auto_class("AutoModelForCausalLM")
"""

# `configuration_decilm.py` of a `nemotron-nas` folder.
DECILM_CONFIGURATION = '''"""A Llama's config with what each layer holds: `config.block_configs[0].attention.no_op`."""

from transformers import LlamaConfig


class Block(dict):
    """A dict with its keys as attributes, so that copies, pickles and JSON need no code for it."""

    def __init__(self, entries=()):
        entries = dict(entries).items()
        super().__init__({key: Block(value) if isinstance(value, dict) else value for key, value in entries})

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, qkv_bias=False, **kwargs):
        self.block_configs = [Block(block) for block in block_configs or []]
        self.qkv_bias = qkv_bias
        super().__init__(**kwargs)
'''

# `modeling_decilm.py` of a `nemotron-nas` folder: the source of `lib/models/modeling_pruned.py`, then this.
DECILM_MODELING = '''
from transformers import LlamaForCausalLM  # noqa: E402

from .configuration_decilm import DeciLMConfig  # noqa: E402


class DeciLMForCausalLM(LlamaForCausalLM):
    """A Llama without the sublayers, and their norms, that `config.block_configs` has as no-ops."""

    config_class = DeciLMConfig

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        for layer, block in zip(self.model.layers, config.block_configs, strict=True):
            for name in ("q_proj", "k_proj", "v_proj"):
                shape = getattr(layer.self_attn, name).weight.shape
                setattr(layer.self_attn, name, nn.Linear(shape[1], shape[0], bias=config.qkv_bias))
            if block.attention.no_op:
                layer.input_layernorm, layer.self_attn = nn.Identity(), SkippedAttention()
            if block.ffn.no_op:
                layer.post_attention_layernorm, layer.mlp = nn.Identity(), SkippedFFN()
'''
