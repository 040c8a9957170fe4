"""A GGUF file pruned by a plan holds what is left and nothing else, and llama.cpp runs it as the pruned model."""

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.export.gguf as gguf_file
from lib.config.plan import Plan, read_plan
from lib.config.sources import ModelSource
from lib.demo import DEMO_MODEL
from lib.errors import InputError, RunError
from lib.export.gguf import Block, GgufSize, add_stand_ins, apply_plan, arrange, prune_blocks, read
from lib.export.huggingface import zero_sublayers
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from tests.command import run
from tests.families import tiny_model

gguf = pytest.importorskip("gguf")

from tests.export.gguf_writer import KINDS, write_gguf  # noqa: E402

MIXED = Plan(4, mha_removed=(0, 2), ffn_removed=(1, 2))  # layer 0 without attention, 1 without FFN, 2 gone
# In the tiny Llama: hidden size 32, heads of size 8.
ZERO_ATTENTION = {"attn_norm": [32], "attn_q": [32, 8], "attn_k": [32, 8], "attn_v": [32, 8], "attn_output": [8, 32]}
ZERO_FFN = {"ffn_gate": [32, 1], "ffn_up": [32, 1], "ffn_down": [1, 32]}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_gguf(tiny_model("Llama"), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def _read(path: Path) -> tuple[dict, dict]:
    """Values of the keys and the tensors, read by llama.cpp's own Python package."""
    reader = gguf.GGUFReader(path)
    return {k: f.contents() for k, f in reader.fields.items()}, {tensor.name: tensor for tensor in reader.tensors}


def _write(path: Path, model=None, change=lambda writer: None, architecture: str = "llama", **options) -> Path:
    """A small GGUF file made wrong, or rich, by `change(writer)`."""

    class Writer(gguf.GGUFWriter):
        def __init__(self, path, _, **options):
            super().__init__(path, architecture, **options)

        def write_header_to_file(self):
            change(self)
            super().write_header_to_file()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        return write_gguf(model or tiny_model("Llama"), path, **options)


# What is in the file --------------------------------------------------------------------------------------------------


def test_blocks_keep_what_the_plan_leaves():
    blocks = [Block(4, 2, 48)] * 4
    left = prune_blocks(blocks, MIXED)
    assert left == {0: Block(0, 0, 48), 1: Block(4, 2, 0), 3: Block(4, 2, 48)}
    assert add_stand_ins(left.values()) == [Block(1, 1, 48), Block(4, 2, 1), Block(4, 2, 48)]


def test_tensors_are_renumbered_and_zeros_stand_in():
    names = ["token_embd.weight", "blk.0.attn_q.bias", "blk.0.ffn_up.weight", "blk.1.ffn_norm.weight"]
    layout = arrange([*names, "blk.1.ffn_up.bias", "blk.1.attn_q.weight"], {1: Block(4, 2, 0)}, 32, 8)
    assert layout == [
        ("token_embd.weight", "token_embd.weight"),
        ("blk.0.ffn_gate.weight", (32, 1)),
        ("blk.0.ffn_up.weight", (32, 1)),
        ("blk.0.ffn_down.weight", (1, 32)),
        ("blk.0.ffn_norm.weight", "blk.1.ffn_norm.weight"),
        ("blk.0.attn_q.weight", "blk.1.attn_q.weight"),
    ]


@pytest.mark.parametrize("family", ["Llama", "LlamaTied"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_tensors_are_the_same_bytes_and_removed_ones_are_gone(family, kind, tmp_path):
    source = write_gguf(tiny_model(family), tmp_path / "in.gguf", kind=kind)
    apply_plan(source, tmp_path / "out.gguf", MIXED)
    before, after = _read(source)[1], _read(tmp_path / "out.gguf")[1]
    expected = {name: tensor for name, tensor in before.items() if not name.startswith("blk.")}
    for name in before:
        index, part = gguf_file.split_name(name)
        lost = {0: "attn_", 1: ("ffn_gate", "ffn_up", "ffn_down"), 2: ""}.get(index, "nothing")
        if index is not None and not part.startswith(lost):
            expected[f"blk.{index - (index > 2)}.{part}"] = before[name]
    for name, tensor in expected.items():
        assert after[name].tensor_type == tensor.tensor_type and after[name].shape.tolist() == tensor.shape.tolist()
        assert after[name].data.tobytes() == tensor.data.tobytes()
    zeros = {f"blk.0.{name}.weight": shape for name, shape in ZERO_ATTENTION.items()}
    zeros |= {f"blk.1.{name}.weight": shape for name, shape in ZERO_FFN.items()}
    assert {name: after[name].shape.tolist() for name in after.keys() - expected.keys()} == zeros
    assert not any(after[name].data.any() for name in zeros)


def test_keys_are_those_of_the_source_under_the_new_architecture(source, tmp_path):
    apply_plan(source, tmp_path / "out.gguf", MIXED)
    before, after = _read(source)[0], _read(tmp_path / "out.gguf")[0]
    expected = {name.replace("llama.", "deci."): value for name, value in before.items()}
    expected |= {
        "GGUF.tensor_count": len(_read(tmp_path / "out.gguf")[1]),
        "general.architecture": "deci",
        "deci.block_count": 3,
        "deci.feed_forward_length": [48, 1, 48],
        "deci.attention.head_count": [1, 4, 4],
        "deci.attention.head_count_kv": [1, 2, 2],
    }
    assert after == expected and after["deci.attention.key_length"] == 8


def test_later_layers_without_attention_have_no_heads_and_no_norm(source, tmp_path):
    apply_plan(source, tmp_path / "out.gguf", Plan(4, mha_removed=(1,)))
    keys, tensors = _read(tmp_path / "out.gguf")
    assert keys["deci.attention.head_count"] == [4, 0, 4, 4] and keys["deci.attention.head_count_kv"] == [2, 0, 2, 2]
    assert not [name for name in tensors if name.startswith("blk.1.attn")] and "blk.1.ffn_norm.weight" in tensors


@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
def test_keys_of_every_type_alignment_and_byte_order_stay(order, tmp_path):
    def enrich(writer):
        writer.add_custom_alignment(4096)
        writer.add_key_value("general.parameter_count", 37152, gguf.GGUFValueType.UINT64)
        writer.add_array("tokenizer.ggml.tokens", ["a", "ü", "a longer one"])
        writer.add_array("some.floats", [0.5, -1.0])
        for number, kind in enumerate(k for k in gguf.GGUFValueType if k.name not in ("STRING", "ARRAY")):
            writer.add_key_value(f"some.{kind.name}", number % 2, kind)

    source = _write(tmp_path / "in.gguf", change=enrich, endianess=gguf.GGUFEndian[order])
    apply_plan(source, tmp_path / "out.gguf", MIXED)
    before, after = (gguf.GGUFReader(tmp_path / name) for name in ("in.gguf", "out.gguf"))
    assert before.endianess == after.endianess == gguf.GGUFEndian[order] and after.alignment == 4096
    kept = [name for name in before.fields if name.startswith(("some.", "tokenizer."))]
    assert len(kept) == 3 + 11
    for name in kept:
        assert before.fields[name].types == after.fields[name].types
        assert [part.tobytes() for part in before.fields[name].parts] == [p.tobytes() for p in after.fields[name].parts]
    assert "general.parameter_count" in before.fields and "general.parameter_count" not in after.fields
    assert after.fields["deci.feed_forward_length"].contents() == [48, 1, 48]
    for index in 0, -1:
        assert before.tensors[index].data.tobytes() == after.tensors[index].data.tobytes()


def test_head_size_is_written_where_the_source_leaves_it_to_its_first_layer(tmp_path):
    def leave_out(writer):
        for name in ("key_length", "value_length", "head_count_kv"):
            del writer.kv_data[0][f"llama.attention.{name}"]

    model = tiny_model("Llama", num_key_value_heads=4)
    source = _write(tmp_path / "in.gguf", model, leave_out)
    apply_plan(source, tmp_path / "out.gguf", MIXED)
    keys = _read(tmp_path / "out.gguf")[0]
    assert keys["deci.attention.key_length"] == keys["deci.attention.value_length"] == 8
    assert keys["deci.attention.head_count_kv"] == [1, 4, 4]


@pytest.mark.parametrize(
    ("first", "second", "joint"),
    [
        (MIXED, Plan(3, (1,)), Plan(4, (0, 1, 2), (1, 2))),
        (Plan(4, (1,)), Plan(4, (0,), (0,)), Plan(4, (0, 1), (0,))),  # what becomes the first has no attention
        (Plan(4, (0,)), Plan(4, (), (0, 3)), Plan(4, (0,), (0, 3))),
        (Plan(4, (), (3,)), Plan(4, (3,), ()), Plan(4, (3,), (3,))),
    ],
)
def test_pruning_a_pruned_file_is_pruning_once(first, second, joint, source, tmp_path):
    apply_plan(source, tmp_path / "one.gguf", first)
    apply_plan(tmp_path / "one.gguf", tmp_path / "two.gguf", second)
    apply_plan(source, tmp_path / "joint.gguf", joint)
    assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / "joint.gguf").read_bytes()


def test_a_plan_that_removes_nothing_keeps_every_tensor(source, tmp_path):
    done = apply_plan(source, tmp_path / "out.gguf", Plan(4))
    assert [t.name for t in gguf.GGUFReader(source).tensors] == list(_read(tmp_path / "out.gguf")[1])
    assert done.before.parameters == done.after.parameters == sum(p.numel() for p in tiny_model("Llama").parameters())


def test_the_report_counts_files_and_tensors(source, tmp_path):
    done = apply_plan(source, tmp_path / "out.gguf", Plan(4, (2,), (2,)))
    layer = sum(parameter.numel() for parameter in tiny_model("Llama").model.layers[2].parameters())
    size = (tmp_path / "out.gguf").stat().st_size
    assert done.architecture == "llama" and done.before.bytes == source.stat().st_size
    assert done.after == GgufSize(3, done.before.parameters - layer, size)


def test_weights_pass_through_without_filling_the_memory(tmp_path):
    source = write_gguf(tiny_model("Llama", vocab_size=20_000), tmp_path / "in.gguf")
    tracemalloc.start()
    done = apply_plan(source, tmp_path / "out.gguf", MIXED)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < done.after.bytes / 10


# Whole or not at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_what_was_there(error, existing, source, tmp_path, monkeypatch):
    target = tmp_path / "out.gguf"
    if existing:
        target.write_bytes(b"GGUF, old")

    def break_off(descriptor):
        assert [path for path in tmp_path.iterdir() if path.stat().st_size > 10_000]  # the draft, beside the target
        raise error

    monkeypatch.setattr(os, "fsync", break_off)
    with pytest.raises(RunError if isinstance(error, OSError) else type(error)):
        apply_plan(source, target, MIXED, overwrite=True)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.gguf", b"GGUF, old")] * existing


def test_an_existing_file_is_replaced_only_when_asked(source, tmp_path):
    target = tmp_path / "out.gguf"
    target.write_bytes(b"GGUF, old")
    with pytest.raises(InputError, match="out.gguf exists.*--overwrite"):
        apply_plan(source, target, MIXED)
    assert target.read_bytes() == b"GGUF, old"
    apply_plan(source, target, MIXED, overwrite=True)
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_file_is_not_written_over_itself_under_any_name(source, tmp_path):
    content = source.read_bytes()
    (tmp_path / "link.gguf").symlink_to(source)
    (tmp_path / "same.gguf").hardlink_to(source)
    for target in (source, tmp_path / "link.gguf", tmp_path / "same.gguf"):
        with pytest.raises(InputError, match="over itself"):
            apply_plan(source, target, MIXED, overwrite=True)
    assert source.read_bytes() == content


# What is refused ------------------------------------------------------------------------------------------------------


def _number(name: str, value: int):
    return lambda writer: writer.add_uint32(name, value)


def _tensor(name: str):
    return lambda writer: writer.add_tensor(name, np.zeros(4, np.float32))


def _without(part: str):
    """Drops the tensors whose names begin so, as a file with some of the weights only would."""
    return lambda writer: [writer.tensors[0].pop(name) for name in list(writer.tensors[0]) if name.startswith(part)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_number("llama.expert_count", 8), "mixture of 8 experts.*--save_format masked"),
        (_number("split.count", 2), "llama-gguf-split --merge"),
        (_number("llama.attention.head_count", 0), "block 0 has 0 heads"),
        (_number("llama.feed_forward_length", 0), "FFN of width 0"),
        (_number("llama.block_count", 0), "of 0 blocks"),
        (_number("llama.block_count", 3), r"tensor blk\.3\.\S+ belongs to no"),
        (lambda writer: writer.kv_data[0].pop("llama.block_count"), "no key llama.block_count"),
        (lambda writer: writer.add_array("llama.feed_forward_length", [48, 48]), "is of 2 blocks"),
        (lambda writer: writer.add_array("llama.attention.pattern", [1, 0, 1, 0]), "llama.attention.pattern differs"),
        (_tensor("blk.1.attn_q.scale"), "tensor blk.1.attn_q.scale belongs to no"),
        (_tensor("blk.1.ffn_gate_inp.weight"), "tensor blk.1.ffn_gate_inp.weight belongs to no"),
        (_tensor("mm.weight"), "tensor mm.weight belongs to no"),
        (_without("blk.2."), "holds no tensor blk.2.attn_norm.weight"),
        (lambda writer: writer.add_array("some.key", [[1, 2], [4]]), "some.key is an empty list or one of lists"),
        (lambda writer: writer.add_string("llama.block_count", "four"), "llama.block_count, or one of a wrong type"),
        (
            _number("llama.feed_forward_length", 2**31),
            r"ffn_gate.weight is \[32, 48\], and \[32, 2147483648\] by the keys",
        ),
    ],
)
def test_files_that_would_not_run_as_the_pruned_model_are_refused(change, reason, tmp_path):
    source = _write(tmp_path / "in.gguf", change=change)
    with pytest.raises(InputError, match=f"in.gguf.*{reason}"):
        apply_plan(source, tmp_path / "out.gguf", MIXED)
    assert not (tmp_path / "out.gguf").exists()


