"""A broken GGUF file is refused in one line, at once and without memory; what is written is right, or not there."""

import os
import re
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import lib.export.gguf as gguf_file
import ppllms
from lib.config.plan import Plan, SavedPlan
from lib.errors import InputError, RunError, describe_failure
from lib.export.gguf import apply_plan, read
from tests.families import tiny_model

gguf = pytest.importorskip("gguf")
hypothesis = pytest.importorskip("hypothesis")
from hypothesis import strategies as st  # noqa: E402

from tests.export.gguf_writer import write_gguf  # noqa: E402

PLAN = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))
COUNTS = [0, 1, 2**16, 2**31, 2**32, 2**60, 2**63, 2**64 - 1]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_gguf(tiny_model("Llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf", kind="F16")


def _key(name: str, kind: int, content: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + content


def _file(
    path: Path, keys: list[bytes] = (), infos: bytes = b"", counts: tuple | None = None, rest: bytes = b""
) -> Path:
    """A file with these keys, tensor infos and counts, right or not."""
    tensors, pairs = counts or (0, len(keys))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + b"".join(keys) + infos + rest)
    return path


def _info(name: str = "a", shape: tuple = (8,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name.encode() + sizes + struct.pack("<IQ", kind, offset)


def _refusal(path: Path, target: Path) -> str:
    """The one line that a file is refused with, soon and without memory."""
    started = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as raised:
            read(path, 4)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert time.monotonic() - started < 20
    line = describe_failure(raised.value)
    assert "\n" not in line and line.isprintable()
    return line


@pytest.mark.parametrize("count", [2**60, 2**63, 2**64 - 1])
@pytest.mark.parametrize("rest", [0, 10_000])
def test_counts_beyond_the_file_are_refused(count, rest, tmp_path):
    huge, rest = struct.pack("<Q", count), bytes(rest)
    items = [struct.pack("<I", kind) + huge for kind in (0, 8, 9, 12)]
    for content in (
        *({"keys": [_key("some.list", 9, item)]} for item in items),
        {"keys": [_key("some.text", 8, huge)]},
        {"keys": [huge]},
        {"counts": (count, 0)},
        {"counts": (0, count)},
        {"infos": struct.pack("<QI", 0, 2**32 - 1), "counts": (1, 0)},
        {"infos": _info(shape=(count,)), "counts": (1, 0)},
        {"infos": _info(shape=(2**32, 2**32)), "counts": (1, 0)},
        {"infos": _info(offset=count), "counts": (1, 0)},
    ):
        assert "not a GGUF file, or a broken one" in _refusal(
            _file(tmp_path / "in", rest=rest, **content), tmp_path / "o"
        )


def test_lists_of_more_items_than_a_header_can_need_are_refused_at_once(tmp_path):
    """In a file that is large enough: what it holds is zeros, which read as empty strings."""
    path = _file(tmp_path / "in", [_key("some.list", 9, struct.pack("<IQ", 8, 2**27))])
    os.truncate(path, 2**31)
    assert "134,217,728 items are more than it can hold" in _refusal(path, tmp_path / "out")


def test_lists_of_lists_are_refused_however_deep(tmp_path):
    deep = struct.pack("<IQ", 9, 1) * 100_000
    assert "list is an empty list or one of lists" in _refusal(
        _file(tmp_path / "in", [_key("list", 9, deep)]), tmp_path
    )


@pytest.mark.parametrize(
    ("infos", "reason"),
    [
        ([_info("a"), _info("a", offset=32)], "tensor a comes twice"),
        ([_info("a"), _info("b")], "tensors a and b overlap"),
        ([_info("a", (16,)), _info("b", offset=32)], "tensors a and b overlap"),
        ([_info(offset=8)], "tensor a is outside of the file, or no whole number of blocks"),
        ([_info(offset=4096)], "tensor a is outside"),
        ([_info(shape=(8, 0))], "tensor a is outside"),
        ([_info(shape=(8,), kind=8)], "no whole number of blocks"),
        ([_info(kind=999)], "999 is not a valid"),
        ([_info(shape=())], "tensor a has 0 dimensions"),
        ([_info(shape=(1,) * 5)], "tensor a has 5 dimensions"),
        ([_info("\x1b[31ma"), _info("\x1b[31ma")], r"tensor \x1b[31ma comes twice"),
    ],
)
def test_tensors_that_cannot_be_are_refused_by_name(infos, reason, tmp_path):
    path = _file(tmp_path / "in", infos=b"".join(infos), counts=(len(infos), 0), rest=bytes(1024))
    assert reason in _refusal(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "content"), [(4, 0), (4, 33), (4, 2**31), (10, 32), (5, 32)], ids=["zero", "odd", "huge", "u64", "i32"]
)
def test_alignments_that_cannot_be_are_refused(kind, content, tmp_path):
    content = struct.pack("<Q" if kind == 10 else "<I", content)
    path = _file(tmp_path / "in", [_key("general.alignment", kind, content)], rest=bytes(64))
    assert "its alignment is" in _refusal(path, tmp_path / "out")


def test_keys_that_come_twice_and_strange_values_are_refused(tmp_path):
    one = _key("a", 0, b"\x01")
    for keys, reason in (
        ([one, one], "key a comes twice"),
        ([_key("a", 7, b"\x02")], "boolean"),
        ([_key("a", 13, b"")], "13 is not a valid"),
        ([_key("a", 8, struct.pack("<Q", 1) + b"\xff")], "utf-8"),
    ):
        assert reason in _refusal(_file(tmp_path / "in", keys, rest=bytes(64)), tmp_path / "out")


@pytest.mark.parametrize("name", ["llama.block_count", "llama.attention.key_length", "llama.embedding_length"])
@pytest.mark.parametrize("number", [0, 2**31, 2**32 - 1])
def test_sizes_that_are_not_those_of_the_tensors_are_refused(name, number, source, tmp_path):
    before = name.encode() + struct.pack("<I", 4)
    content = source.read_bytes()
    place = content.index(before) + len(before)
    (tmp_path / "in").write_bytes(content[:place] + struct.pack("<I", number) + content[place + 4 :])
    _refusal(tmp_path / "in", tmp_path / "out")


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path / "loop"):
        assert "is not a file" in _refusal(path, tmp_path / "out")


# What is written ------------------------------------------------------------------------------------------------------


def test_a_file_that_is_no_gguf_is_never_replaced(source, tmp_path):
    for name, content in ("thesis.txt", b"years of work"), ("empty", b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="exists and is no GGUF file; name another file$"):
            apply_plan(source, tmp_path / name, PLAN, overwrite=True)
        assert (tmp_path / name).read_bytes() == content


def test_links_that_lead_nowhere_are_refused_as_targets(source, tmp_path):
    for name, to in ("loop", "loop"), ("dangling", "no/such/folder/file"):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(InputError, match=f"{name} is a link that leads nowhere"):
            apply_plan(source, tmp_path / name, PLAN, overwrite=True)


def test_drafts_of_killed_runs_are_deleted_by_the_next(source, tmp_path):
    (tmp_path / ".out.gguf.partial-999999999").write_bytes(b"GGUF, half")
    apply_plan(source, tmp_path / "out.gguf", PLAN)
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("where", ["key", "tensor", "zeros"])
def test_a_file_that_was_not_written_as_meant_does_not_appear(where, source, tmp_path, monkeypatch):
    write = gguf_file._write

    def write_wrongly(draft: Path, *args) -> None:
        write(draft, *args)
        content = bytearray(draft.read_bytes())
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(draft).tensors}
        name = {"tensor": "token_embd.weight", "zeros": "blk.1.ffn_up.weight"}.get(where)
        place = found[name].data_offset if name else 60
        content[place] ^= 1
        draft.write_bytes(content)

    monkeypatch.setattr(gguf_file, "_write", write_wrongly)
    problem = f"^{re.escape(str(source))}: its pruned file, read back, is not|: is not a GGUF file, or a broken one"
    with pytest.raises((RunError, InputError), match=problem):
        apply_plan(source, tmp_path / "out.gguf", PLAN)
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_utf8_is_pruned_and_printed(source, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9.gguf")
    Path(name).write_bytes(source.read_bytes())
    saved = SavedPlan(Path("result.json"), "model", PLAN, 1)
    ppllms.prune_gguf(Path(name), Path("out.gguf"), saved, None, False)
    assert r"caf\udce9.gguf (llama): 4 layers" in capsys.readouterr().out


# Mutations ------------------------------------------------------------------------------------------------------------


def _header_size(path: Path) -> int:
    return int(min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors))


