"""A causal language model seen as a stack of decoder layers, whose sublayers can be switched off.

The architecture is found by structure: `Decoder` accepts every model whose layers are residual blocks of one attention
and one FFN, and tries that on the model itself; anything else is refused with the reason.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lib.config.plan import Mode, Plan
from lib.errors import InputError, is_out_of_memory
from lib.models.architecture import Architecture
from lib.models.modeling_pruned import (
    SKIP_ATTENTION,
    SKIP_FFN,
    skip_modules,
)
from lib.models.offload import OffloadedLayer, offloaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StopForward(Exception):
    """Ends a forward of the model where what was wanted of it has been seen; never leaves `lib`."""


@dataclass(frozen=True)
class LayerInputs:
    """What the model hands to each of its decoder layers besides the hidden states: masks, positions, rotary tables."""

    args: list[tuple] = field(default_factory=list)
    kwargs: list[dict] = field(default_factory=list)


class Decoder(Architecture):
    """A causal language model as embedding, layers of attention and FFN, and tail (norm, head, softcap).

    Nothing of the model's own forward is written again: the embedding and the layers' arguments come from a forward
    whose layers only look on, the tail from one whose layers hand over given hidden states. Raises `InputError` for
    a model that does not fit. A model without weights (on the meta device) can be counted but not run. A model that
    has lost sublayers before is one with less in some of its layers: `given_modes` says what each still has. A layer's
    weights may be elsewhere while it does not run, see `lib.models.offload`: `at` brings them.
    """

    def __init__(self, model: "PreTrainedModel", has_weights: bool = True):
        super().__init__(model)
        self.has_weights = has_weights
        self._modes = [Mode()] * len(self.layers)
        self._offloaded: list[OffloadedLayer | None] = [offloaded(layer) for layer in self.layers]
        self._returns_tuple = has_weights and self._layers_return_tuples()
        if has_weights:
            self._check_residual()

    @torch.no_grad()
    def _layers_return_tuples(self) -> bool:
        """What layers give, seen on a forward of two tokens that ends after the first."""
        forward, outputs = self.layers[0].forward, []

        def look(*args, **kwargs):
            outputs.append(forward(*args, **kwargs))
            raise StopForward

        with suppress(StopForward), self.at(0), self._layers_do([look] * len(self.layers)):
            self.model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        return bool(outputs) and isinstance(outputs[0], tuple)

    @torch.no_grad()
    def _check_residual(self) -> None:
        """A layer with both sublayers off must give back its input, or removing sublayers means something else.

        Tried on two tokens, once for every class of layer.
        """
        hidden_states, inputs = self.embed(torch.zeros(1, 2, dtype=torch.long))
        first_of_class = {type(layer): index for index, layer in reversed(list(enumerate(self.layers)))}
        for kind, index in first_of_class.items():
            reason = None
            try:
                self.set_mode(index, Mode(attention=False, ffn=False))
                with self.at(index):
                    output = self.layers[index](hidden_states.clone(), *inputs.args[index], **inputs.kwargs[index])
                output = output[0] if isinstance(output, tuple) else output
                if not torch.equal(output, hidden_states.to(output.device)):
                    reason = "normalizes the sum of input and sublayer (post-norm), or adds the input inside a sublayer"
            except (TypeError, ValueError, RuntimeError, AttributeError) as error:
                if is_out_of_memory(error):
                    raise
                reason = f"cannot run without its sublayers ({str(error).splitlines()[0]})"
            finally:
                self.set_mode(index, Mode())
            if reason:
                raise InputError(f"{self.family} does not fit: its layer ({kind.__name__}) {reason}")

    @property
    def device(self) -> torch.device:
        """Where token ids go: the device of the input embedding."""
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        return weight.device

    @property
    def token_bytes(self) -> int:
        """About the memory that a token takes while it passes a layer: eight of its states, and four of the widest."""
        weights = (parameter for parameter in self.layers.parameters() if parameter.is_floating_point())
        widths = (max(weight.shape[:2], default=1) for weight in weights)
        return (8 * self.config.hidden_size + 4 * max(widths, default=1)) * self.model.dtype.itemsize

    @property
    def is_offloaded(self) -> bool:
        """True when layers' weights come to the device only while they are worked with."""
        return any(self._offloaded)

    @property
    def is_on_disk(self) -> bool:
        """True when layers are read from disk, so that changes of their weights must be written there."""
        return any(layer.is_on_disk for layer in self._offloaded if layer)

    @property
    def waiting_device(self) -> torch.device:
        """Where hidden states of many windows wait: host memory, where that is how a large model fits."""
        return torch.device("cpu") if self.is_offloaded else self.device

    def at(self, index: int) -> AbstractContextManager[None]:
        """Inside, a layer's weights are where they are computed with. May be nested."""
        layer = self._offloaded[index]
        return layer.here() if layer else nullcontext()

    def keep(self, index: int) -> None:
        """To be called, inside `at`, after a layer's weights were changed in place."""
        if layer := self._offloaded[index]:
            layer.keep()

    # Switching sublayers

    def set_mode(self, index: int, mode: Mode) -> None:
        """Puts one layer into a mode: removed sublayers are replaced by modules that give zeros."""
        if mode == self._modes[index]:
            return
        layer = self.layers[index]
        for kind, is_on in ((SKIP_ATTENTION, mode.attention), (SKIP_FFN, mode.ffn)):
            originals = {name: self._originals[index][name] for name in self.sublayers[index][kind]}
            for name, module in (originals if is_on else skip_modules(layer, kind)).items():
                setattr(layer, name, module)
        self._modes[index] = mode

    def apply(self, plan: Plan) -> None:
        """Switches the plan's sublayers off, and all others on, in the model itself."""
        for index, mode in enumerate(plan.modes):
            self.set_mode(index, mode)

    # Running

    @contextmanager
    def _layers_do(self, functions: Sequence[Callable]) -> Iterator[None]:
        """Inside, a call of layer i runs `functions[i](hidden_states, *args, **kwargs)` in place of its forward."""
        kept = [vars(layer).get("forward") for layer in self.layers]
        try:
            for layer, function in zip(self.layers, functions, strict=True):
                vars(layer)["forward"] = function  # as an assignment, which takes a module ten times as long
            yield
        finally:
            for layer, forward in zip(self.layers, kept, strict=True):
                if forward is None:
                    del vars(layer)["forward"]
                else:
                    vars(layer)["forward"] = forward

    def _as_layer_output(self, hidden_states: torch.Tensor):
        return (hidden_states, None) if self._returns_tuple else hidden_states

    @torch.no_grad()
    def embed(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, LayerInputs]:
        """The first layer's input (B, T, D) for token ids (B, T), and what every layer gets besides it."""
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
            return first[0], inputs
        raise InputError(f"{self.family} does not fit: its forward does not call each decoder layer once")

    def run_layer(self, index: int, hidden_states: torch.Tensor, inputs: LayerInputs, mode: Mode) -> torch.Tensor:
        """The output (B, T, D) of one layer in a mode, for inputs from `embed` of the same (B, T).

        Autograd follows it, as it follows `logits`, where it is on and something asks for gradients.
        """
        if not mode.attention and not mode.ffn:
            return hidden_states
        self.set_mode(index, mode)
        with self.at(index):
            output = self.layers[index](hidden_states, *inputs.args[index], **inputs.kwargs[index])
        return output[0] if isinstance(output, tuple) else output

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The model's tail: the last layer's output (B, T, D) -> logits (B, T, V), in the model's dtype.

        T may be any number of tokens up to the context, since the tail looks at one token at a time.
        """

        def hand_over(*args, **kwargs):
            return self._as_layer_output(hidden_states)

        input_ids = torch.zeros(hidden_states.shape[:2], dtype=torch.long, device=self.device)
        with self._layers_do([hand_over] * len(self.layers)):
            return self.model(input_ids=input_ids, use_cache=False).logits
