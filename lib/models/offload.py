"""Models larger than the device or the host's memory: the weights of a decoder layer are fetched while it runs.

`cpu`: the weights are kept in host memory. `disk`: they are read from the checkpoint's own safetensors files each time,
and the changes made by pruning from separate files, so that host memory need not hold the model either. While a layer
runs, a thread fetches the next one.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from lib.models.modeling_pruned import LAYERS_NAMES, find_decoder, find_name
from lib.models.weight_deltas import Changes
from lib.runtime.memory import free_bytes, free_host_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FITS = 0.8  # share of the free memory that a model may take
_ROOM = 4  # layers for which there must be free memory before one is fetched ahead


class Weights(Protocol):
    """Tensors by their path within a layer."""

    def __getitem__(self, path: str, /) -> torch.Tensor: ...


class Ahead:
    """The layers of a model, of which a thread fetches the one that is likely to run next."""

    def __init__(self, device: torch.device):
        self.layers: dict[int, OffloadedLayer] = {}
        self._thread = ThreadPoolExecutor(1, "offload")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._last = -1
        self._after: dict[int, int] = {}  # the layer that ran after each, on the way up
        self._next: tuple[int, Future] | None = None

    def weights(self, index: int) -> dict[str, torch.Tensor]:
        """A layer's weights on its device, fetched ahead if it was expected; begins with the layer after it.

        What went wrong ahead, as too little memory, is tried again here.
        """
        found, layer = None, self.layers[index]
        if self._next and self._next[0] == index:
            (_, fetched), self._next = self._next, None
            found = None if fetched.exception() else fetched.result()
        if found is None:
            found = layer.fetch()
        elif self._stream:  # their memory is that stream's, and used by another
            for weight in found.values():
                weight.record_stream(torch.cuda.current_stream(layer.device))
        expected, size = self._expected(index), sum(weight.nbytes for weight in found.values())
        if expected not in self.layers or free_bytes(layer.device) < _ROOM * size:
            self._next = None
        elif not self._next or self._next[0] != expected:
            self._next = expected, self._thread.submit(self._fetch, expected)
        return found

    def forget(self, index: int) -> None:
        """Must be called when the weights of a layer changed."""
        if self._next and self._next[0] == index:
            self._next = None

    def _expected(self, index: int) -> int:
        """The layer that is likely to run after this one: on the way up, the one that did before."""
        last, self._last = self._last, index
        if index == last - 1:
            return index - 1
        if index > last:
            self._after[last] = index
        return self._after.get(index, index + 1)

    def _fetch(self, index: int) -> dict[str, torch.Tensor]:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            found = self.layers[index].fetch()
        if self._stream:
            self._stream.synchronize()
        return found


class OffloadedLayer:
    """The weights of one decoder layer, on the device only inside `here`."""

    def __init__(self, layer: nn.Module, index: int, device: torch.device, weights: Weights, ahead: Ahead):
        """`weights` holds the offloaded tensors, by path within the layer; `index` is the layer's position."""
        self.index, self.device = index, device
        self._changes: Sequence[Changes] = ()
        self._weights, self._uses, self._ahead = weights, 0, ahead
        ahead.layers[index] = self
        self._places = {
            f"{path}.{name}".lstrip("."): (module, name)
            for path, module in layer.named_modules()
            for name in module._parameters
            if module._parameters[name] is not None
        }
        self._waiting = {path: module._parameters[name] for path, (module, name) in self._places.items()}
        # `save_pretrained` reads offloaded weights from this attribute's `weights_map`.
        layer._hf_hook = self  # type: ignore[assignment]  # torch's stubs allow only tensors and modules

    @property
    def is_on_disk(self) -> bool:
        return any(parameter.is_meta for parameter in self._waiting.values())

    @property
    def changes(self) -> Sequence[Changes]:
        """What is applied, in order, to weights that are read from disk."""
        return self._changes

    @changes.setter
    def changes(self, changes: Sequence[Changes]) -> None:
        self._changes = changes
        self._ahead.forget(self.index)

    @property
    def weights_map(self) -> "OffloadedLayer":
        return self

    def __getitem__(self, path: str) -> torch.Tensor:
        """An offloaded weight of the layer, with the changes applied."""
        weight = self._weights[path]
        for changes in self.changes:
            weight = changes.apply(self.index, path, weight)
        return weight

    @contextmanager
    def here(self) -> Iterator[None]:
        """Inside the block, the layer has its weights on the device. May be nested."""
        if self._uses == 0:
            self._install()
        self._uses += 1
        try:
            yield
        finally:
            self._uses -= 1
            if self._uses == 0:
                self._release()

    @torch.no_grad()
    def fetch(self) -> dict[str, torch.Tensor]:
        """Copies of the weights on the device, so that memory-mapped files are read here and never written to."""
        return {path: self[path].to(self.device, copy=True) for path in self._places}

    def _install(self) -> None:
        weights = self._ahead.weights(self.index)
        for path, (module, name) in self._places.items():
            module._parameters[name] = nn.Parameter(weights.pop(path), requires_grad=False)

    def _release(self) -> None:
        for path, (module, name) in self._places.items():
            module._parameters[name] = self._waiting[path]

    @torch.no_grad()
    def keep(self) -> None:
        """Copies the layer's current weights to host memory. On disk, its changes are written already."""
        self._ahead.forget(self.index)
        if not self.is_on_disk and self._uses:
            for path, (module, name) in self._places.items():
                self._waiting[path].copy_(module._parameters[name])


