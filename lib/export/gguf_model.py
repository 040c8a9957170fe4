"""Reads a GGUF file as a model of llama.cpp whose layers can lose attention or FFN, and refuses all others."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.models.gguf_header import Header, Tensor, read_header, refuse

PRUNABLE, PRUNED = ("llama", "deci"), "deci"

_PROJECTIONS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output")
ATTENTION = {"attn_norm.weight", *(f"{name}.{kind}" for name in _PROJECTIONS for kind in ("weight", "bias"))}
FFN = {f"{name}.{kind}" for name in ("ffn_gate", "ffn_up", "ffn_down") for kind in ("weight", "bias")}
FFN_NORM = "ffn_norm.weight"  # kept when the FFN is removed: llama.cpp requires it
OUTSIDE = {"token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"}
OUTSIDE |= {"rope_factors_long.weight", "rope_factors_short.weight"}

WIDTH, HEADS, KV_HEADS = "feed_forward_length", "attention.head_count", "attention.head_count_kv"
KEY_LENGTH, VALUE_LENGTH = "attention.key_length", "attention.value_length"
ARCHITECTURE = "general.architecture"
_MOST_BLOCKS = 2**16
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
    """A GGUF file that can be pruned: its content, and the sizes of its layers."""

    header: Header
    architecture: str
    blocks: tuple[Block, ...]
    hidden_size: int
    head_size: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.header.tensors


def read_gguf(path: Path) -> GgufModel:
    """Opens a GGUF file, with its weights memory-mapped. Raises `InputError` for a file that cannot be pruned."""
    header = read_header(path)
    keys, tensors = header.keys, header.tensors
    architecture = _value(path, keys, ARCHITECTURE, kind=str)
    if architecture not in PRUNABLE:
        reason = "only a llama's layers can lose attention or FFN in llama.cpp: its graphs of other architectures have"
        raise refuse(path, f"architecture {architecture}: {reason} no sizes by layer, or another rotation; {_MASKED}")
    if experts := _value(path, keys, f"{architecture}.expert_count", 0):
        reason = f"is a mixture of {experts} experts, which the architecture {PRUNED} of llama.cpp has not"
        raise refuse(path, f"{reason}; {_MASKED}")
    blocks = _read_blocks(path, keys, architecture)
    hidden_size = _value(path, keys, f"{architecture}.embedding_length")
    head_size = _value(path, keys, f"{architecture}.{KEY_LENGTH}", hidden_size // blocks[0].heads)
    _check_tensors(path, tensors, blocks, hidden_size, head_size)
    _check_keys(path, keys, architecture, len(blocks))
    present = tuple(_without_zeros(tensors, index, block) for index, block in enumerate(blocks))
    return GgufModel(header, architecture, present, hidden_size, head_size)


def split_name(name: str) -> tuple[int | None, str]:
    """blk.3.attn_q.weight -> (3, attn_q.weight); output.weight -> (None, output.weight)."""
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def _read_blocks(path: Path, keys: dict[str, tuple], architecture: str) -> list[Block]:
    count = _value(path, keys, f"{architecture}.block_count")
    if not 0 < count <= _MOST_BLOCKS:
        raise refuse(path, f"is a model of {count:,} blocks; give one with 1 to {_MOST_BLOCKS:,}")

    def by_block(key: str, default: object = None) -> list[int]:
        value = _value(path, keys, f"{architecture}.{key}", default, (int, list))
        values = value if isinstance(value, list) else [value] * count
        if len(values) != count or not all(type(number) is int and number >= 0 for number in values):
            raise refuse(path, f"{architecture}.{key} is of {len(values)} blocks, and there are {count}, or no counts")
        return values

    heads = by_block(HEADS)
    blocks = [Block(*sizes) for sizes in zip(heads, by_block(KV_HEADS, heads), by_block(WIDTH), strict=True)]
    for index, block in enumerate(blocks):
        if not block.heads and index == 0 or block.heads and not block.width:
            sizes = f"{block.heads} heads and an FFN of width {block.width}"
            raise refuse(path, f"block {index} has {sizes}, which llama.cpp cannot run")
    return blocks


def _check_tensors(
    path: Path, tensors: Mapping[str, Tensor], blocks: Sequence[Block], hidden_size: int, head_size: int
) -> None:
    """Raises `InputError` for tensors that cannot be pruned here, are missing, or have other sizes than the keys."""
    for name, tensor in tensors.items():
        index, part = split_name(name)
        known = OUTSIDE if index is None else {*ATTENTION, *FFN, FFN_NORM} if index < len(blocks) else set()
        if part not in known:
            raise refuse(path, f"tensor {name} belongs to no attention or FFN known here; {_MASKED}")
        if index is not None:
            expected = _shape(part, blocks[index], hidden_size, head_size)
            if tensor.shape != expected:
                what = f"tensor {name} is {list(tensor.shape)}, and {list(expected)} by the keys"
                raise refuse(path, f"{what}; give a file that llama.cpp can run")
    for index, block in enumerate(blocks):
        of_attention = ("attn_norm", "attn_output") if block.heads else ()
        for part in (*of_attention, *(("ffn_norm", "ffn_down") if block.width else ())):
            if f"blk.{index}.{part}.weight" not in tensors:
                raise refuse(path, f"holds no tensor blk.{index}.{part}.weight; give the file with all weights")


def _shape(part: str, block: Block, hidden_size: int, head_size: int) -> tuple[int, ...]:
    """The shape of a tensor of a block, row length first."""
    name, kind = part.split(".")
    heads, kv_heads = block.heads * head_size, block.kv_heads * head_size
    rows = {"attn_q": heads, "attn_k": kv_heads, "attn_v": kv_heads, "attn_qkv": heads + 2 * kv_heads}
    rows |= {"ffn_gate": block.width, "ffn_up": block.width}
    if kind == "bias" or name.endswith("norm"):
        return (rows.get(name, hidden_size),)
    return {"attn_output": heads, "ffn_down": block.width}.get(name, hidden_size), rows.get(name, hidden_size)


def _check_keys(path: Path, keys: dict[str, tuple], architecture: str, blocks: int) -> None:
    """Raises `InputError` for keys with a value for each block that this module does not know how to prune."""
    known = {f"{architecture}.{key}" for key in (WIDTH, HEADS, KV_HEADS)}
    for name, (value, *_) in keys.items():
        is_by_block = isinstance(value, list) and len(value) == blocks
        if name.startswith(f"{architecture}.") and is_by_block and name not in known:
            raise refuse(path, f"key {name} differs by block in a way not known here; {_MASKED}")


def _without_zeros(tensors: Mapping[str, Tensor], index: int, block: Block) -> Block:
    """The block without the sublayers that an earlier pruning replaced by zeros."""

    def gives_zeros(projection: str) -> bool:
        names = [f"blk.{index}.{projection}.{kind}" for kind in ("weight", "bias")]
        return not any(tensors[name].data.any() for name in names if name in tensors)

    has_attention = block.heads != 1 or not gives_zeros("attn_output")
    return block.keep(has_attention, block.width != 1 or not gives_zeros("ffn_down"))


def _value(path: Path, keys: dict[str, tuple], name: str, default: object = None, kind: type | tuple = int):
    """The value of a key, or the default. Raises `InputError` for a value of another kind, or a missing one."""
    value, *_ = keys.get(name, (default,))
    if not isinstance(value, kind) or isinstance(value, bool):
        raise refuse(path, f"has no key {name}, or one of a wrong type; give the GGUF file of a model")
    return value
