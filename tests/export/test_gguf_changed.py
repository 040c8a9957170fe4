"""A GGUF file pruned by the plan of a compensated run holds what that run refitted, and is never written without."""

import copy
import dataclasses
import json
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from lib.config.plan import Changed, Plan, read_plan
from lib.errors import InputError
from lib.export.gguf import apply_plan
from lib.export.gguf_changed import _kind
from lib.export.huggingface import save_pruned
from lib.models.decoder import Decoder
from lib.storage.model_folder import signature
from tests.command import run
from tests.families import tiny_model

gguf = pytest.importorskip("gguf")

from tests.export.gguf_writer import write_gguf  # noqa: E402

PLAN = Plan(4, mha_removed=(1, 2), ffn_removed=(2,))  # layer 1 without attention, 2 gone
PROJECTIONS = ((0, "self_attn.o_proj"), (1, "mlp.down_proj"), (3, "self_attn.o_proj"), (3, "mlp.down_proj"))
WRITTEN = {  # types that gguf writes: the largest error that they make, as a share of the largest weight
    "F32": 0,
    "F16": 2**-11,
    "BF16": 2**-8,
    "Q4_0": 1 / 8,
    "Q4_1": 1 / 15,
    "Q5_0": 1 / 16,
    "Q5_1": 1 / 31,
    "Q8_0": 1 / 254,
}
FALLBACK = ("Q6_K", "Q2_K", "IQ4_NL")


def _tiny(**sizes) -> torch.nn.Module:
    return tiny_model("Llama", **{"intermediate_size": 64, **sizes})