def offloaded(layer: nn.Module) -> OffloadedLayer | None:
    """The offloaded weights of a layer, or None for a layer that is not offloaded."""
    found = getattr(layer, "_hf_hook", None)
    return found if isinstance(found, OffloadedLayer) else None


@contextmanager
def fetched_by_forward(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, each layer's forward fetches its weights, so that the model's own forward works, slowly."""
    stack: list = []

    def fetch(layer, args):
        if weights := offloaded(layer):
            stack.append(weights.here())
            stack[-1].__enter__()

    def release(layer, args, output):
        stack.pop().__exit__(None, None, None)

    hooks = []
    for layer in layers:
        if offloaded(layer):
            hooks += [layer.register_forward_pre_hook(fetch), layer.register_forward_hook(release, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Offloading a model ---------------------------------------------------------------------------------------------------


def choose(asked: str, outline: "PreTrainedModel | None", dtype: torch.dtype, device: torch.device) -> str:
    """`none`, `cpu` or `disk`: as asked, or for `auto` the first that fits into free memory.

    `outline` is the model without weights. If it is None, the size is unknown, and `auto` means `none`.
    """
    if asked != "auto" or outline is None:
        return asked if asked != "auto" else "none"
    size = sum(parameter.numel() for parameter in outline.parameters()) * dtype.itemsize
    host = free_host_memory()
    if device.type not in ("cpu", "cuda"):
        return "none"  # its free memory is unknown
    if device.type == "cuda":
        if size < _FITS * torch.cuda.mem_get_info(device)[0]:
            return "none"
        return "cpu" if size < _FITS * host else "disk"
    return "none" if size < _FITS * host else "disk"


def layers_of(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder layers of a model."""
    decoder = find_decoder(model)
    return getattr(decoder, find_name(decoder, LAYERS_NAMES))


def disk_map(outline: "PreTrainedModel", device: torch.device) -> dict[str, str]:
    """A device map for transformers that leaves the decoder layers on disk and puts everything else on the device."""
    layers, found = layers_of(outline), {}

    def place(module: nn.Module, path: str) -> None:
        if module is layers:
            found.update({f"{path}.{index}": "disk" for index in range(len(layers))})
        elif any(inner is layers for inner in module.modules()):
            for name, child in module.named_children():
                place(child, f"{path}.{name}".lstrip("."))
            found.update({f"{path}.{name}".lstrip("."): str(device) for name in module._parameters})
        elif path:
            found[path] = str(device)

    place(outline, "")
    return found


def offload_to_host(model: "PreTrainedModel", device: torch.device) -> None:
    """Offloads the decoder layers of a model in host memory, and moves everything else to the device."""
    layers, parent = layers_of(model), find_decoder(model)
    name = find_name(parent, LAYERS_NAMES)
    setattr(parent, name, nn.ModuleList())  # set aside while the rest moves
    model.to(device)  # type: ignore[arg-type]  # the decorator of `PreTrainedModel.to` loses its signature
    setattr(parent, name, layers)
    ahead = Ahead(device)
    for index, layer in enumerate(layers):
        _move_buffers(layer, device)
        OffloadedLayer(layer, index, device, dict(layer.named_parameters()), ahead)


def offload_to_disk(model: "PreTrainedModel", device: torch.device) -> None:
    """Replaces the hooks of a model that transformers loaded with `disk_map` by our own offloading."""
    from accelerate.hooks import remove_hook_from_module

    ahead = Ahead(device)
    for index, layer in enumerate(layers_of(model)):
        weights = _OnDisk(
            {
                f"{path}.{name}".lstrip("."): (module._hf_hook.weights_map, name)
                for path, module in layer.named_modules()
                for name in module._parameters
                if module._parameters[name] is not None
            }
        )
        remove_hook_from_module(layer, recurse=True)
        _move_buffers(layer, device)
        OffloadedLayer(layer, index, device, weights, ahead)
    for module in model.modules():
        if not isinstance(getattr(module, "_hf_hook", None), OffloadedLayer):
            remove_hook_from_module(module)


class _OnDisk(dict):
    """{path: (mapping that reads from files, name there)}; a lookup reads the weight."""

    def __getitem__(self, path: str) -> torch.Tensor:
        weights, name = super().__getitem__(path)
        return weights[name]


def _move_buffers(layer: nn.Module, device: torch.device) -> None:
    for module in layer.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def follow(layers: Iterable[nn.Module], changes: Sequence[Changes], besides: bool = False) -> None:
    """From now on, layers read from disk get these changes, applied in order; `besides` what they get already."""
    for layer in layers:
        if (found := offloaded(layer)) and found.is_on_disk:
            found.changes = [*(found.changes if besides else []), *changes]


def delete_with(model: nn.Module, folder: TemporaryDirectory) -> None:
    """Deletes a temporary folder when the model is garbage-collected."""
    weakref.finalize(model, folder.cleanup)
