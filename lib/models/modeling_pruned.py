"""Decoder layers without attention or FFN, as `config.per_layer_config` lists them under `skip`.

This file travels with every pruned checkpoint that needs it, so it imports nothing but torch. The pruned model in
memory uses the same classes. A residual block whose sublayer gives zeros passes its input on unchanged.
"""

import functools

import torch
from torch import nn

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "fc1+fc2")
LAYERS_NAMES = ("layers", "h")
PREFIX = "Pruned"  # before the name of a stock class
SKIP_ATTENTION, SKIP_FFN = "attention", "mlp"  # the words of transformers' per_layer_config


class SkippedAttention(nn.Module):
    """Stands where an attention module was: zeros in the shape of the hidden states, and no attention weights."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class SkippedFFN(nn.Module):
    """Stands where an FFN (or its last linear) was: zeros in the shape of the input."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


class PassThrough(nn.Module):
    """Stands where the first linear of an FFN of two linears was: the activation's work is then thrown away."""

    def forward(self, hidden_states):
        return hidden_states


def find_name(module, names):
    """The first of the attribute names that the module has; `a+b` asks for both. None if there is none."""
    return next((name for name in names if all(hasattr(module, part) for part in name.split("+"))), None)


def skip_modules(layer, kind):
    """{attribute: module} to put into a decoder layer so that its attention or its FFN contributes nothing."""
    if kind == SKIP_ATTENTION:
        return {find_name(layer, ATTENTION_NAMES): SkippedAttention()}
    *first, last = find_name(layer, FFN_NAMES).split("+")
    return {**{name: PassThrough() for name in first}, last: SkippedFFN()}


def number_layers(layers, layer_types):
    """Gives every layer its position, and every attention its slot in the key-value cache.

    Caches read their length from the first slot of each layer type, and of slot 0. So attentions take the slots of
    their own type in order; layers without attention have the type of the first attention and leave the last ones.
    """
    types = list(layer_types or ["all"] * len(layers))
    slots = {kind: iter([slot for slot, other in enumerate(types) if other == kind]) for kind in set(types)}
    for position, layer in enumerate(layers):
        if hasattr(layer, "layer_idx"):
            layer.layer_idx = position
        attention = getattr(layer, find_name(layer, ATTENTION_NAMES))
        if not isinstance(attention, SkippedAttention):
            slot = next(slots[types[position]])
            for module in attention.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = slot


def skip_lists(config):
    """[skipped sublayers of layer 0, of layer 1, ...] of a config, on transformers that know the key or do not."""
    given = getattr(config, "per_layer_config", {})
    if isinstance(given, dict):
        return [
            given.get(str(index), given.get(index, {})).get("skip", []) for index in range(config.num_hidden_layers)
        ]
    return [list(getattr(given[index], "skip", [])) for index in range(config.num_hidden_layers)]


def skip_sublayers(model):
    """Takes the sublayers that the model's config lists out of its decoder layers."""
    decoder = model.get_decoder()
    layers = getattr(decoder, find_name(decoder, LAYERS_NAMES))
    config = model.config.get_text_config(decoder=True)
    for layer, skipped in zip(layers, skip_lists(config), strict=True):
        for kind in skipped:
            for name, module in skip_modules(layer, kind).items():
                setattr(layer, name, module)
    number_layers(layers, getattr(config, "layer_types", None))


@functools.cache
def pruned_class(stock):
    """The subclass of a stock model class that leaves out the sublayers which its config lists."""

    def build(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        skip_sublayers(self)

    return type(PREFIX + stock.__name__, (stock,), {"__init__": build, "__module__": __name__})