def test_an_empty_list_is_refused(tmp_path):
    source = _write(tmp_path / "in.gguf", change=lambda writer: writer.add_array("some.key", list(range(8))))
    full, empty = struct.pack("<IQ8i", gguf.GGUFValueType.INT32, 8, *range(8)), struct.pack("<IQ", 5, 0)
    source.write_bytes(source.read_bytes().replace(full, empty))  # 32 bytes less, so that tensors stay aligned
    with pytest.raises(InputError, match="some.key is an empty list"):
        read(source, 4)


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "gemma3"])
def test_other_architectures_are_refused_by_name(architecture, tmp_path):
    source = _write(tmp_path / "in.gguf", architecture=architecture)
    with pytest.raises(InputError, match=f"architecture {architecture}: only a llama's.*--save_format masked"):
        read(source, 4)


@pytest.mark.parametrize("length", [0, 3, 20, 200, 2000, 100_000, -4000, -1])
def test_a_file_cut_short_is_refused(length, source, tmp_path):
    (tmp_path / "in.gguf").write_bytes(source.read_bytes()[:length])  # the last tensor needs no padding
    with pytest.raises(InputError, match="not a GGUF file, or a broken one"):
        read(tmp_path / "in.gguf", 4)


def test_what_is_no_gguf_file_is_refused(source, tmp_path):
    (tmp_path / "text").write_text("weights are elsewhere " * 100)
    (tmp_path / "old").write_bytes(b"GGUF" + bytes([1, 0, 0, 0]) + source.read_bytes()[8:])
    for name, reason in (
        ("text", "not a GGUF file"),
        ("old", "not a GGUF file"),
        ("", "not a file"),
        ("no", "not a file"),
    ):
        with pytest.raises(InputError, match=reason):
            read(tmp_path / name, 4)


