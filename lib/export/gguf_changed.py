"""Linears that a run changed, read from the model that it saved, or has, and quantized for a GGUF file.

Each gets the type of the tensor that it replaces where the package `gguf` can write that well, else Q8_0. The rows of
queries and keys are in another order there, see `reordered`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config.model_files import weight_files
from lib.config.plan import Changed, Mode
from lib.errors import InputError
from lib.export.gguf_model import GgufModel, split_name
from lib.models.gguf_header import refuse
from lib.storage.model_folder import signature

if TYPE_CHECKING:
    import torch

    from lib.models.decoder import Decoder

_QUERIES, _KEYS = "self_attn.q_proj", "self_attn.k_proj"
_PARTS = {
    _QUERIES: "attn_q.weight",
    _KEYS: "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}
_WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class Matrix:
    """The weight of a changed linear: its shape, row length first, and what reads it, as a tensor (rows, columns)."""

    shape: tuple[int, ...]
    read: Callable[[], "torch.Tensor"]


class InMemory:
    """Changed linears of a model in memory."""

    place = "the model"

    def __init__(self, decoder: "Decoder", linears: Iterable[tuple[int, str]]):
        """`linears`: each by the number of its layer and the path of the module within it."""
        self.decoder, self.linears = decoder, tuple(linears)

    def find(self, layer: int, path: str, number: int) -> Matrix:
        read = partial(self._read, layer, path)
        return Matrix(tuple(read().shape[::-1]), read)

    def _read(self, layer: int, path: str) -> "torch.Tensor":
        self.decoder.set_mode(layer, Mode())  # whatever ran last
        with self.decoder.at(layer):
            return self.decoder.layers[layer].get_parameter(f"{path}.weight").detach().cpu()


class _InFolder:
    """Those in the model that a run saved. Raises `InputError` when it is not there as the run left it."""

    def __init__(self, changed: Changed):
        self.linears, self._is_masked, folder = changed.linears, changed.is_masked, changed.folder
        if not folder:
            raise _gone(changed, "saved no model to take them from")
        if changed.signature is not None and signature(folder) != changed.signature:
            raise _gone(changed, f"saved them in {folder}, which is gone or was changed")
        self.place, self._matrices = folder, _saved_matrices(folder)
        if not self._matrices:
            raise InputError(f"--gguf: {folder} holds no weights beside its plan; give the folder of the saved model")

    def find(self, layer: int, path: str, number: int) -> Matrix:
        name = f"{layer if self._is_masked else number}.{path}.weight"
        return self._matrices[_find(self.place, self._matrices, name)]


@dataclass(frozen=True)
class ChangedTensor:
    """A changed linear in a GGUF file, and the type that it gets there."""

    kind: Any
    matrix: Matrix
    heads: int | None = None  # of queries or keys

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def data(self) -> Any:
        """A uint8 array (rows, bytes of a row) of little-endian numbers, as in `gguf_header.Tensor`. Not kept."""
        import numpy
        from gguf import quants

        weight = self.matrix.read().float()
        weight = reordered(weight, self.heads) if self.heads else weight
        return quants.quantize(weight.contiguous().numpy(), self.kind).view(numpy.uint8)


def reordered(weight: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Queries or keys (rows, columns) for llama.cpp, which rotates neighbours where transformers rotates halves."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def read_changed(
    source: Path, model: GgufModel, layout: Sequence[tuple[str, object]], changed: Changed | InMemory
) -> dict[str, ChangedTensor]:
    """{name of a tensor in the source: what replaces it}, for a source that is written in a layout of `gguf.arrange`.

    Raises `InputError` when the saved model is not there as the run left it, and for a source without these tensors.
    """
    found_in = _InFolder(changed) if isinstance(changed, Changed) else changed
    if model.header.is_big_endian:
        reason = "is big-endian, for which changed weights cannot be quantized"
        raise refuse(source, f"{reason}; convert it with gguf-convert-endian FILE little")
    new_names = {origin: name for name, origin in layout}
    found = {}
    for layer, path in found_in.linears:
        old = f"blk.{layer}.{_PARTS.get(path)}"
        if old not in new_names:
            what = f"holds no {path} of layer {layer}, which the plan's run changed"
            raise refuse(source, f"{what}; give the file that the plan was made for")
        number, _ = split_name(new_names[old])
        assert number is not None, "a linear lies in a block"
        matrix, tensor = found_in.find(layer, path, number), model.tensors[old]
        if matrix.shape != tensor.shape:
            what = f"tensor {old} is {list(tensor.shape)}, and {list(matrix.shape)} in {found_in.place}"
            raise refuse(source, f"{what}; give the file that the plan was made for")
        block = model.blocks[layer]
        heads = {_QUERIES: block.heads, _KEYS: block.kv_heads}.get(path)
        found[old] = ChangedTensor(_kind(tensor.kind, matrix.shape[0]), matrix, heads)
    return found


def _gone(changed: Changed, reason: str) -> InputError:
    what = f"--gguf: the run of {changed.plan} refitted {len(changed.linears)} output projections and {reason}"
    advice = f"--apply_plan {changed.plan} --save_model OUT with its --compensate"
    return InputError(f"{what}; run {advice}, and give the result.json of that run")


def _saved_matrices(folder: Path) -> dict[str, Matrix]:
    """The tensors in the safetensors files of a model, by name."""
    from safetensors import safe_open

    found = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                for name in weights.keys():
                    shape = tuple(weights.get_slice(name).get_shape()[::-1])
                    found[name] = Matrix(shape, partial(_read, file, name))
    return found


def _read(file: Path, name: str) -> "torch.Tensor":
    from safetensors import safe_open

    with safe_open(file, "pt") as weights:
        return weights.get_tensor(name)


def _find(folder: Path, names: Iterable[str], end: str) -> str:
    """The name that ends so, whatever stands before its layer number. Raises `InputError` unless there is one."""
    found = [name for name in names if name == end or name.endswith(f".{end}")]
    if len(found) != 1:
        advice = "save the model with --save_format masked and convert that"
        raise InputError(f"--gguf: {folder} holds {len(found)} tensors {end} in place of one; {advice}")
    return found[0]


def _kind(kind: Any, row_length: int) -> Any:
    """The type that a tensor gets in place of one of this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if kind.name in _WRITTEN:
        return kind
    fallback = GGMLQuantizationType.Q8_0
    return GGMLQuantizationType.F32 if row_length % GGML_QUANT_SIZES[fallback][0] else fallback
