"""A causal language model as a stack of decoder layers whose sublayers can be switched off.

The architecture is recognized by its structure. `Decoder` accepts every model whose layers are residual blocks of one
attention and one FFN, and checks this by running the model. It rejects all others with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib.config.plan import Mode, Plan
from lib.errors import InputError, first_line, is_out_of_memory
from lib.models.architecture import Architecture
from lib.models.modeling_pruned import (
    SKIP_ATTENTION,
    SKIP_FFN,
    cache_types,
    number_layers,
    skip_modules,
)
from lib.models.offload import OffloadedLayer, offloaded
from lib.models.shared_kv import SharedKV
from lib.runtime.memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT_FREE, _STATES = 0.3, 0.5  # of a device's memory, for all else; of what is free beyond it, for hidden states


class StopForward(Exception):
    """Ends a forward pass early, once the values of interest are captured. Always caught within `lib`."""


@dataclass(frozen=True)
class LayerInputs:
    """Inputs of each decoder layer besides the hidden states: masks, positions, rotary tables."""

    args: list[tuple] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)


class Decoder(Architecture):
    """A causal language model as embedding, layers of attention and FFN, and tail (norm, head, softcap).

    The model's own forward is never reimplemented. The embedding and the layers' arguments are captured from a forward
    pass whose layers return their input. The tail runs in a forward pass whose layers return given hidden states.
    Raises `InputError` for a model that does not fit.

    A model without weights (on the meta device) can be counted but not run. A model pruned earlier lacks sublayers in
    some layers, see `given_modes`. A layer may be offloaded while it does not run, see `lib.models.offload`; `at`
    fetches its weights.
    """

    def __init__(self, model: "PreTrainedModel", has_weights: bool = True):
        super().__init__(model)
        self.has_weights = has_weights
        self._modes = [Mode()] * len(self.layers)
        self._returns: list[dict[str, int]] = [{}] * len(self.layers)  # numbers of values, by module of a sublayer
        self._skipped: dict[tuple[int, str], dict[str, nn.Module]] = {}
        self._offloaded: list[OffloadedLayer | None] = [offloaded(layer) for layer in self.layers]
        self._shared_kv = SharedKV(self.config, self.layers)
        self._num_values = self._values_of_layers() if has_weights else None
        if has_weights:
            self._check_residual()

    @torch.no_grad()
    def _values_of_layers(self) -> int | None:
        """How many values a layer returns, None for a tensor that is not in a tuple.

        Found in a forward pass of two tokens that stops after the first layer.
        """
        forward, outputs = self.layers[0].forward, []

        def look(*args, **kwargs):
            outputs.append(forward(*args, **kwargs))
            raise StopForward

        with suppress(StopForward), self.at(0), self._layers_do([look] * len(self.layers)):
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        return len(outputs[0]) if outputs and isinstance(outputs[0], tuple) else None

    @torch.no_grad()
    def _check_residual(self) -> None:
        """Checks that a layer with both sublayers off returns its input; else removing them would mean something else.

        Runs two tokens, once for every kind of layer. Raises `InputError` for a kind that fails.
        """
        embedded, inputs = self.embed(torch.zeros(1, 2, dtype=torch.long))
        # Not what was embedded: zeros, as for a token that pads, come out of anything unchanged
        hidden_states = (
            torch.linspace(-1, 1, embedded.numel(), dtype=embedded.dtype).to(embedded.device).view_as(embedded)
        )
        alike: dict[tuple, list[int]] = {}
        for index, layer in enumerate(self.layers):
            alike.setdefault((type(layer), *map(type, layer.children())), []).append(index)
        for (kind, *_), indices in alike.items():
            index, reason = indices[0], None
            try:
                with self.at(index):
                    returns = self._numbers_of_values(index, hidden_states, inputs)
                    self._returns = [returns if i in indices else one for i, one in enumerate(self._returns)]
                    self.set_mode(index, Mode(attention=False, ffn=False))
                    output = self._call(index, hidden_states.clone(), inputs)
                if not torch.equal(output, hidden_states.to(output.device)):
                    reason = "scales or normalizes the residual stream, so that no layer can be left out"
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                if is_out_of_memory(error):
                    raise
                reason = f"cannot run without its sublayers ({first_line(error)})"
            finally:
                self.set_mode(index, Mode())
            if reason:
                raise InputError(f"{self.family} does not fit: its layer ({kind.__name__}) {reason}")

    def _numbers_of_values(self, index: int, hidden_states: torch.Tensor, inputs: LayerInputs) -> dict[str, int]:
        """How many values the modules of a layer's sublayers return, by their names."""
        found: dict[str, int] = {}

        def look(module, args, output, name: str) -> None:
            found[name] = len(output) if isinstance(output, tuple) else 1

        with ExitStack() as hooks:
            for kind in (SKIP_ATTENTION, SKIP_FFN):
                for name, module in self.sublayer_modules(index, kind).items():
                    hook = module.register_forward_hook(partial(look, name=name))
                    hooks.callback(hook.remove)
            self._call(index, hidden_states.clone(), inputs)
        return found

    @property
    def device(self) -> torch.device:
        """The device of the input embedding, where token ids go."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.device

    @property
    def token_bytes(self) -> int:
        """Approximate memory of a token in a layer: eight hidden states, and four vectors of the widest weight."""
        weights = (parameter for parameter in self.layers.parameters() if parameter.is_floating_point())
        widths = (max(weight.shape[:2], default=1) for weight in weights)
        return (8 * self.config.hidden_size + 4 * max(widths, default=1)) * self.model.dtype.itemsize

    @property
    def is_offloaded(self) -> bool:
        """True if the layers' weights are on the device only while they are in use."""
        return any(self._offloaded)

    @property
    def is_on_disk(self) -> bool:
        """True if layers are read from disk, so that changes to their weights must be written there."""
        return any(layer.is_on_disk for layer in self._offloaded if layer)

    def waiting_device(self, nbytes: int) -> torch.device:
        """Where so many bytes of hidden states are kept between layers.

        With an offloaded model it is host memory, unless the device has much more room than they and a layer take.
        """
        if not self.is_offloaded or self.device.type != "cuda":
            return self.device
        total = torch.cuda.get_device_properties(self.device).total_memory
        fits = nbytes < _STATES * (free_bytes(self.device) - _KEPT_FREE * total)
        return self.device if fits else torch.device("cpu")

    def at(self, index: int) -> AbstractContextManager[None]:
        """Inside the block, a layer's weights are on the device that computes with them. May be nested."""
        layer = self._offloaded[index]
        return layer.here() if layer else nullcontext()

    def keep(self, index: int) -> None:
        """Must be called, inside `at`, after a layer's weights were changed in place."""
        if layer := self._offloaded[index]:
            layer.keep()

    # Switching sublayers

    def set_mode(self, index: int, mode: Mode) -> None:
        """Puts one layer into a mode: sublayers that are off are replaced by modules that return zeros."""
        if mode == self._modes[index]:
            return
        layer = self.layers[index]
        for kind, is_on in ((SKIP_ATTENTION, mode.attention), (SKIP_FFN, mode.ffn)):
            modules = self.sublayer_modules(index, kind) if is_on else self._skipped_modules(index, kind)
            for name, module in modules.items():
                setattr(layer, name, module)
        if mode.experts_removed != self._modes[index].experts_removed:
            experts = self.experts[index]
            assert experts, "a layer that loses experts has some"
            experts.remove(mode.experts_removed)
        self._modes[index] = mode

    def _skipped_modules(self, index: int, kind: str) -> dict[str, nn.Module]:
        """What stands for the modules of a sublayer that is off, by their names; made once."""
        if (index, kind) not in self._skipped:
            self._skipped[index, kind] = skip_modules(self.layers[index], kind, self._returns[index])
        return self._skipped[index, kind]

    def apply(self, plan: Plan) -> None:
        """Switches the plan's sublayers off, and all others on, in the model itself."""
        for index, mode in enumerate(plan.modes):
            self.set_mode(index, mode)

    @contextmanager
    def under(self, plan: Plan) -> Iterator[None]:
        """Inside the block, the model's own forward and `generate` are those of the pruned model; then all are on.

        Attentions have the slots of the key-value cache that `number_layers` gives them.
        """
        layer_types = getattr(self.config, "layer_types", None)
        try:
            self.apply(plan)
            if layer_types:
                with suppress(AttributeError):  # where they are computed from other entries
                    self.config.layer_types = cache_types(layer_types, self.layers)
            number_layers(self.layers, getattr(self.config, "layer_types", None))
            yield
        finally:
            self.apply(Plan(self.num_layers))
            if layer_types:
                with suppress(AttributeError):
                    self.config.layer_types = layer_types
            number_layers(self.layers, layer_types)

    # Running

    @contextmanager
    def _layers_do(self, functions: Sequence[Callable]) -> Iterator[None]:
        """Inside the block, layer i runs `functions[i](hidden_states, *args, **kwargs)` instead of its forward."""
        kept = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer, function in zip(self.layers, functions, strict=True):
                vars(layer)["forward"] = function  # `setattr` on a module takes ten times as long
            yield
        finally:
            for layer, forward in zip(self.layers, kept, strict=True):
                if forward is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = forward

    def _as_layer_output(self, hidden_states: torch.Tensor):
        return hidden_states if self._num_values is None else (hidden_states, *[None] * (self._num_values - 1))

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, LayerInputs]:
        """The first layer's input (B, T, D) for token ids (B, T), and the other inputs of every layer.

        Where layers share keys and values, these are carried in the last dimension, see `shared_kv`; `stream` takes
        them off.
        """
        inputs = LayerInputs()
        first: list[torch.Tensor] = []

        def look_on(hidden_states, *args, **kwargs):
            if not first:
                first.append(hidden_states)
            inputs.args.append(args)
            inputs.kwargs.append(kwargs)
            if len(inputs.args) == len(self.layers):
                raise StopForward
            return self._as_layer_output(hidden_states)

        try:
            with self._layers_do([look_on] * len(self.layers)):
                self.model(input_ids=input_ids.to(self.device), use_cache=False)
        except StopForward:
            if first[0].dim() != 3:
                reason = "its layers pass on several hidden states for each token"
                raise InputError(f"{self.family} does not fit: {reason}") from None
            return self._shared_kv.start(first[0]), inputs
        raise InputError(f"{self.family} does not fit: its forward does not call each decoder layer once")

    def run_layer(self, index: int, hidden_states: torch.Tensor, inputs: LayerInputs, mode: Mode) -> torch.Tensor:
        """The output (B, T, D) of one layer in a mode, with the inputs from `embed` for the same (B, T).

        Differentiable, like `logits`.
        """
        if not mode.attention and not mode.ffn:
            return hidden_states
        self.set_mode(index, mode)
        with self.at(index):
            return self._call(index, hidden_states, inputs)

    def _call(self, index: int, hidden_states: torch.Tensor, inputs: LayerInputs) -> torch.Tensor:
        return self._shared_kv.run(index, self.layers[index], hidden_states, inputs.args[index], inputs.kwargs[index])

    def stream(self, states: torch.Tensor) -> torch.Tensor:
        """The residual stream (B, T, D) alone, of what `run_layer` takes and returns."""
        return self._shared_kv.stream(states)

    @property
    def state_width(self) -> int:
        """The last dimension of what `run_layer` takes and returns."""
        return self._shared_kv.state_width

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The model's tail: the last layer's output (B, T, D) -> logits (B, T, V), in the model's dtype.

        T may be any number of tokens up to the context, since the tail treats each token separately.
        """

        def hand_over(*args, **kwargs):
            return self._as_layer_output(self.stream(hidden_states))

        input_ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=self.device)
        with self._layers_do([hand_over] * len(self.layers)):
            return self.model(input_ids=input_ids, use_cache=False).logits
