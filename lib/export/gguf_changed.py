"""Weights that replace those of a GGUF file: linears that a run changed, or all that a folder holds after a training.

Each gets the type of the tensor that it replaces where the package `gguf` can write that well, else Q8_0. The rows of
queries and keys are in another order there, see `reordered`.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config.model_files import ADAPTER_FILE, adapter_advice, weight_files
from lib.config.plan import Changed, Mode, Plan
from lib.errors import InputError
from lib.export.gguf_model import FFN_NORM, GgufModel, split_name
from lib.files import read_json
from lib.models.gguf_header import refuse
from lib.storage.model_folder import signature

if TYPE_CHECKING:
    import torch

    from lib.models.decoder import Decoder

_PARTS = {  # of a block: module of transformers' Llama, the part of a tensor's name here
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_ROTARY = ("rope_", "rotary_emb.")  # tables, which no training changes: in a file; in a folder
_WRITTEN = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@dataclass(frozen=True)
class Matrix:
    """A weight or bias: its shape, row length first, and what reads it, as a tensor of that shape reversed."""

    shape: tuple[int, ...]
    read: Callable[[], "torch.Tensor"]


class _Linears:
    """Linears that a run changed, each by the number of its layer and the path of the module within it."""

    linears: tuple[tuple[int, str], ...]

    def find(self, layer: int, path: str, number: int) -> Matrix:
        """The weight of one, whose layer has a new number in the pruned model."""
        raise NotImplementedError

    def pairs(
        self, source: Path, new_names: Mapping[str, str], tensors: Mapping[str, object]
    ) -> Iterator[tuple[str, Matrix]]:
        """Their weights, by the names of the tensors that they replace. Raises `InputError`."""
        for layer, path in self.linears:
            old = f"blk.{layer}.{_PARTS.get(path)}.weight"
            if old not in new_names:
                what = f"holds no {path} of layer {layer}, which the plan's run changed"
                raise refuse(source, f"{what}; give the file that the plan was made for")
            number, _ = split_name(new_names[old])
            assert number is not None, "a linear lies in a block"
            yield old, self.find(layer, path, number)


class InMemory(_Linears):
    """Changed linears of a model in memory."""

    place = "the model"

    def __init__(self, decoder: "Decoder", linears: Iterable[tuple[int, str]]):
        self.decoder, self.linears = decoder, tuple(linears)

    def find(self, layer: int, path: str, number: int) -> Matrix:
        read = partial(self._read, layer, path)
        return Matrix(tuple(read().shape[::-1]), read)

    def _read(self, layer: int, path: str) -> "torch.Tensor":
        self.decoder.set_mode(layer, Mode())  # whatever ran last
        with self.decoder.at(layer):
            return self.decoder.layers[layer].get_parameter(f"{path}.weight").detach().cpu()


class _InFolder(_Linears):
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


class Trained:
    """All weights of a folder: a model that a plan pruned and any tool trained since, or that stayed unpruned.

    Raises `InputError` for a folder without weights in safetensors, an adapter, and a model that the plan does not fit.
    """

    def __init__(self, folder: Path, plan: Plan):
        self.place, flag = folder, f"--gguf_weights {folder}"
        if (folder / ADAPTER_FILE).is_file():
            raise InputError(f"{flag}: {adapter_advice(str(folder))}")
        self._matrices = _saved_matrices(folder) if folder.is_dir() else {}
        if not self._matrices:
            raise InputError(f"{flag}: holds no weights in safetensors; give the folder of the trained model")
        try:
            config = read_json(folder / "config.json")
            self._numbers = plan.numbers_in(config["num_hidden_layers"])
            if config.get("tie_word_embeddings"):
                self._matrices.pop("lm_head.weight", None)  # some trainers save the embeddings again under this name
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            what = f"the plan does not fit its config.json ({error})"
            raise InputError(f"{flag}: {what}; give a model that this plan pruned") from error

    def pairs(
        self, source: Path, new_names: Mapping[str, str], tensors: Mapping[str, object]
    ) -> Iterator[tuple[str, Matrix]]:
        """All weights that stay, by the names of the tensors that they replace. Raises `InputError` when one is lost.

        The norm before a removed FFN is that of the source: it acts on nothing, and not every format keeps it.
        """
        wanted = {name for name in new_names if not name.startswith(_ROTARY) and _has_use(name, new_names)}
        missing = set(wanted)
        advice = "give a file that was converted from the same model"
        for name, matrix in self._matrices.items():
            old = self._tensor_of(name)
            if old in missing:
                missing.remove(old)
                yield old, matrix
            elif old in wanted or old not in tensors and not any(table in name for table in _ROTARY):
                raise refuse(source, f"has no tensor for {name} of {self.place}; {advice}")
        if missing:
            raise refuse(source, f"tensor {min(missing)} is in no file of {self.place}; {advice}")

    def _tensor_of(self, name: str) -> str | None:
        """The name in a GGUF file of a tensor of the folder; None for one of no Llama."""
        if block := re.fullmatch(r"(?:.+\.)?layers\.([0-9]{1,5})\.(.+)\.(weight|bias)", name):
            number, part = int(block[1]), _PARTS.get(block[2])
            known = part and number < len(self._numbers)
            return f"blk.{self._numbers[number]}.{part}.{block[3]}" if known else None
        *_, module, kind = f".{name}".split(".")
        return f"{_OUTSIDE[module]}.{kind}" if module in _OUTSIDE else None


@dataclass(frozen=True)
class ChangedTensor:
    """A changed weight or bias in a GGUF file, and the type that it gets there."""

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
    """Queries or keys (rows, ...) for llama.cpp, which rotates neighbours where transformers rotates halves."""
    rows = len(weight)
    return weight.view(heads, 2, rows // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def read_changed(
    source: Path, model: GgufModel, layout: Sequence[tuple[str, object]], changed: Changed | InMemory | Trained
) -> dict[str, ChangedTensor]:
    """{name of a tensor in the source: what replaces it}, for a source that is written in a layout of `gguf.arrange`.

    Raises `InputError` when the saved model is not there as the run left it, and for a source without these tensors.
    """
    found_in = _InFolder(changed) if isinstance(changed, Changed) else changed
    if model.header.is_big_endian:
        reason = "is big-endian, for which changed weights cannot be quantized"
        raise refuse(source, f"{reason}; convert it with gguf-convert-endian FILE little")
    new_names = {origin: name for name, origin in layout if isinstance(origin, str)}
    found = {}
    for old, matrix in found_in.pairs(source, new_names, model.tensors):
        tensor = model.tensors[old]
        if matrix.shape != tensor.shape:
            what = f"tensor {old} is {list(tensor.shape)}, and {list(matrix.shape)} in {found_in.place}"
            raise refuse(source, f"{what}; give the file that the plan was made for")
        layer, part = split_name(old)
        block = None if layer is None else model.blocks[layer]
        heads = {"attn_q": block.heads, "attn_k": block.kv_heads}.get(part.split(".")[0]) if block else None
        found[old] = ChangedTensor(_kind(tensor.kind, matrix.shape[0]), matrix, heads)
    return found


def _has_use(name: str, names: Collection[str]) -> bool:
    """False for the norm of an FFN without matrices."""
    return not name.endswith(FFN_NORM) or name.replace(FFN_NORM, "ffn_down.weight") in names


def _gone(changed: Changed, reason: str) -> InputError:
    what = f"--gguf: the run of {changed.plan} refitted {len(changed.linears)} output projections and {reason}"
    advice = f"--apply_plan {changed.plan} --save_model OUT with its --compensate"
    return InputError(f"{what}; run {advice}, and give the result.json of that run")


def _saved_matrices(folder: Path) -> dict[str, Matrix]:
    """The tensors in the safetensors files of a model, by name. Raises `InputError` for a file that is none."""
    from safetensors import SafetensorError, safe_open

    found = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as weights:
                    for name in weights.keys():
                        shape = tuple(weights.get_slice(name).get_shape()[::-1])
                        found[name] = Matrix(shape, partial(_read, file, name))
            except (SafetensorError, OSError) as error:
                what = f"{file} cannot be read as safetensors ({error})"
                raise InputError(f"--gguf: {what}; copy the file again") from error
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
