"""Prunes GGUF files: removes attention or FFN from layers and copies all other weights, quantized or not, bit for bit.

Stock llama.cpp runs the result as its architecture `deci`, a Llama whose head counts and FFN width differ by layer.
The layout of the new file follows that architecture's code (src/models/deci.cpp, and `load_hparams` in
src/llama-model.cpp):

- A layer without attention has 0 heads, no attention tensors and no norm before them.
- An FFN of width 0 would make the graph skip the layer's attention too. A removed FFN is therefore written with width
  1 and zero weights.
- The head size and rotary size of all layers are read from layer 0, and only if it has heads. A first layer without
  attention is therefore written with one head whose weights are zero; it adds zeros to the hidden states.

What changed in the weights that stay comes from the model that a run, or a training since, saved (`gguf_changed`).

The optional package `gguf` of llama.cpp writes the files. A file that it could not reproduce is refused, and what was
written is read back and compared with the source before it appears under its name.
"""

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import prod
from pathlib import Path

from lib.config.plan import Changed, Plan
from lib.errors import RunError
from lib.export.gguf_changed import ChangedTensor, InMemory, Trained, read_changed
from lib.export.gguf_model import (
    ARCHITECTURE,
    ATTENTION,
    FFN,
    HEADS,
    KEY_LENGTH,
    KV_HEADS,
    PRUNED,
    VALUE_LENGTH,
    WIDTH,
    Block,
    GgufModel,
    read_gguf,
    split_name,
)
from lib.models.gguf_header import ALIGNMENT, Header, Tensor, read_header, refuse
from lib.storage.atomic import atomic_file
from lib.storage.model_folder import check_gguf_target

Layout = list[tuple[str, str | tuple[int, ...]]]  # tensors by name: name of the source's tensor, or shape of zeros
_AnyTensor = Tensor | ChangedTensor

_STALE = "general.parameter_count"
_COMPARED_AT_ONCE = 2**18  # bytes


@dataclass(frozen=True)
class GgufSize:
    """Layers and parameters of the model in a file, and the size of the file."""

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class GgufPruning:
    """The architecture of the source file, the sizes before and after pruning, and what was not copied.

    `changed` counts changed tensors by the names of their types: (in the source, as written).
    """

    architecture: str
    before: GgufSize
    after: GgufSize
    changed: Counter[tuple[str, str]]

    @property
    def changed_types(self) -> str:
        """How many changed tensors were written as which type."""
        return ", ".join(
            f"{count} as {new}{f' (gguf cannot write {old})' if new != old else ''}"
            for (old, new), count in self.changed.items()
        )


def apply_plan(
    source: Path, target: Path, plan: Plan, overwrite: bool = False, changed: Changed | Trained | None = None
) -> GgufPruning:
    """Writes a file without the sublayers that the plan removes, atomically.

    Raises `InputError` as `prune` does, and for an existing target unless it is another GGUF file and `overwrite`.
    """
    pruned = prune(source, plan, changed)
    if target.exists() and target.samefile(source):
        raise refuse(source, "would be written over itself; name another file to write")
    check_gguf_target(target, overwrite, "--gguf")
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as draft:
        return pruned.write(draft)


def read(source: Path, num_layers: int) -> GgufModel:
    """The file to prune. Raises `InputError` for one that cannot be pruned or has another number of layers."""
    model = read_gguf(source)
    if len(model.blocks) != num_layers:
        raise refuse(source, f"has {len(model.blocks)} blocks and the plan {num_layers} layers; give the plan's model")
    return model


def prune(source: Path, plan: Plan, changed: Changed | InMemory | Trained | None = None) -> "PrunedGguf":
    """The source without the sublayers that the plan removes; changed tensors as they became. Writes nothing.

    The layer numbers of the plan are the block numbers of the source. The source may have been pruned before. Raises
    `InputError` as `read` and `read_changed` do, and for a plan that leaves no attention or removes a sublayer that
    is already gone.
    """
    model = read(source, plan.num_layers)
    for what, removed, sizes in (
        ("attention", plan.mha_removed, [block.heads for block in model.blocks]),
        ("FFN", plan.ffn_removed, [block.width for block in model.blocks]),
    ):
        if gone := [index for index in removed if not sizes[index]]:
            raise refuse(source, f"block {gone[0]} has no {what} to remove; give the file that the plan was made for")
    left = prune_blocks(model.blocks, plan)
    if not any(block.heads for block in left.values()):
        raise refuse(source, "the plan leaves no attention; keep that of one layer")
    layout = arrange(model.tensors, left, model.hidden_size, model.head_size)
    tensors = read_changed(source, model, layout, changed) if changed else {}
    return PrunedGguf(source, model, left, layout, tensors)