@torch.no_grad()
def _refit(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with other weights in the refitted projections."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    for layer, name in PROJECTIONS:
        weight = model.model.layers[layer].get_submodule(name).weight
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def _saved(
    model: torch.nn.Module, folder: Path, save_format: str = "hf", max_shard_size: str | None = None, plan: Plan = PLAN
) -> Path:
    """The result.json of a run with this compensated model, saved beside it."""
    save_pruned(Decoder(copy.deepcopy(model)), plan, None, folder / "out", save_format, max_shard_size=max_shard_size)
    entries = [{"layer": layer, "name": name, "kept": True, "before": 1.0, "after": 0.5} for layer, name in PROJECTIONS]
    result = {
        "tool": "ppllms",
        "model": "some/model",
        "num_layers": 4,
        "mha_removed": plan.mha_removed,
        "ffn_removed": plan.ffn_removed,
        "parameters": {"total": sum(parameter.numel() for parameter in model.parameters())},
        "compensation": {
            "mode": "all",
            "projections": [*entries, {"layer": 0, "name": "mlp.down_proj", "kept": False}],
        },
        "saved_model": str((folder / "out").resolve()),
        "saved": signature(folder / "out"),
        "save_format": save_format,
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder / "result.json"


def _changed(result: Path) -> Changed:
    refitted = read_plan(result).changed
    assert refitted and refitted.linears == PROJECTIONS
    return refitted


def _tensors(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def _expected(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The refitted weights by the names that they have in the pruned file."""
    places = {f"blk.{layer - (layer > 2)}": model.model.layers[layer] for layer in range(4)}
    return {
        "blk.0.attn_output.weight": places["blk.0"].self_attn.o_proj.weight.numpy(),
        "blk.1.ffn_down.weight": places["blk.1"].mlp.down_proj.weight.numpy(),
        "blk.2.attn_output.weight": places["blk.2"].self_attn.o_proj.weight.numpy(),
        "blk.2.ffn_down.weight": places["blk.2"].mlp.down_proj.weight.numpy(),
    }


def _check(written: Path, plain: Path, refitted: torch.nn.Module, kind: str, largest_error: float) -> None:
    """Changed weights are there in this type, to its error; all other tensors are those of the uncompensated file."""
    found, without, expected = _tensors(written), _tensors(plain), _expected(refitted)
    assert list(found) == list(without)
    for name, tensor in found.items():
        if name in expected:
            held, largest = gguf.quants.dequantize(tensor.data, tensor.tensor_type), abs(expected[name]).max()
            assert tensor.tensor_type.name == kind and tensor.shape.tolist() == list(held.shape[::-1])
            assert abs(held - expected[name]).max() <= 1.02 * largest_error * largest
        else:
            assert tensor.tensor_type == without[name].tensor_type
            assert tensor.data.tobytes() == without[name].data.tobytes()


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_file_is_that_of_the_refitted_model_in_the_types_of_the_given_one(kind, tmp_path):
    dense = _tiny()
    refitted = _refit(dense)
    result = _saved(refitted, tmp_path)
    source = write_gguf(dense, tmp_path / "in.gguf", kind=kind)
    done = apply_plan(source, tmp_path / "out.gguf", PLAN, changed=_changed(result))
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    _check(tmp_path / "out.gguf", tmp_path / "plain.gguf", refitted, kind, WRITTEN[kind])
    assert done.changed == {(kind, kind): 4}
    apply_plan(write_gguf(refitted, tmp_path / "refitted.gguf", kind=kind), tmp_path / "same.gguf", PLAN)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "same.gguf").read_bytes()


@pytest.mark.parametrize("kind", FALLBACK)
def test_types_that_gguf_cannot_write_become_q8_0(kind, tmp_path, monkeypatch, capsys):
    dense = _tiny(hidden_size=256, intermediate_size=256)
    refitted = _refit(dense)
    result, target = _saved(refitted, tmp_path), tmp_path / "out.gguf"
    with monkeypatch.context() as patch:  # any bytes, as weights of a type that is only read
        patch.setattr(gguf.quants, "quantize", lambda tensor, number: _any_bytes(tensor, number))
        source = write_gguf(dense, tmp_path / "in.gguf", kind=kind)
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    assert run("--apply_plan", result, "--gguf", source, target, monkeypatch=monkeypatch) == 0
    _check(target, tmp_path / "plain.gguf", refitted, "Q8_0", WRITTEN["Q8_0"])
    line = f"Changed     4 tensors from {tmp_path / 'out'}: 4 as Q8_0 (gguf cannot write {kind})\n"
    assert line in capsys.readouterr().out


def _any_bytes(tensor: np.ndarray, kind: int) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.F32:
        return tensor
    return np.full(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind), 17, np.uint8)


def test_rows_that_no_block_divides_become_f32():
    kinds = gguf.GGMLQuantizationType
    assert _kind(kinds.F64, 48) == kinds.F32 and _kind(kinds.F64, 64) == kinds.Q8_0


def test_a_file_of_several_types_keeps_them_and_says_so(tmp_path, monkeypatch, capsys):
    """FFN of width 48: its down projections are F32 in a Q8_0 file."""
    dense = _tiny(intermediate_size=48)
    result = _saved(_refit(dense), tmp_path)
    source = write_gguf(dense, tmp_path / "in.gguf", kind="Q8_0")
    assert run("--apply_plan", result, "--gguf", source, tmp_path / "out.gguf", monkeypatch=monkeypatch) == 0
    assert f"Changed     4 tensors from {tmp_path / 'out'}: 2 as Q8_0, 2 as F32\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("save_format", "size"), [("hf", "30KB"), ("masked", None), ("masked", "30KB"), ("nemotron-nas", None)]
)
def test_every_save_format_and_shards_give_the_same_file(save_format, size, tmp_path):
    dense = _tiny()
    refitted, source = _refit(dense), write_gguf(dense, tmp_path / "in.gguf", kind="F16")
    for name, options in ("one", ("hf", None)), ("other", (save_format, size)):
        (tmp_path / name).mkdir()
        result = _saved(refitted, tmp_path / name, *options)
        apply_plan(source, tmp_path / f"{name}.gguf", PLAN, changed=_changed(result))
    assert bool(size) == (len(list((tmp_path / "other/out").glob("*.safetensors"))) > 1)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()


def test_weights_saved_in_bf16_are_written_exactly_in_f32(tmp_path):
    dense = _tiny()
    refitted = _refit(dense).bfloat16()
    source = write_gguf(dense, tmp_path / "in.gguf")
    apply_plan(source, tmp_path / "out.gguf", PLAN, changed=_changed(_saved(refitted, tmp_path)))
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    _check(tmp_path / "out.gguf", tmp_path / "plain.gguf", refitted.float(), "F32", 0)


def test_a_run_that_kept_no_refit_gives_the_uncompensated_file(tmp_path, monkeypatch, capsys):
    dense = _tiny()
    result = _saved(dense, tmp_path)
    _rewrite(
        result, compensation={"mode": "all", "projections": [{"layer": 3, "name": "mlp.down_proj", "kept": False}]}
    )
    source = write_gguf(dense, tmp_path / "in.gguf")
    assert run("--apply_plan", result, "--gguf", source, tmp_path / "out.gguf", monkeypatch=monkeypatch) == 0
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert "Changed" not in capsys.readouterr().out


@pytest.mark.parametrize("sizes", [{}, {"num_key_value_heads": 2}])
@torch.no_grad()
def test_a_folder_in_which_all_linears_were_trained(sizes, tmp_path, monkeypatch):
    """Queries and keys too, whose rows are in another order in a GGUF file; the plan is one of the folder's files."""
    dense, healed = _tiny(**sizes), _tiny(**sizes)
    source, changed = write_gguf(dense, tmp_path / "in.gguf", kind="F16"), []
    for layer, block in enumerate(healed.model.layers):
        for name, module in block.named_modules():
            if isinstance(module, torch.nn.Linear) and PLAN.mode(layer).attention * ("attn" in name) + (
                PLAN.mode(layer).ffn * ("mlp" in name)
            ):
                module.weight.copy_(torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(layer)))
                changed.append([layer, name])
    assert len(changed) == 4 + 3 + 3 + 4 + 3
    plan = json.loads(_saved(healed, tmp_path).read_text()) | {"changed": changed}
    (tmp_path / "out/plan.json").write_text(json.dumps({**plan, "compensation": None, "saved_model": None}))
    written = tmp_path / "out.gguf"
    assert run("--apply_plan", tmp_path / "out", "--gguf", source, written, monkeypatch=monkeypatch) == 0
    apply_plan(write_gguf(healed, tmp_path / "healed.gguf", kind="F16"), tmp_path / "same.gguf", PLAN)
    assert written.read_bytes() == (tmp_path / "same.gguf").read_bytes()
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    assert written.read_bytes() != (tmp_path / "plain.gguf").read_bytes()


def test_a_plan_that_was_taken_out_of_its_folder_is_refused(tmp_path, monkeypatch, capsys):
    dense = _tiny()
    plan = json.loads(_saved(dense, tmp_path).read_text()) | {"changed": [[0, "mlp.down_proj"]], "compensation": None}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    source = write_gguf(dense, tmp_path / "in.gguf")
    flags = ["--apply_plan", tmp_path / "plan.json", "--gguf", source, tmp_path / "out.gguf"]
    assert run(*flags, monkeypatch=monkeypatch) == 2
    assert f"{tmp_path} holds no weights beside its plan; give the folder of the saved model" in capsys.readouterr().err


# What is refused ------------------------------------------------------------------------------------------------------


def _rewrite(result: Path, **changes) -> None:
    content = json.loads(result.read_text()) | changes
    result.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("case", ["not saved", "moved", "changed"])
def test_without_the_saved_model_nothing_is_written(case, tmp_path, monkeypatch, capsys):
    dense = _tiny()
    result, target = _saved(_refit(dense), tmp_path), tmp_path / "out.gguf"
    source = write_gguf(dense, tmp_path / "in.gguf")
    if case == "not saved":
        _rewrite(result, saved_model=None, saved=None, save_format=None)
    elif case == "moved":
        (tmp_path / "out").rename(tmp_path / "elsewhere")
    else:
        shutil.copyfile(tmp_path / "out/config.json", tmp_path / "out/more.json")
    assert run("--apply_plan", result, "--gguf", source, target, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert "refitted 4 output projections and saved" in error and error.count("\n") == 1
    assert f"run --apply_plan {result} --save_model OUT with its --compensate" in error
    assert not target.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"linears": ((1, "self_attn.o_proj"),)}, "holds no self_attn.o_proj of layer 1, which"),  # removed
        ({"linears": ((2, "mlp.down_proj"),)}, "holds no mlp.down_proj of layer 2, which"),
        ({"linears": ((0, "attention.dense"),)}, "holds no attention.dense of layer 0, which"),
        ({"is_masked": True}, "holds 0 tensors 3.self_attn.o_proj.weight in place of one"),
    ],
)
def test_projections_that_are_in_no_file_are_refused_by_name(change, reason, tmp_path):
    dense = _tiny()
    refitted = dataclasses.replace(_changed(_saved(_refit(dense), tmp_path)), **change)
    with pytest.raises(InputError, match=reason):
        apply_plan(write_gguf(dense, tmp_path / "in.gguf"), tmp_path / "out.gguf", PLAN, changed=refitted)
    assert not (tmp_path / "out.gguf").exists()