def _is_right(source: Path, target: Path) -> bool:
    """By the package's own reader: every tensor of the target is the source's, or zeros."""
    before, after = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (source, target))
    for name, tensor in after.items():
        index, part = gguf_file.split_name(name)
        origin = before.get(name if index is None else f"blk.{index + (index > 1)}.{part}")  # block 2 is gone
        same = origin is not None and np.array_equal(origin.data.view(np.uint8), tensor.data.view(np.uint8))
        if not same and tensor.data.any():
            return False
    return bool(after)


@hypothesis.settings(max_examples=100, derandomize=True, deadline=None, database=None)
@hypothesis.given(data=st.data())
def test_a_mutated_file_is_refused_in_one_line_or_pruned_rightly(source, tmp_path_factory, data):
    content, header = bytearray(source.read_bytes()), _header_size(source)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header - 1))
        new = data.draw(
            st.binary(min_size=1, max_size=4)
            | st.sampled_from(COUNTS).map(lambda count: struct.pack("<Q", count))
            | st.integers(0, header).map(lambda other: bytes(content[other : other + 16]))
        )
        content[place : place + len(new)] = new
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    folder = tmp_path_factory.mktemp("mutated")
    path, target = folder / "in.gguf", folder / "out.gguf"
    path.write_bytes(content)
    try:
        apply_plan(path, target, PLAN)
    except (InputError, RunError) as error:
        assert "\n" not in describe_failure(error) and not target.exists()
    else:
        assert _is_right(path, target)
    finally:
        path.unlink()
        target.unlink(missing_ok=True)
