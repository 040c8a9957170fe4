"""Decoder layers without attention or FFN, as the config lists them.

A layer's attention is all in it that mixes tokens: attention, linear attention, a state space, a recurrence, a
convolution. Its FFN is all else that has matrices: an MLP, a mixture of experts. A layer may have one of the two only.

This file is copied into every pruned checkpoint that needs it, so it imports only torch. Pruned models in memory use
the same classes. A residual block whose sublayer returns zeros passes its input on unchanged.
"""

import functools
import inspect

import torch
from torch import nn

LAYERS_NAMES = ("layers", "h", "blocks")
PREFIX = "Pruned"  # before the name of a stock class
TYPE_PREFIX = "pruned_"  # before the `model_type` of a stock config
SKIP_ATTENTION, SKIP_FFN = "attention", "mlp"  # values of `skip` in transformers' per_layer_config
SKIP = "skip_sublayers"  # in the config: {layer: [attention, mlp]}, where per_layer_config has other entries
RETURNS = "skip_returns"  # in the config: {layer: {name of a skipped module: how many values it returned, if unusual}}
OF_OTHER_TOKENS = frozenset(  # arguments of what mixes tokens: masks, caches, positions
    "attention_mask mask cache past_key_values past_key_value layer_past cache_params state alibi position_embeddings "
    "position_ids freqs_cis".split()
)


class Skipped(nn.Module):
    """Replaces a module of a sublayer: returns zeros, and None for each further value that the module returned.

    The zeros have the shape of its first input, but for the width of a linear's output. A module that itself adds its
    output to the residual stream gives way to that stream, the argument at position `residual`.
    """

    num_values = 1

    def __init__(self, num_values=None, width=None, residual=None):
        super().__init__()
        self.num_values = num_values or self.num_values
        self.width, self.residual = width, residual

    def forward(self, *args, **kwargs):
        inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        zeros = inputs.new_zeros(*inputs.shape[:-1], self.width or inputs.shape[-1])
        output = zeros if self.residual is None else args[self.residual]
        return output if self.num_values == 1 else (output, *[None] * (self.num_values - 1))


class SkippedAttention(Skipped):
    """Replaces an attention; most return their output and attention weights."""

    num_values = 2


class SkippedFFN(Skipped):
    """Replaces an FFN; most return their output alone."""


_KINDS = {SKIP_ATTENTION: SkippedAttention, SKIP_FFN: SkippedFFN}


def find_name(module, names):
    """The first of the attribute names that the module has, or None."""
    return next((name for name in names if hasattr(module, name)), None)


def find_decoder(model):
    """The module that has the list of decoder layers."""
    places = (model.get_decoder(), model.base_model, getattr(model, "model", None))
    return next((place for place in places if place is not None and find_name(place, LAYERS_NAMES)), places[0])


def find_sublayers(layer):
    """{attention, mlp} -> names of the layer's attributes that form that sublayer; there may be none."""
    found: dict[str, list[str]] = {SKIP_ATTENTION: [], SKIP_FFN: []}
    for name, module in layer.named_children():
        if isinstance(module, SkippedAttention) or _has_matrices(module) and _mixes_tokens(module):
            found[SKIP_ATTENTION].append(name)
        elif isinstance(module, SkippedFFN) or _has_matrices(module):
            found[SKIP_FFN].append(name)
    return found


def _arguments(module):
    return list(inspect.signature(module.forward).parameters)


def _has_matrices(module):
    is_norm = "norm" in type(module).__name__.lower()
    return not is_norm and any(parameter.dim() > 1 for parameter in module.parameters())


def _mixes_tokens(module):
    """True for a forward that takes what only other tokens have: a mask, or a cache of theirs."""
    return not OF_OTHER_TOKENS.isdisjoint(_arguments(module))