def test_a_file_of_another_model_is_refused(tmp_path):
    refitted = _changed(_saved(_refit(_tiny()), tmp_path))
    source = write_gguf(_tiny(intermediate_size=96), tmp_path / "in.gguf")
    with pytest.raises(InputError, match=r"ffn_down.weight is \[96, 32\], and \[64, 32\] in .*; give the file that"):
        apply_plan(source, tmp_path / "out.gguf", PLAN, changed=refitted)


def test_big_endian_files_are_refused(tmp_path):
    dense = _tiny()
    refitted = _changed(_saved(_refit(dense), tmp_path))
    source = write_gguf(dense, tmp_path / "in.gguf", endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(InputError, match="is big-endian.*convert it with gguf-convert-endian"):
        apply_plan(source, tmp_path / "out.gguf", PLAN, changed=refitted)


# In llama.cpp ---------------------------------------------------------------------------------------------------------


@pytest.mark.llama_cpp
@torch.no_grad()
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_llama_cpp_runs_the_compensated_model(kind, tmp_path):
    """Logits of the saved model, to rounding in F32 and to the quantization in Q8_0; the refit moves them by over 1."""
    llama_cpp = pytest.importorskip("llama_cpp")
    from tests.export.test_gguf import _ids, _LlamaCpp

    dense = _tiny()
    refitted = _refit(dense)
    source = write_gguf(dense, tmp_path / "in.gguf", kind=kind)
    apply_plan(source, tmp_path / "out.gguf", PLAN, changed=_changed(_saved(refitted, tmp_path)))
    apply_plan(source, tmp_path / "plain.gguf", PLAN)
    ids = _ids(dense, 48)
    found, plain = (_LlamaCpp(llama_cpp, tmp_path / name, 64).logits(ids) for name in ("out.gguf", "plain.gguf"))
    Decoder(refitted).apply(PLAN)
    difference = (found - refitted(input_ids=ids).logits[0]).abs().max()
    assert difference < (1e-4 if kind == "F32" else 0.2) and (found - plain).abs().max() > 1


def test_a_run_that_compensates_prunes_the_file_of_its_model_alike(tiny_folder, text_file, tmp_path, monkeypatch):
    """From the command line to the file: what `--compensate` found is in it."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    write_gguf(model.requires_grad_(False), tmp_path / "in.gguf")
    flags = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--seqlen", 16]
    flags += ["--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--nsamples", 40]
    flags += ["--compensate", "all", "--save_model", tmp_path / "out"]
    assert run(*flags, "--output_dir", tmp_path / "run", monkeypatch=monkeypatch) == 0
    plan = ["--apply_plan", tmp_path / "run/result.json"]
    assert run(*plan, "--gguf", tmp_path / "in.gguf", tmp_path / "out.gguf", monkeypatch=monkeypatch) == 0
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    layers, found = saved.model.layers, _tensors(tmp_path / "out.gguf")
    refits, compared = json.loads((tmp_path / "run/result.json").read_text())["compensation"]["projections"], 0
    for index, layer in enumerate(layers):
        for name, path in (("attn_output", "self_attn.o_proj"), ("ffn_down", "mlp.down_proj")):
            with suppress(AttributeError):  # removed
                weight = layer.get_submodule(path).weight
                assert np.array_equal(found[f"blk.{index}.{name}.weight"].data, weight.detach().numpy())
                compared += 1
    assert compared >= sum(one["kept"] for one in refits) > 0
