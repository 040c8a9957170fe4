"""The structure of a decoder, found on the model itself: layers, sublayers and parameter counts."""

from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from lib.config.plan import Mode, Plan
from lib.errors import InputError
from lib.models.experts import Experts, find_experts
from lib.models.modeling_pruned import (
    LAYERS_NAMES,
    SKIP_ATTENTION,
    SKIP_FFN,
    Skipped,
    find_decoder,
    find_name,
    find_sublayers,
)
from lib.models.shared_kv import writing_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WITHOUT_LENGTH = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"}  # types of layers in configs


class Architecture:
    """A causal language model as a list of decoder layers, each with an attention and an FFN, or one of the two.

    Works on the meta device too. `made_modes` says which sublayers each layer was made with, `given_modes` which it has
    before this run prunes any; a model pruned earlier lacks some. Raises `InputError` for other structures.
    """

    def __init__(self, model: "PreTrainedModel"):
        self.model = model
        self.family = type(model).__name__
        self.config = model.config.get_text_config(decoder=True)
        self.layers = self._find_layers()
        self.sublayers = [self._find_sublayers(index, layer) for index, layer in enumerate(self.layers)]
        self._originals = [
            {name: getattr(layer, name) for names in self.sublayers[index].values() for name in names}
            for index, layer in enumerate(self.layers)
        ]
        self.made_modes = [Mode(bool(one[SKIP_ATTENTION]), bool(one[SKIP_FFN])) for one in self.sublayers]
        self.given_modes = [self._find_mode(index) for index in range(len(self.layers))]

    def _find_layers(self) -> nn.ModuleList:
        decoder = find_decoder(self.model)
        if hasattr(decoder, "encoder"):
            raise InputError(f"{self.family} does not fit: it is an encoder, without decoder layers")
        if any(hasattr(self.config, name) for name in ("encoder_layers", "num_encoder_layers")):
            raise InputError(f"{self.family} does not fit: it is one half of an encoder-decoder model")
        name = find_name(decoder, LAYERS_NAMES)
        layers = getattr(decoder, name) if name else None
        if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
            raise InputError(f"{self.family}: no list of decoder layers ({' or '.join(LAYERS_NAMES)}) was found")
        if len(layers) != self.config.num_hidden_layers:
            raise InputError(f"{self.family}: {len(layers)} layers, but {self.config.num_hidden_layers} in its config")
        return layers

    def _find_sublayers(self, index: int, layer: nn.Module) -> dict[str, list[str]]:
        """{attention, mlp} -> names of the layer's attributes that form that sublayer."""
        found = find_sublayers(layer)
        if not any(found.values()):
            raise InputError(f"{self.family}: layer {index} ({type(layer).__name__}) has neither attention nor FFN")
        return found

    def sublayer_modules(self, index: int, kind: str) -> dict[str, nn.Module]:
        """{attribute of the layer: module} of a sublayer as the model was given, on or off."""
        return {name: self._originals[index][name] for name in self.sublayers[index][kind]}

    def _find_mode(self, index: int) -> Mode:
        """The sublayers that a layer has before this run prunes any."""
        attention, ffn = (self.sublayer_modules(index, kind).values() for kind in (SKIP_ATTENTION, SKIP_FFN))
        return Mode(
            attention=any(not isinstance(module, Skipped) for module in attention),
            ffn=any(not isinstance(module, Skipped) for module in ffn),
        )

    @cached_property
    def experts(self) -> list[Experts | None]:
        """The routed experts of each layer."""
        return [find_experts(layer, self.sublayers[index][SKIP_FFN]) for index, layer in enumerate(self.layers)]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def whole_layers(self) -> list[int]:
        """The layers that have lost nothing."""
        return [index for index, mode in enumerate(self.given_modes) if mode == self.made_modes[index]]

    @property
    def paired_layers(self) -> list[int]:
        """The layers that have both attention and FFN."""
        return [index for index, mode in enumerate(self.given_modes) if mode.is_whole]

    @cached_property
    def _kept_for_caches(self) -> list[int]:
        """The layers of whose attentions one must stay: those that keep all tokens, else all that have attention.

        Caches take the number of tokens from such a layer, not from a state space or a convolution.
        """
        types = getattr(self.config, "layer_types", None) or [""] * self.num_layers
        having = [index for index, mode in enumerate(self.given_modes) if mode.attention]
        return [index for index in having if types[index] not in _WITHOUT_LENGTH] or having

    @cached_property
    def read_attentions(self) -> list[int]:
        """The layers whose keys and values others read, so that their attention must stay."""
        return writing_layers(self.config)

    def keeps_attention(self, plan: Plan) -> bool:
        """True for a plan that leaves every attention that others read, and one that keeps all tokens."""
        is_read = not set(self.read_attentions).isdisjoint(plan.mha_removed)
        return not is_read and any(index not in plan.mha_removed for index in self._kept_for_caches)

    def complete(self, plan: Plan) -> Plan:
        """The plan plus the sublayers that the model lacked from the start."""
        modes = list(enumerate(self.given_modes))
        mha = [index for index, mode in modes if not mode.attention and index not in plan.mha_removed]
        ffn = [index for index, mode in modes if not mode.ffn and index not in plan.ffn_removed]
        ffn_removed = tuple(sorted((*plan.ffn_removed, *ffn)))
        return Plan(plan.num_layers, (*plan.mha_removed, *mha), ffn_removed, plan.experts_removed)

    # Counting parameters

    @cached_property
    def _layer_parameters(self) -> list[tuple[int, int, int]]:
        """Parameters of each layer's attention, of its FFN, and of everything else in it."""
        counts = []
        for index, layer in enumerate(self.layers):
            originals = self._originals[index]
            attention, ffn = (
                sum(_count(originals[name]) for name in self.sublayers[index][kind])
                for kind in (SKIP_ATTENTION, SKIP_FFN)
            )
            skipped = {id(module) for module in originals.values()}
            rest = sum(_count(child) for child in layer.children() if id(child) not in skipped)
            rest += sum(parameter.numel() for parameter in layer.parameters(recurse=False))
            counts.append((attention, ffn, rest))
        return counts

    def sublayer_parameters(self, index: int) -> tuple[int, int]:
        """Parameters of a layer's attention and of its FFN, including biases, inner norms and all experts."""
        return self._layer_parameters[index][:2]

    @cached_property
    def total_parameters(self) -> int:
        """Parameters of the model as it was given, tied ones counted once."""
        switched_off = {
            id(p) for modules in self._originals for module in modules.values() for p in module.parameters()
        }
        here = {id(p): p.numel() for p in self.model.parameters() if id(p) not in switched_off}
        return sum(here.values()) + sum(sum(self.sublayer_parameters(index)) for index in range(self.num_layers))

    def removed_parameters(self, plan: Plan) -> int:
        """Parameters that the plan removes: its sublayers, and everything else in layers removed whole."""
        removed, gone = 0, self.complete(plan).removed_layers
        for index, (attention, ffn, rest) in enumerate(self._layer_parameters):
            mode = plan.mode(index)
            removed += attention * (not mode.attention) + ffn * (not mode.ffn) + rest * (index in gone)
            if mode.experts_removed and (experts := self.experts[index]):
                removed += len(mode.experts_removed) * experts.parameters
        return removed


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
