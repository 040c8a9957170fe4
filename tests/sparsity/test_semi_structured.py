"""2:4 models run in torch's semi-structured kernels on GPUs that have them, and are refused clearly elsewhere."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

import lib.sparsity.prepare
import lib.sparsity.run
from lib.config.methods import parse_pattern
from lib.config.sources import ModelSource
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.models.loading import load_model
from lib.models.matrices import find_matrices
from lib.sparsity import semi_structured_kernels
from lib.sparsity.pruners import Magnitude
from tests.command import run_alp
from tests.families import tiny_model, tiny_windows

HAS_KERNELS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
WIDE = {"hidden_size": 128, "intermediate_size": 256}  # sizes that the kernels take
FLAGS = ["--sparsity_type", "2:4", "--prune_method", "magnitude", "--semi_structured"]


@pytest.mark.skipif(HAS_KERNELS, reason="this machine has the kernels")
def test_without_such_a_gpu_it_is_refused_before_a_model_is_loaded(alp_arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lib.sparsity.prepare, "load_model", None)
    assert run_alp(*alp_arguments, *FLAGS, monkeypatch=monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "need an NVIDIA GPU of compute capability 8.0 or newer, not cpu" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [[], ["--sparsity_type", "4:8"], ["--sparsity_type", "2:4"]])
def test_it_is_for_2_4_only(alp_arguments, monkeypatch, capsys, flags):
    method = "dense" if "2:4" in flags else "wanda"
    flags = [*flags, "--prune_method", method, "--semi_structured"]
    assert run_alp(*alp_arguments, *flags, monkeypatch=monkeypatch) == 2
    assert "--semi_structured: the kernels are for 2:4 sparse weights" in capsys.readouterr().err


def test_dtypes_and_shapes_that_the_kernels_do_not_take_are_refused():
    with pytest.raises(InputError, match="layer 0 self_attn.q_proj is in float32.*--dtype bfloat16"):
        semi_structured_kernels.check_matrices(find_matrices(Decoder(tiny_model("Llama", **WIDE))))
    with pytest.raises(InputError, match="layer 0 self_attn.q_proj is 32 x 32, no multiple of 32 x 64"):
        semi_structured_kernels.check_matrices(find_matrices(Decoder(tiny_model("Llama").bfloat16())))
    semi_structured_kernels.check_matrices(find_matrices(Decoder(tiny_model("Llama", **WIDE).bfloat16())))


def test_a_shape_is_refused_before_the_weights_are_read(alp_arguments, monkeypatch, capsys):
    monkeypatch.setattr(semi_structured_kernels, "check_device", lambda device: None)
    monkeypatch.setattr(lib.sparsity.prepare, "load_model", None)
    assert run_alp(*alp_arguments, *FLAGS, monkeypatch=monkeypatch) == 2
    assert "no multiple of 32 x 64" in capsys.readouterr().err


@pytest.fixture
def stand_ins(monkeypatch):
    """A function that replaces the library's compression, by name; no device is checked."""

    def replace(**libraries):
        found = {name: SimpleNamespace(from_dense=from_dense) for name, from_dense in libraries.items()}
        monkeypatch.setattr(semi_structured_kernels, "LIBRARIES", found)
        monkeypatch.setattr(semi_structured_kernels, "check_device", lambda device: None)
        find_library.cache_clear()

    find_library = semi_structured_kernels.find_library
    yield replace
    find_library.cache_clear()


def test_kernels_that_do_not_run_are_refused():
    """As where torch was built without them: here there is no such device at all."""
    with pytest.raises(
        InputError, match="torch's 2:4 kernels do not run here .cuSPARSELt: .*; CUTLASS: .*leave it out"
    ):
        semi_structured_kernels.find_library(torch.device("cpu"))


def test_the_first_library_that_runs_and_is_right_is_taken(stand_ins):
    def fails(weight):
        raise NotImplementedError("CUDA only")

    cpu = torch.device("cpu")
    stand_ins(cuSPARSELt=fails, CUTLASS=lambda weight: weight)
    assert semi_structured_kernels.find_library(cpu) == "CUTLASS"
    stand_ins(cuSPARSELt=lambda weight: weight, CUTLASS=fails)
    assert semi_structured_kernels.find_library(cpu) == "cuSPARSELt"
    stand_ins(cuSPARSELt=lambda weight: 2 * weight, CUTLASS=fails)
    with pytest.raises(InputError, match="cuSPARSELt: wrong results; CUTLASS: CUDA only"):
        semi_structured_kernels.find_library(cpu)