def skip_modules(layer, kind, returns=None):
    """{attribute: module} to set on a decoder layer so that its attention or its FFN contributes nothing.

    `returns` has the number of values that a module returns, by attribute, where it is not the usual one.
    """

    def replacement(name, module):
        arguments = _arguments(module)
        residual = arguments.index("residual") if "residual" in arguments else None
        skipped = _KINDS[kind]((returns or {}).get(name), getattr(module, "out_features", None), residual)
        for buffer in module._non_persistent_buffers_set:  # some families fill those of all layers when they load
            skipped.register_buffer(buffer, getattr(module, buffer), persistent=False)
        return skipped

    modules = {name: getattr(layer, name) for name in find_sublayers(layer)[kind]}
    return {name: one if isinstance(one, Skipped) else replacement(name, one) for name, one in modules.items()}


def has_lost(layer, kind):
    """True for a layer whose attention or FFN is skipped; false for one that was made without."""
    return any(isinstance(module, _KINDS[kind]) for module in layer.children())


def unusual_returns(layer):
    """`returns` of `skip_modules` for what a layer has lost."""
    skipped = {name: module for name, module in layer.named_children() if isinstance(module, Skipped)}
    return {name: one.num_values for name, one in skipped.items() if one.num_values != type(one).num_values}


def lost_sublayers(layer):
    """The sublayers that a layer has lost, as the config names them."""
    return [kind for kind in _KINDS if has_lost(layer, kind)]


def empty(layer):
    """Deletes what is left of a layer without attention and FFN, such as norms; it returns its input."""
    for name, module in layer.named_children():
        if not isinstance(module, Skipped):
            setattr(layer, name, nn.Identity())


def cache_types(layer_types, layers):
    """The types of layers for `number_layers`: a layer that lost its type's last attention gets that of the first."""
    lost = [has_lost(layer, SKIP_ATTENTION) for layer in layers]
    mixes = [bool(find_sublayers(layer)[SKIP_ATTENTION]) and not gone for layer, gone in zip(layers, lost, strict=True)]
    left = [kind for kind, has_attention in zip(layer_types, mixes, strict=True) if has_attention]
    return [left[0] if gone and kind not in left else kind for kind, gone in zip(layer_types, lost, strict=True)]


def number_layers(layers, layer_types):
    """Sets every layer's position, and every attention's slot in the key-value cache.

    Caches read their length from the first slot of each layer type, and from slot 0. So attentions take the slots of
    their own type in order, and so do layers that were made without one; where layers lost theirs, the last slots of
    the type stay empty.
    """
    types = list(layer_types or ["all"] * len(layers))
    slots = {kind: iter([slot for slot, other in enumerate(types) if other == kind]) for kind in set(types)}
    for position, layer in enumerate(layers):
        if hasattr(layer, "layer_idx"):
            layer.layer_idx = position
        if has_lost(layer, SKIP_ATTENTION):
            continue
        slot = next(slots[types[position]])
        for name in find_sublayers(layer)[SKIP_ATTENTION]:
            for module in getattr(layer, name).modules():
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
    for index, kinds in (getattr(config, SKIP, None) or {}).items():
        lists[int(index)] += kinds
    unknown = sorted({str(kind) for kinds in lists for kind in kinds} - {SKIP_ATTENTION, SKIP_FFN})
    if unknown:
        raise ValueError(f"per_layer_config: cannot skip {unknown[0]!r}; known are {SKIP_ATTENTION} and {SKIP_FFN}")
    return lists


def skip_sublayers(model):
    """Removes the sublayers that the model's config lists from its decoder layers."""
    decoder = find_decoder(model)
    layers = getattr(decoder, find_name(decoder, LAYERS_NAMES))
    config = model.config.get_text_config(decoder=True)
    returns = getattr(config, RETURNS, None) or {}
    for index, (layer, skipped) in enumerate(zip(layers, skip_lists(config), strict=True)):
        made = find_sublayers(layer)
        for kind in skipped:
            for name, module in skip_modules(layer, kind, returns.get(str(index))).items():
                setattr(layer, name, module)
        if skipped and all(kind in skipped for kind, names in made.items() if names):
            empty(layer)
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

    attributes = {"__init__": build, "__module__": __name__, "config_class": pruned_config(stock.config_class)}
    # Else transformers would leave buffers that it computes for stock classes only as they were allocated.
    attributes["is_custom_code"] = classmethod(lambda cls: False)
    return type(PREFIX + stock.__name__, (stock,), attributes)