def test_the_package_gguf_is_needed_only_to_read_a_file(source, tmp_path, monkeypatch):
    imports = "import sys, lib.export.gguf; sys.exit(bool({'gguf', 'numpy', 'torch'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", imports], cwd=Path(__file__).parents[2]).returncode == 0
    monkeypatch.setitem(sys.modules, "gguf", None)  # an import now fails as if it were not installed
    with pytest.raises(InputError, match="needs the gguf package, which is not installed; pip install gguf$"):
        read(source, 4)


def test_plans_that_do_not_fit_the_file_are_refused(source, tmp_path):
    with pytest.raises(InputError, match="has 4 blocks and the plan 5 layers"):
        apply_plan(source, tmp_path / "out.gguf", Plan(5, (1,)))
    apply_plan(source, tmp_path / "one.gguf", Plan(4, (0, 1, 2)))
    for file, plan in (source, Plan(4, (0, 1, 2, 3))), (tmp_path / "one.gguf", Plan(4, (3,))):
        with pytest.raises(InputError, match="leaves no attention"):
            apply_plan(file, tmp_path / "out.gguf", plan)
    with pytest.raises(InputError, match="block 1 has no attention to remove"):
        apply_plan(tmp_path / "one.gguf", tmp_path / "out.gguf", Plan(4, (1,), (1,)))
    apply_plan(source, tmp_path / "two.gguf", Plan(4, (), (2,)))
    with pytest.raises(InputError, match="block 2 has no FFN to remove"):  # the same plan twice
        apply_plan(tmp_path / "two.gguf", tmp_path / "out.gguf", Plan(4, (), (2,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.gguf", "two.gguf"]


def test_a_name_too_long_is_refused_before_anything_is_read(source, tmp_path):
    with pytest.raises(InputError, match="the name is too long"):
        apply_plan(source, tmp_path / ("x" * 250), Plan(4))


# In llama.cpp ---------------------------------------------------------------------------------------------------------

PROMPT = {"stories": "Once upon a time, there was a little girl", "demo": "The module provides a function that"}


def _plans(layers: int) -> dict[str, Plan]:
    last = layers - 1
    return {
        "whole": Plan(layers, (2,), (2,)),
        "whole_first": Plan(layers, (0,), (0,)),
        "ffn": Plan(layers, (), (1, last)),
        "attention": Plan(layers, (1, last), ()),
        "first_attention": Plan(layers, (0,), ()),
        "mixed": Plan(layers, (0, 2), (1, 2)),
        "first_becomes_bare": Plan(layers, (0, 1), (0,)),
    }


@pytest.fixture(scope="module")
def llama_cpp():
    return pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module", params=["stories", "demo"])
def trained(request, tmp_path_factory):
    """A trained model, its name, the folder of its tokenizer, and the folder of its GGUF files."""
    folder = request.getfixturevalue("shared") / "models/stories260K" if request.param == "stories" else DEMO_MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    return model, request.param, folder, tmp_path_factory.mktemp(request.param)


class _LlamaCpp:
    """A model in llama.cpp with everything in f32 that the file does not quantize."""

    def __init__(self, llama_cpp, path: Path, context: int = 128):
        options = {"n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "flash_attn": False}
        self.model = llama_cpp.Llama(str(path), n_ctx=context, logits_all=True, verbose=False, **options)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (1, T) -> logits (T, V)."""
        self.model.reset()
        self.model.eval(ids[0].tolist())
        return torch.tensor(np.array(self.model.scores[: ids.shape[1]]))

    def continue_greedily(self, ids: torch.Tensor, count: int) -> list[int]:
        self.model.reset()
        self.model.eval(ids[0].tolist())
        tokens = []
        for _ in range(count):
            tokens.append(int(np.argmax(self.model.scores[self.model.n_tokens - 1])))
            self.model.eval(tokens[-1:])
        return tokens


def _ids(model, count: int = 64) -> torch.Tensor:
    return torch.randint(3, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(1))


@pytest.mark.llama_cpp
@torch.no_grad()
@pytest.mark.parametrize("name", _plans(5))
def test_llama_cpp_runs_the_pruned_model(name, trained, llama_cpp):
    """Logits to 1e-3, where removing a sublayer moves them by more than 1; the same 40 tokens from the same text."""
    from transformers import AutoTokenizer

    model, which, folder, files = trained
    source = files / "dense.gguf"
    if not source.exists():
        write_gguf(model, source, folder)
    plan = _plans(model.config.num_hidden_layers)[name]
    apply_plan(source, files / f"{name}.gguf", plan)
    runner = _LlamaCpp(llama_cpp, files / f"{name}.gguf")

    decoder, ids = Decoder(model), _ids(model)
    dense = model(input_ids=ids).logits[0]
    decoder.apply(plan)
    try:
        pruned = model(input_ids=ids).logits[0]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer(PROMPT[which], return_tensors="pt").input_ids
        text = model.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    finally:
        decoder.apply(Plan(plan.num_layers))
    difference = (runner.logits(ids) - pruned).abs().max().item()
    assert difference < 1e-3 and (dense - pruned).abs().max() > 1
    assert runner.model.tokenize(PROMPT[which].encode()) == prompt[0].tolist()
    assert runner.continue_greedily(prompt, 40) == text[0, prompt.shape[1] :].tolist()


@pytest.mark.llama_cpp
@torch.no_grad()
@pytest.mark.parametrize("name", ["mixed", "first_becomes_bare"])
def test_quantized_files_run_as_the_masked_model_of_the_same_quantization(name, trained, llama_cpp):
    """The same quantized weights by the same kernels: only the order of sums in f32 may differ, far below the grid."""
    model, _, folder, files = trained
    plan, ids = _plans(model.config.num_hidden_layers)[name], _ids(model)
    source = write_gguf(model, files / "dense-q8.gguf", folder, "Q8_0")
    apply_plan(source, files / "pruned-q8.gguf", plan, overwrite=True)
    masked = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    zero_sublayers(Decoder(masked), plan)
    exact = masked(input_ids=ids).logits[0]
    write_gguf(masked, files / "masked-q8.gguf", folder, "Q8_0")
    pruned, expected = (_LlamaCpp(llama_cpp, files / f"{kind}-q8.gguf").logits(ids) for kind in ("pruned", "masked"))
    difference, grid = (pruned - expected).abs().max().item(), (expected - exact).abs().max().item()
    assert difference < 1e-3 < 1e-2 < grid


@pytest.mark.llama_cpp
@torch.no_grad()
def test_biases_rotary_factors_and_a_file_pruned_twice_run(tmp_path, llama_cpp):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 32}
    model = tiny_model("LlamaTied", rope_parameters=rope)
    source, ids = write_gguf(model, tmp_path / "in.gguf"), _ids(model, 48)
    apply_plan(source, tmp_path / "one.gguf", MIXED)
    apply_plan(tmp_path / "one.gguf", tmp_path / "two.gguf", Plan(3, (2,)))
    for file, plan in ("one.gguf", MIXED), ("two.gguf", Plan(4, (0, 2, 3), (1, 2))):
        decoder = Decoder(model)
        decoder.apply(plan)
        difference = (
            (_LlamaCpp(llama_cpp, tmp_path / file, 64).logits(ids) - model(input_ids=ids).logits[0]).abs().max()
        )
        decoder.apply(Plan(4))
        assert difference < 1e-4


# The command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def found(arguments, tmp_path, monkeypatch):
    """The result.json of a run on the tiny model."""
    assert run(*arguments, "--eval_ppl", "no", monkeypatch=monkeypatch) == 0
    return tmp_path / "run/result.json"


def test_one_command_prunes_the_gguf_that_one_has(found, tiny_folder, tmp_path, monkeypatch, capsys):
    source = write_gguf(load_model(ModelSource(str(tiny_folder))), tmp_path / "in.gguf", tiny_folder)
    capsys.readouterr()
    command = ["--apply_plan", found, "--gguf", source, tmp_path / "out.gguf"]
    assert run(*command, monkeypatch=monkeypatch) == 0
    printed = capsys.readouterr().out
    assert "in.gguf (llama): 4 layers" in printed and "out.gguf (deci): 3 layers" in printed and "Note" not in printed
    plan = read_plan(found).plan
    apply_plan(source, tmp_path / "same.gguf", plan)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()
    assert run(*command, monkeypatch=monkeypatch) == 2
    assert "out.gguf exists; name another file or add --overwrite" in capsys.readouterr().err
    assert run(*command, "--overwrite", monkeypatch=monkeypatch) == 0


def test_the_plan_is_not_written_over(found, tmp_path, monkeypatch, capsys):
    source = write_gguf(tiny_model("Llama"), tmp_path / "in.gguf")
    assert run("--apply_plan", found, "--gguf", source, found, "--overwrite", monkeypatch=monkeypatch) == 2
    assert "would replace the plan" in capsys.readouterr().err and read_plan(found)


def test_rotary_tables_and_stand_ins_are_no_parameters(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = tiny_model("Llama", rope_parameters={**rope, "original_max_position_embeddings": 32})
    source = write_gguf(model, tmp_path / "in.gguf")
    assert "rope_freqs.weight" in _read(source)[1]
    total = sum(parameter.numel() for parameter in model.parameters())
    first = apply_plan(source, tmp_path / "one.gguf", Plan(4, (), (2,)))
    ffn = sum(parameter.numel() for parameter in model.model.layers[2].mlp.parameters())
    assert (first.before.parameters, first.after.parameters) == (total, total - ffn)
    assert apply_plan(tmp_path / "one.gguf", tmp_path / "two.gguf", Plan(4)).before.parameters == total - ffn


def test_a_file_of_another_size_is_remarked_on(found, tmp_path, monkeypatch, capsys):
    source = write_gguf(tiny_model("Llama"), tmp_path / "in.gguf")
    assert run("--apply_plan", found, "--gguf", source, tmp_path / "out.gguf", monkeypatch=monkeypatch) == 0
    assert "is this file another model's?" in capsys.readouterr().out
