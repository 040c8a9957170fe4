"""Prunes GGUF files: removes attention or FFN from layers and copies all other weights, quantized or not, bit for bit.

Stock llama.cpp runs the result as its architecture `deci`, a Llama whose head counts and FFN width differ by layer.
The layout of the new file follows that architecture's code (src/models/deci.cpp, and `load_hparams` in
src/llama-model.cpp):

- A layer without attention has 0 heads, no attention tensors and no norm before them.
- An FFN of width 0 would make the graph skip the layer's attention too. A removed FFN is therefore written with width
  1 and zero weights.
- The head size and rotary size of all layers are read from layer 0, and only if it has heads. A first layer without
  attention is therefore written with one head whose weights are zero; it adds zeros to the hidden states.

The optional package `gguf` of llama.cpp reads and writes the files. A file that it could not reproduce is refused.
"""

import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.config.plan import Plan
from lib.errors import InputError
from lib.storage.atomic import atomic_file, check_writable

PRUNABLE, PRUNED = ("llama", "deci"), "deci"

_PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
ATTENTION = {"attn_norm.weight", *(f"{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias"))}
FFN = {f"{name}.{kind}" for name in ("ffn_gate", "ffn_up", "ffn_down") for kind in ("weight", "bias")}
FFN_NORM = "ffn_norm.weight"  # kept when the FFN is removed: llama.cpp requires it
OUTSIDE = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
OUTSIDE |= {"rope_factors_long.weight", "rope_factors_short.weight"}

_WIDTH, _HEADS, _KV_HEADS = "feed_forward_length", "attention.head_count", "attention.head_count_kv"
_KEY_LENGTH, _VALUE_LENGTH = "attention.key_length", "attention.value_length"
_ARCHITECTURE, _ALIGNMENT, _STALE = "general.architecture", "general.alignment", "general.parameter_count"
_MASKED = "save the pruned model with --save_format masked and convert that"


@dataclass(frozen=True)
class Block:
    """Attention heads and FFN width of one layer; 0 for a missing sublayer."""

    heads: int
    kv_heads: int
    width: int

    def keep(self, attention: bool, ffn: bool) -> "Block":
        return Block(self.heads * attention, self.kv_heads * attention, self.width * ffn)


@dataclass(frozen=True)
class GgufModel:
    """A GGUF file that can be pruned: its `gguf.GGUFReader`, keys and tensors by name, and the sizes of its layers.

    `keys` maps a name to (value, type), or (value, type, item type) for a list.
    """

    reader: Any
    keys: dict[str, tuple]
    tensors: dict[str, Any]
    architecture: str
    blocks: tuple[Block, ...]
    hidden_size: int
    head_size: int


@dataclass(frozen=True)
class GgufSize:
    """Layers and parameters of the model in a file, and the size of the file."""

    layers: int
    parameters: int
    bytes: int


@dataclass(frozen=True)
class GgufPruning:
    """The architecture of the source file, and the sizes before and after pruning."""

    architecture: str
    before: GgufSize
    after: GgufSize


# Pruning --------------------------------------------------------------------------------------------------------------


def check(source: Path, target: Path, num_layers: int, overwrite: bool = False) -> GgufModel:
    """Reads the file to prune and makes all checks that need no plan; writes nothing.

    Raises `InputError` for a file that cannot be pruned or has another number of layers, and for an existing target
    unless `overwrite`.
    """
    model = read_gguf(source)
    if len(model.blocks) != num_layers:
        raise _refuse(source, f"has {len(model.blocks)} blocks and the plan {num_layers} layers; give the plan's model")
    check_writable(target.parent if target.exists() else target, "--gguf")
    if target.exists():
        if target.samefile(source):
            raise _refuse(source, "would be written over itself; name another file to write")
        if not target.is_file() or not overwrite:
            advice = " or add --overwrite" if target.is_file() else ""
            raise InputError(f"--gguf: {target} exists; name another file{advice}")
    return model


def apply_plan(source: Path, target: Path, plan: Plan, overwrite: bool = False) -> GgufPruning:
    """Writes the source without the sublayers that the plan removes, atomically.

    The layer numbers of the plan are the block numbers of the source. The source may have been pruned before. Raises
    `InputError` as `check` does, and for a plan that leaves no attention or removes a sublayer that is already gone.
    """
    model = check(source, target, plan.num_layers, overwrite)
    for what, removed, sizes in (
        ("attention", plan.mha_removed, [block.heads for block in model.blocks]),
        ("FFN", plan.ffn_removed, [block.width for block in model.blocks]),
    ):
        if gone := [index for index in removed if not sizes[index]]:
            raise _refuse(source, f"block {gone[0]} has no {what} to remove; give the file that the plan was made for")
    left = prune_blocks(model.blocks, plan)
    if not any(block.heads for block in left.values()):
        raise _refuse(source, "the plan leaves no attention; keep that of one layer")
    layout = arrange(model.tensors, left, model.hidden_size, model.head_size)
    target = target.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_file(target) as draft:
            _write(draft, model, add_stand_ins(left.values()), layout)
    except (ValueError, struct.error) as error:
        raise _refuse(source, f"holds what the gguf package cannot write ({error})") from error
    whole = arrange(model.tensors, dict(enumerate(model.blocks)), model.hidden_size, model.head_size)
    return GgufPruning(
        model.architecture,
        GgufSize(len(model.blocks), _count_parameters(model, whole), source.stat().st_size),
        GgufSize(len(left), _count_parameters(model, layout), target.stat().st_size),
    )