@dataclass(frozen=True)
class PrunedGguf:
    """What a plan leaves of a file, ready to be written."""

    source: Path
    model: GgufModel
    left: Mapping[int, Block]
    layout: Layout
    changed: Mapping[str, ChangedTensor]

    def write(self, target: Path) -> GgufPruning:
        """Writes the new file, not atomically, and reads it back. Raises `InputError` and `RunError`."""
        model, layout = self.model, self.layout
        tensors = _new_tensors({**model.tensors, **self.changed}, layout)
        try:
            keys = _new_keys(model, add_stand_ins(self.left.values()))
            _write(target, model.header.is_big_endian, keys, tensors)
            if not _is_as_meant(read_header(target), keys, tensors):
                what = "its pruned file, read back, is not what was written"
                raise RunError(f"{self.source}: {what}; name another disk")
        except (ValueError, struct.error) as error:
            raise refuse(self.source, f"holds what the gguf package cannot write ({error})") from error
        whole = arrange(model.tensors, dict(enumerate(model.blocks)), model.hidden_size, model.head_size)
        return GgufPruning(
            model.architecture,
            GgufSize(len(model.blocks), _count_parameters(model, whole), self.source.stat().st_size),
            GgufSize(len(self.left), _count_parameters(model, layout), target.stat().st_size),
            Counter((model.tensors[name].kind.name, tensor.kind.name) for name, tensor in self.changed.items()),
        )


def _count_parameters(model: GgufModel, layout: Layout) -> int:
    """The number of elements in the tensors of a layout, without rotary tables and stand-in zeros."""
    kept = [origin for _, origin in layout if isinstance(origin, str) and not origin.startswith("rope_")]
    return sum(prod(model.tensors[name].shape) for name in kept)


def prune_blocks(blocks: Sequence[Block], plan: Plan) -> dict[int, Block]:
    """{block number in the source: what the plan leaves of the block}, without empty blocks."""
    left = [block.keep(mode.attention, mode.ffn) for block, mode in zip(blocks, plan.modes, strict=True)]
    return {index: block for index, block in enumerate(left) if block.heads or block.width}


def add_stand_ins(left: Iterable[Block]) -> list[Block]:
    """The blocks as written to the file: one head, or a width of 1, where zeros stand in for a removed sublayer."""
    blocks = [Block(block.heads, block.kv_heads, block.width or 1) for block in left]
    return [blocks[0] if blocks[0].heads else Block(1, 1, blocks[0].width), *blocks[1:]]


def arrange(names: Iterable[str], left: Mapping[int, Block], hidden_size: int, head_size: int) -> Layout:
    """The tensors of the new file in order: (name, name of the source tensor), or (name, shape) of zeros.

    Shapes are in GGUF order, row length first. The order of the tensors depends only on which sublayers are left, so
    pruning in two steps gives the same file as pruning in one.
    """
    numbers = {old: new for new, old in enumerate(left)}
    layout: Layout = []
    begun = set()
    for name in names:
        index, part = split_name(name)
        if index is None:
            layout.append((name, name))
            continue
        if index not in left:
            continue
        block, prefix = left[index], f"blk.{numbers[index]}."
        if index not in begun:
            begun.add(index)
            zeros = _zeros(block, numbers[index] == 0, hidden_size, head_size)
            layout += [(prefix + zero, shape) for zero, shape in zeros.items()]
        if (block.heads or part not in ATTENTION) and (block.width or part not in FFN):
            layout.append((prefix + part, name))
    return layout


