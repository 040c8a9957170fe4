"""Decoder layers without attention or FFN, as listed under `skip` in `config.per_layer_config`.

This file is copied into every pruned checkpoint that needs it, so it imports only torch. Pruned models in memory use
the same classes. A residual block whose sublayer returns zeros passes its input on unchanged.
"""

import functools

import torch
from torch import nn

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "fc1+fc2")
LAYERS_NAMES = ("layers", "h")
PREFIX = "Pruned"  # before the name of a stock class
TYPE_PREFIX = "pruned_"  # before the `model_type` of a stock config
SKIP_ATTENTION, SKIP_FFN = "attention", "mlp"  # values of `skip` in transformers' per_layer_config


class SkippedAttention(nn.Module):
    """Replaces an attention module: returns zeros in the shape of the hidden states, and no attention weights."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states), None


class SkippedFFN(nn.Module):
    """Replaces an FFN, or its last linear: returns zeros in the shape of its input."""

    def forward(self, hidden_states, *args, **kwargs):
        return torch.zeros_like(hidden_states)


class PassThrough(nn.Module):
    """Replaces the first linear of an FFN of two linears; `SkippedFFN` then discards the activation's output."""

    def forward(self, hidden_states):
        return hidden_states


def find_name(module, names):
    """The first of the attribute names that the module has, or None; `a+b` requires both."""
    return next((name for name in names if all(hasattr(module, part) for part in name.split("+"))), None)


def skip_modules(layer, kind):
    """{attribute: module} to set on a decoder layer so that its attention or its FFN contributes nothing."""
    if kind == SKIP_ATTENTION:
        return {find_name(layer, ATTENTION_NAMES): SkippedAttention()}
    *first, last = find_name(layer, FFN_NAMES).split("+")
    return {**{name: PassThrough() for name in first}, last: SkippedFFN()}


def cache_types(layer_types, have_attention):
    """The types of layers for `number_layers`: a layer without attention gets the type of the first attention."""
    first = next(kind for kind, has_attention in zip(layer_types, have_attention, strict=True) if has_attention)
    return [kind if has else first for kind, has in zip(layer_types, have_attention, strict=True)]


def number_layers(layers, layer_types):
    """Sets every layer's position, and every attention's slot in the key-value cache.

    Caches read their length from the first slot of each layer type, and from slot 0. So attentions take the slots of
    their own type in order. Layers without attention have the type of the first attention, and its last slots stay
    empty.
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
    """[skipped sublayers of layer 0, of layer 1, ...], with or without transformers' support for the config key.

    Raises `ValueError` for the name of anything else than a sublayer.
    """
    given = getattr(config, "per_layer_config", None) or {}
    if isinstance(given, dict):
        entries = {int(index): entry for index, entry in given.items()}
        lists = [list(entries.get(index, {}).get("skip", [])) for index in range(config.num_hidden_layers)]
    else:
        lists = [list(getattr(given[index], "skip", [])) for index in range(config.num_hidden_layers)]
    unknown = sorted({str(kind) for kinds in lists for kind in kinds} - {SKIP_ATTENTION, SKIP_FFN})
    if unknown:
        raise ValueError(f"per_layer_config: cannot skip {unknown[0]!r}; known are {SKIP_ATTENTION} and {SKIP_FFN}")
    return lists


def skip_sublayers(model):
    """Removes the sublayers that the model's config lists from its decoder layers."""
    decoder = model.get_decoder()
    layers = getattr(decoder, find_name(decoder, LAYERS_NAMES))
    config = model.config.get_text_config(decoder=True)
    for layer, skipped in zip(layers, skip_lists(config), strict=True):
        for kind in skipped:
            for name, module in skip_modules(layer, kind).items():
                setattr(layer, name, module)
    number_layers(layers, getattr(config, "layer_types", None))


@functools.cache
def pruned_config(stock):
    """The subclass of a stock config class under a `model_type` of its own.

    Whatever does not know that type refuses the checkpoint, instead of building the stock model with random weights
    in place of the missing ones.
    """
    return type(
        PREFIX + stock.__name__, (stock,), {"model_type": TYPE_PREFIX + stock.model_type, "__module__": __name__}
    )


@functools.cache
def pruned_class(stock):
    """The subclass of a stock model class without the sublayers that its config lists."""

    def build(self, config, *args, **kwargs):
        stock.__init__(self, config, *args, **kwargs)
        skip_sublayers(self)

    config_class = pruned_config(stock.config_class)
    return type(
        PREFIX + stock.__name__, (stock,), {"__init__": build, "__module__": __name__, "config_class": config_class}
    )
