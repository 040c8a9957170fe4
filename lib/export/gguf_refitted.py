"""Output projections that a run refitted, read from the model that it saved, or has, and quantized for a GGUF file.

Each gets the type of the tensor that it replaces where the package `gguf` can write that well, else Q8_0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config.model_files import weight_files
from lib.config.plan import Mode, Refitted
from lib.errors import InputError
from lib.export.gguf_model import GgufModel, split_name
from lib.models.gguf_header import refuse
from lib.storage.model_folder import signature

if TYPE_CHECKING:
    import torch

    from lib.models.decoder import Decoder

_PARTS = {"self_attn.o_proj": "attn_output.weight", "mlp.down_proj": "ffn_down.weight"}
_WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class Matrix:
    """A refitted projection: its shape with the row length first, and what reads it, as a tensor (rows, columns)."""

    shape: tuple[int, ...]
    read: Callable[[], "torch.Tensor"]


class InMemory:
    """Refitted projections of a model in memory."""

    place = "the model"

    def __init__(self, decoder: "Decoder", projections: Iterable[tuple[int, str]]):
        """`projections`: each by the number of its layer and the path of the module within it."""
        self.decoder, self.projections = decoder, tuple(projections)

    def find(self, layer: int, projection: str, number: int) -> Matrix:
        read = partial(self._read, layer, projection)
        return Matrix(tuple(read().shape[::-1]), read)

    def _read(self, layer: int, projection: str) -> "torch.Tensor":
        self.decoder.set_mode(layer, Mode())  # whatever ran last
        with self.decoder.at(layer):
            return self.decoder.layers[layer].get_parameter(f"{projection}.weight").detach().cpu()


class _InFolder:
    """Those in the model that a run saved. Raises `InputError` when it is not there as the run left it."""

    def __init__(self, refitted: Refitted):
        self.projections, self._is_masked, folder = refitted.projections, refitted.is_masked, refitted.folder
        if not folder:
            raise _gone(refitted, "saved no model to take them from")
        if signature(folder) != refitted.signature:
            raise _gone(refitted, f"saved them in {folder}, which is gone or was changed")
        self.place, self._matrices = folder, _saved_matrices(folder)

    def find(self, layer: int, projection: str, number: int) -> Matrix:
        name = f"{layer if self._is_masked else number}.{projection}.weight"
        return self._matrices[_find(self.place, self._matrices, name)]


@dataclass(frozen=True)
class RefittedTensor:
    """A refitted projection in a GGUF file, and the type that it gets there."""

    kind: Any
    matrix: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        return self.matrix.shape

    @property
    def data(self) -> Any:
        """A uint8 array (rows, bytes of a row) of little-endian numbers, as in `gguf_header.Tensor`. Not kept."""
        import numpy
        from gguf import quants

        matrix = self.matrix.read().float().contiguous().numpy()
        return quants.quantize(matrix, self.kind).view(numpy.uint8)


def read_refitted(
    source: Path, model: GgufModel, layout: Sequence[tuple[str, object]], refitted: Refitted | InMemory
) -> dict[str, RefittedTensor]:
    """{name of a tensor in the source: what replaces it}, for a source that is written in a layout of `gguf.arrange`.

    Raises `InputError` when the saved model is not there as the run left it, and for a source without these tensors.
    """
    found_in = _InFolder(refitted) if isinstance(refitted, Refitted) else refitted
    if model.header.is_big_endian:
        reason = "is big-endian, for which refitted weights cannot be quantized"
        raise refuse(source, f"{reason}; convert it with gguf-convert-endian FILE little")
    new_names = {origin: name for name, origin in layout}
    found = {}
    for layer, projection in found_in.projections:
        old = f"blk.{layer}.{_PARTS.get(projection)}"
        if old not in new_names:
            what = f"holds no {projection} of layer {layer}, which the plan's run refitted"
            raise refuse(source, f"{what}; give the file that the plan was made for")
        number, _ = split_name(new_names[old])
        assert number is not None, "a projection lies in a block"
        matrix, tensor = found_in.find(layer, projection, number), model.tensors[old]
        if matrix.shape != tensor.shape:
            what = f"tensor {old} is {list(tensor.shape)}, and {list(matrix.shape)} in {found_in.place}"
            raise refuse(source, f"{what}; give the file that the plan was made for")
        found[old] = RefittedTensor(_kind(tensor.kind, matrix.shape[0]), matrix)
    return found


def _gone(refitted: Refitted, reason: str) -> InputError:
    what = f"--gguf: the run of {refitted.result} refitted {len(refitted.projections)} output projections and {reason}"
    advice = f"--apply_plan {refitted.result} --save_model OUT with its --compensate"
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