def test_a_library_that_was_not_found_for_want_of_memory_is_tried_again(stand_ins):
    def runs_out(weight):
        raise torch.OutOfMemoryError

    stand_ins(cuSPARSELt=runs_out, CUTLASS=lambda weight: weight)
    with pytest.raises(torch.OutOfMemoryError):
        semi_structured_kernels.find_library(torch.device("cpu"))
    semi_structured_kernels.LIBRARIES["cuSPARSELt"].from_dense = lambda weight: weight
    assert semi_structured_kernels.find_library(torch.device("cpu")) == "cuSPARSELt"


def test_outputs_that_are_transposed_in_memory_are_copied(stand_ins):
    class Transposed(torch.nn.Linear):
        def forward(self, inputs):
            return (self.weight @ inputs.T).T

    stand_ins(cuSPARSELt=lambda weight: weight)
    linear, inputs = Transposed(128, 64, bias=False), torch.ones(3, 128)
    assert not linear(inputs).is_contiguous()
    with semi_structured_kernels.compressed([linear]):
        assert linear(inputs).is_contiguous()
    assert not linear(inputs).is_contiguous()


def test_the_weights_come_back_even_from_an_error(stand_ins, monkeypatch):
    stand_ins(cuSPARSELt=lambda weight: weight * 2)
    monkeypatch.setattr(semi_structured_kernels, "find_library", lambda device: "cuSPARSELt")
    linears = [matrix.module for matrix in find_matrices(Decoder(tiny_model("Llama")))[0].values()]
    before = [linear.weight.clone() for linear in linears]
    with pytest.raises(RuntimeError), semi_structured_kernels.compressed(linears):
        assert all(torch.equal(linear.weight, 2 * weight) for linear, weight in zip(linears, before, strict=True))
        raise RuntimeError
    assert all(torch.equal(linear.weight, weight) for linear, weight in zip(linears, before, strict=True))


def test_a_run_evaluates_and_times_the_kernels(alp_arguments, tmp_path, monkeypatch, stand_ins):
    """With stand-ins for the kernels: what they are given is 2:4 sparse, and the perplexity is theirs."""
    compressed = []

    def stand_in(weight: torch.Tensor) -> torch.Tensor:
        compressed.append(weight)
        return torch.zeros_like(weight)

    stand_ins(CUTLASS=stand_in)
    monkeypatch.setattr(semi_structured_kernels, "find_library", lambda device: "CUTLASS")
    monkeypatch.setattr(semi_structured_kernels, "check_matrices", lambda linears, has_dtype: None)
    assert run_alp(*alp_arguments, *FLAGS, "--save_model", tmp_path / "out", monkeypatch=monkeypatch) == 0
    assert compressed and all((w.reshape(-1, 4) == 0).sum(dim=1).eq(2).all() for w in compressed)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert set(result["tokens_per_second"]) == {"dense", "semi_structured"}
    assert min(result["tokens_per_second"].values()) > 0 and result["sparsity"] == 0.5
    (found,) = result["perplexity"].values()
    assert found["pruned"] != pytest.approx(found["dense"], rel=0.01)
    saved = find_matrices(Decoder(load_model(ModelSource(str(tmp_path / "out")))))
    assert all(matrix.weight.any() for layer in saved for matrix in layer.values())  # the pruned weights, not these
    assert re.search(r"in 2:4 kernels of CUTLASS [\d,]+: [\d.]+ times\n", (tmp_path / "run/log.txt").read_text())


@pytest.mark.skipif(not HAS_KERNELS, reason="needs an NVIDIA GPU of compute capability 8.0 or newer")
@torch.no_grad()
def test_the_kernels_give_what_the_dense_weights_give():
    model = tiny_model("Llama", **WIDE).bfloat16().cuda()
    decoder, ids = Decoder(model), tiny_windows(4).cuda()
    linears = [matrix.module for layer in find_matrices(decoder) for matrix in layer.values()]
    pruner = Magnitude(parse_pattern("2:4"))
    for linear in linears:
        linear.weight.copy_(pruner.prune([linear.weight], None, 0.5)[0])
    expected = model(input_ids=ids).logits.float()
    with semi_structured_kernels.compressed(linears):
        found = model(input_ids=ids).logits.float()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.equal(model(input_ids=ids).logits.float(), expected)
