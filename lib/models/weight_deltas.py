"""Changes that pruning made to a model's weights: one file per finished layer, while the model stays unmodified.

A weight that only lost elements is stored as one bit per element, any other in full.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.models.sealed_tensors import Sealed, broken, save_sealed

_ZEROS, _WEIGHT = "zeros.", "weight."  # prefixes of a weight's path within its layer
_FILE = "layer-{:05d}.safetensors"

Difference = tuple[str, torch.Tensor]  # a prefix: how the weight is stored; and the stored tensor


def difference(old: torch.Tensor, new: torch.Tensor) -> Difference:
    """The bit-exact change from `old` to `new`, both (out, in): a bitmap of new zeros, or `new` itself; on the CPU."""
    zeros = (new == 0) & ~new.signbit()
    bits = {4: torch.int32, 2: torch.int16, 8: torch.int64}[new.element_size()]  # where -0.0 differs from 0.0
    if torch.equal(new.view(bits), old.masked_fill(zeros, 0).view(bits)):
        return _ZEROS, torch.from_numpy(np.packbits(zeros.cpu().numpy().reshape(-1)))
    return _WEIGHT, new.detach().to("cpu", copy=True)


def with_zeros(old: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """The weight with zeros where the packed bits are set."""
    zeros = np.unpackbits(bits.numpy(), count=old.numel()).astype(bool).reshape(old.shape)
    return old.masked_fill(torch.from_numpy(zeros).to(old.device), 0)


class Changes:
    """The changed weights of a model's layers, in a folder, including those that an earlier run finished."""

    def __init__(self, folder: Path, owner: str = ""):
        """`owner` names the run and stage. Raises `InputError` for a broken file, and for one of another owner."""
        self.folder, self._owner = folder, owner
        self._changed: dict[int, dict[str, str]] = {}  # layer -> path of a weight -> its prefix
        self.notes: dict[int, Any] = {}  # JSON that a layer's changes were written with
        for path in sorted(folder.glob("layer-*.safetensors")):
            try:
                sealed, layer = Sealed(path, owner), int(path.stem.removeprefix("layer-"))
                kinds = [name.split(".", 1) for name in sealed.names]
                self._changed[layer] = {weight: f"{kind}." for kind, weight in kinds}
                self.notes[layer] = sealed.content
            except ValueError as error:
                raise broken(path, error) from error

    def __contains__(self, layer: int) -> bool:
        return layer in self._changed

    def write(self, layer: int, differences: Mapping[str, Difference], note: Any = None) -> None:
        """Writes the changes of a layer, {path within it: `difference`}, and a JSON `note` on them, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {kind + path: tensor for path, (kind, tensor) in differences.items()}
        save_sealed(self.folder / _FILE.format(layer), tensors, self._owner, note)
        self.add(layer, differences, note)

    def add(self, layer: int, differences: Mapping[str, Difference], note: Any = None) -> None:
        """Registers a layer that another process has written."""
        self._changed[layer] = {path: kind for path, (kind, _) in differences.items()}
        self.notes[layer] = note

    def apply(self, layer: int, path: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight of a layer with its change applied, or as given if it has none.

        The changes of a stack of experts' matrices are those of its matrices, each under the stack's path and a number.
        """
        changed = self._changed.get(layer, {})
        if path in changed:
            kind = changed[path]
            kept = Sealed(self.folder / _FILE.format(layer), self._owner).tensor(kind + path)
            return with_zeros(weight, kept) if kind == _ZEROS else kept.to(weight.device, copy=True)
        parts = [name for name in changed if name.rpartition(".")[0] == path and name.rpartition(".")[2].isdecimal()]
        if parts:
            weight = weight.clone()
            for name in parts:
                part = weight[int(name.rpartition(".")[2])]
                part.copy_(self.apply(layer, name, part))
        return weight