def _count_parameters(model: GgufModel, layout: list) -> int:
    """The number of elements in the tensors of a layout, without rotary tables and stand-in zeros."""
    kept = [origin for _, origin in layout if isinstance(origin, str) and not origin.startswith("rope_")]
    return sum(int(model.tensors[name].n_elements) for name in kept)


def prune_blocks(blocks: Sequence[Block], plan: Plan) -> dict[int, Block]:
    """{block number in the source: what the plan leaves of the block}, without empty blocks."""
    left = [block.keep(mode.attention, mode.ffn) for block, mode in zip(blocks, plan.modes, strict=True)]
    return {index: block for index, block in enumerate(left) if block.heads or block.width}


def add_stand_ins(left: Iterable[Block]) -> list[Block]:
    """The blocks as written to the file: one head, or a width of 1, where zeros stand in for a removed sublayer."""
    blocks = [Block(block.heads, block.kv_heads, block.width or 1) for block in left]
    return [blocks[0] if blocks[0].heads else Block(1, 1, blocks[0].width), *blocks[1:]]


def arrange(
    names: Iterable[str], left: Mapping[int, Block], hidden_size: int, head_size: int
) -> list[tuple[str, str | tuple[int, ...]]]:
    """The tensors of the new file in order: (name, name of the source tensor), or (name, shape) of zeros.

    Shapes are in GGUF order, row length first. The order of the tensors depends only on which sublayers are left, so
    pruning in two steps gives the same file as pruning in one.
    """
    numbers = {old: new for new, old in enumerate(left)}
    layout: list[tuple[str, str | tuple[int, ...]]] = []
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


def split_name(name: str) -> tuple[int | None, str]:
    """blk.3.attn_q.weight -> (3, attn_q.weight); output.weight -> (None, output.weight)."""
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