def _zeros(block: Block, is_first: bool, hidden_size: int, head_size: int) -> dict[str, tuple[int, ...]]:
    """{name: shape} of the zero tensors that stand in for removed sublayers; see `add_stand_ins`."""
    zeros: dict[str, tuple[int, ...]] = {}
    if is_first and not block.heads:
        zeros["attn_norm.weight"] = (hidden_size,)
        zeros |= {f"{name}.weight": (hidden_size, head_size) for name in ("attn_q", "attn_k", "attn_v")}
        zeros["attn_output.weight"] = (head_size, hidden_size)
    if not block.width:
        zeros |= {f"{name}.weight": (hidden_size, 1) for name in ("ffn_gate", "ffn_up")}
        zeros["ffn_down.weight"] = (1, hidden_size)
    return zeros


def _new_tensors(tensors: Mapping[str, _AnyTensor], layout: Layout) -> dict[str, _AnyTensor]:
    """The tensors of the new file by name, in order."""
    import numpy
    from gguf import GGMLQuantizationType

    def zeros(shape: tuple[int, ...]) -> Tensor:
        return Tensor(shape, GGMLQuantizationType.F32, numpy.zeros(shape[::-1], numpy.float32).view(numpy.uint8))

    return {name: tensors[origin] if isinstance(origin, str) else zeros(origin) for name, origin in layout}


def _write(draft: Path, is_big_endian: bool, keys: dict[str, tuple], tensors: Mapping[str, _AnyTensor]) -> None:
    """Writes the new file; one tensor at a time is in memory."""
    import numpy
    from gguf import GGUFEndian, GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape

    endianess = GGUFEndian.BIG if is_big_endian else GGUFEndian.LITTLE
    with closing(GGUFWriter(draft, PRUNED, endianess=endianess)) as writer:
        for name, (value, *types) in keys.items():
            if name == ALIGNMENT:
                writer.add_custom_alignment(value)
            else:
                writer.add_key_value(name, value, *types)
        for name, tensor in tensors.items():
            shape = quant_shape_to_byte_shape(tensor.shape[::-1], tensor.kind)
            writer.add_tensor_info(name, shape, numpy.dtype(numpy.uint8), prod(shape), tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors.values():
            writer.write_tensor_data(tensor.data, endianess)


def _is_as_meant(written: Header, keys: dict[str, tuple], tensors: Mapping[str, _AnyTensor]) -> bool:
    """True if a file that was read back has these keys and tensors."""
    held = {name: key for name, key in written.keys.items() if name != ARCHITECTURE}
    if repr(held) != repr(keys) or list(written.tensors) != list(tensors):  # repr: NaN is itself
        return False
    return all(
        (found.shape, found.kind) == (tensor.shape, tensor.kind) and _same(found.data, tensor.data)
        for found, tensor in zip(written.tensors.values(), tensors.values(), strict=True)
    )


def _same(left, right) -> bool:
    """True if two arrays of the same shape, which may be larger than the memory, have the same bytes."""
    left, right = left.reshape(-1), right.reshape(-1)
    steps = range(0, len(left), _COMPARED_AT_ONCE)
    return all((left[at : at + _COMPARED_AT_ONCE] == right[at : at + _COMPARED_AT_ONCE]).all() for at in steps)


def _new_keys(model: GgufModel, blocks: Sequence[Block]) -> dict[str, tuple]:
    """The keys of the new file in the order of the source, without the architecture, which the writer adds first."""
    from gguf import GGUFValueType

    number, numbers = (GGUFValueType.UINT32,), (GGUFValueType.ARRAY, GGUFValueType.INT32)
    keys = {
        re.sub(rf"^{model.architecture}\.", f"{PRUNED}.", name): key
        for name, key in model.header.keys.items()
        if name not in (ARCHITECTURE, _STALE)
    }
    return keys | {
        f"{PRUNED}.block_count": (len(blocks), *number),
        f"{PRUNED}.{WIDTH}": ([block.width for block in blocks], *numbers),
        f"{PRUNED}.{HEADS}": ([block.heads for block in blocks], *numbers),
        f"{PRUNED}.{KV_HEADS}": ([block.kv_heads for block in blocks], *numbers),
        # Without them, llama.cpp divides the hidden size by the heads of the first block, which may have changed.
        f"{PRUNED}.{KEY_LENGTH}": (model.head_size, *number),
        f"{PRUNED}.{VALUE_LENGTH}": (model.head_size, *number),
    }