# Reading --------------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file, with its weights memory-mapped. Raises `InputError` for a file that cannot be pruned."""
    reader, keys = _open(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = _value(path, keys, _ARCHITECTURE, kind=str)
    if architecture not in PRUNABLE:
        reason = "only a llama's layers can lose attention or FFN in llama.cpp: its graphs of other architectures have"
        raise _refuse(path, f"architecture {architecture}: {reason} no sizes by layer, or another rotation; {_MASKED}")
    if _value(path, keys, "split.count", 1) > 1:
        raise _refuse(path, "is one part of a split model; join the parts first with llama-gguf-split --merge")
    if experts := _value(path, keys, f"{architecture}.expert_count", 0):
        reason = f"is a mixture of {experts} experts, which the architecture {PRUNED} of llama.cpp has not"
        raise _refuse(path, f"{reason}; {_MASKED}")
    blocks = _read_blocks(path, keys, architecture)
    _check_names(path, keys, tensors, architecture, blocks)
    hidden_size = _value(path, keys, f"{architecture}.embedding_length")
    head_size = _value(path, keys, f"{architecture}.{_KEY_LENGTH}", hidden_size // blocks[0].heads)
    present = tuple(_without_zeros(tensors, index, block) for index, block in enumerate(blocks))
    return GgufModel(reader, keys, tensors, architecture, present, hidden_size, head_size)


def _open(path: Path) -> tuple[Any, dict[str, tuple]]:
    """The reader of a file and its keys, as in `GgufModel`."""
    if not path.is_file():
        raise _refuse(path, "is not a file; give a GGUF file of the model")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise InputError("--gguf: the gguf package is not installed; pip install gguf") from error
    try:
        reader = GGUFReader(path)
        fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]  # file header
        keys = {field.name: (field.contents(), *field.types) for field in fields}
    except OSError as error:
        raise _refuse(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise _refuse(path, f"is not a GGUF file, or a broken one ({error})") from error
    for name, (value, *types) in keys.items():
        if isinstance(value, list) and (len(types) != 2 or types[0] == types[1]):
            raise _refuse(path, f"key {name} is an empty list or one of lists, which the gguf package cannot write")
    return reader, keys


def _read_blocks(path: Path, keys: dict[str, tuple], architecture: str) -> list[Block]:
    count = _value(path, keys, f"{architecture}.block_count")

    def by_block(key: str, default: object = None) -> list[int]:
        value = _value(path, keys, f"{architecture}.{key}", default, (int, list))
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not count:
            raise _refuse(path, f"{architecture}.{key} is of {len(values)} blocks, and there are {count}")
        return values

    heads = by_block(_HEADS)
    blocks = [Block(*sizes) for sizes in zip(heads, by_block(_KV_HEADS, heads), by_block(_WIDTH), strict=True)]
    for index, block in enumerate(blocks):
        if not block.heads and index == 0 or block.heads and not block.width:
            sizes = f"{block.heads} heads and an FFN of width {block.width}"
            raise _refuse(path, f"block {index} has {sizes}, which llama.cpp cannot run")
    return blocks


def _check_names(path: Path, keys: dict, tensors: Iterable[str], architecture: str, blocks: Sequence[Block]) -> None:
    """Raises `InputError` for tensors and keys that this module does not know how to prune."""
    seen = set()
    known: set[str]
    for name in tensors:
        index, part = split_name(name)
        known = OUTSIDE if index is None else {*ATTENTION, *FFN, FFN_NORM} if index < len(blocks) else set()
        if part not in known:
            raise _refuse(path, f"tensor {name} belongs to no attention or FFN known here; {_MASKED}")
        seen.add(index)
    for index, block in enumerate(blocks):
        if index not in seen and (block.heads or block.width):
            raise _refuse(path, f"holds no tensors of block {index}; give the file with all weights")
    known = {f"{architecture}.{key}" for key in (_WIDTH, _HEADS, _KV_HEADS)}
    for name, (value, *_) in keys.items():
        is_by_block = isinstance(value, list) and len(value) == len(blocks)
        if name.startswith(f"{architecture}.") and is_by_block and name not in known:
            raise _refuse(path, f"key {name} differs by block in a way not known here; {_MASKED}")


def _without_zeros(tensors: Mapping[str, Any], index: int, block: Block) -> Block:
    """The block without the sublayers that an earlier pruning replaced by zeros."""

    def gives_zeros(projection: str) -> bool:
        names = [f"blk.{index}.{projection}.{kind}" for kind in ("weight", "bias")]
        return not any(tensors[name].data.any() for name in names if name in tensors)

    has_attention = block.heads != 1 or not gives_zeros("attn_output")
    return block.keep(has_attention, block.width != 1 or not gives_zeros("ffn_down"))


def _value(path: Path, keys: dict[str, tuple], name: str, default: object = None, kind: type | tuple = int):
    """The value of a key, or the default. Raises `InputError` for a value of another kind, or a missing one."""
    value, *_ = keys.get(name, (default,))
    if not isinstance(value, kind):
        raise _refuse(path, f"has no key {name}, or one of a wrong type; give the GGUF file of a model")
    return value


def _refuse(path: Path, reason: str) -> InputError:
    return InputError(f"--gguf {path}: {reason}")


# Writing --------------------------------------------------------------------------------------------------------------


def _write(draft: Path, model: GgufModel, blocks: Sequence[Block], layout: list) -> None:
    """Writes the new file, in the byte order of the source."""
    import numpy
    from gguf import GGUFWriter

    endianess = model.reader.endianess
    with closing(GGUFWriter(draft, PRUNED, endianess=endianess)) as writer:
        for name, (value, *types) in _new_keys(model, blocks).items():
            if name == _ALIGNMENT:
                writer.add_custom_alignment(value)
            else:
                writer.add_key_value(name, value, *types)
        for name, origin in layout:
            if isinstance(origin, str):
                tensor = model.tensors[origin]
                writer.add_tensor(name, tensor.data, raw_dtype=tensor.tensor_type, tensor_endianess=endianess)
            else:
                writer.add_tensor(name, numpy.zeros(origin[::-1], numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()


def _new_keys(model: GgufModel, blocks: Sequence[Block]) -> dict[str, tuple]:
    """The keys of the new file in the order of the source, without the architecture, which the writer adds first."""
    from gguf import GGUFValueType

    number, numbers = (GGUFValueType.UINT32,), (GGUFValueType.ARRAY, GGUFValueType.INT32)
    keys = {
        re.sub(rf"^{model.architecture}\.", f"{PRUNED}.", name): key
        for name, key in model.keys.items()
        if name not in (_ARCHITECTURE, _STALE)
    }
    return keys | {
        f"{PRUNED}.block_count": (len(blocks), *number),
        f"{PRUNED}.{_WIDTH}": ([block.width for block in blocks], *numbers),
        f"{PRUNED}.{_HEADS}": ([block.heads for block in blocks], *numbers),
        f"{PRUNED}.{_KV_HEADS}": ([block.kv_heads for block in blocks], *numbers),
        # Without them, llama.cpp divides the hidden size by the heads of the first block, which may have changed.
        f"{PRUNED}.{_KEY_LENGTH}": (model.head_size, *number),
        f"{PRUNED}.{_VALUE_LENGTH}": (model.head_size, *number),
    }
