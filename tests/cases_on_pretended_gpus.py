"""Runs on pretended GPUs; `tests/test_on_pretended_gpus.py` starts them in a process that can have some."""

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

import alp_prune
import lib.heal.__main__
import lib.models.decoder
import ppllms
import save_gradient
from lib.sparsity import sparsegpt
from tests.command import run
from tests.pretend_cuda import Gpus, pretend_cuda

SCRIPTS = {"ppllms": ppllms, "alp_prune": alp_prune, "save_gradient": save_gradient, "heal": lib.heal.__main__}
COUNTS = ["--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--nsamples", 3]
GRADIENTS = ["--grad_nsamples", 3, "--grad_seqlen", 16]
RUNS: dict[str, tuple[str, list]] = {
    "ppllms": ("ppllms", COUNTS),
    "compensated": ("ppllms", [*COUNTS, "--compensate", "all"]),
    "blockpruner": ("ppllms", ["--method", "blockpruner", "--prune_rate", 0.1, "--nsamples", 3]),
    "own text": ("ppllms", [*COUNTS, "--dataset", "self"]),
    "sparsegpt_alp": ("alp_prune", ["--prune_method", "sparsegpt_alp", "--nsamples", 4, *GRADIENTS]),
    "ria_owl": ("alp_prune", ["--prune_method", "ria_owl", "--nsamples", 4, "--sparsity_ratio", 0.6]),
    "admm": ("alp_prune", ["--prune_method", "admm", "--nsamples", 4]),
    "2:4": ("alp_prune", ["--prune_method", "wanda", "--sparsity_type", "2:4", "--nsamples", 4]),
    "gptq": ("alp_prune", ["--prune_method", "wanda", "--wbits", 4, "--gptq", "--nsamples", 4]),
    "save_gradient": ("save_gradient", ["--ngrad", 3, "--grad_seqlen", 16]),
    "heal": ("heal", ["--steps", 3, "--train_batch_size", 2, "--learning_rate", 0.001]),
}
MEASURED = ("perplexity", "kl_divergence", "bi_scores", "importance", "sparsity", "layer_sparsity", "healing", "layers")
CHOSEN = ("mha_removed", "ffn_removed")


_known: dict[tuple, tuple[dict, Gpus]] = {}  # runs in which nothing fails, which several tests ask for


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    """Triton's interpreter would run the kernel, slowly; `tests/sparsity/test_kernels.py` does that."""
    monkeypatch.setattr(sparsegpt, "find_kernel", lambda device: (None, "pretended"))


@pytest.fixture
def pruned(tiny_folder, text_file, tmp_path_factory, monkeypatch) -> Path:
    """A model to heal."""
    folder = tmp_path_factory.mktemp("pruned")
    flags = ["--model_name", tiny_folder, *COUNTS, "--dataset", text_file, "--eval_datasets", text_file, "--seqlen", 32]
    flags += ["--eval_windows", 4, "--save_model", folder / "model", "--output_dir", folder / "run", "--device", "cpu"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    return folder / "model"


@pytest.fixture
def go(request, tiny_folder, text_file, tmp_path, monkeypatch) -> Callable[..., tuple[dict, Gpus]]:
    """Runs a command of `RUNS` on a pretended GPU, several, or none; its result, and what was asked of them."""
    monkeypatch.chdir(tmp_path)
    numbers = count()

    def of(name: str, *flags, gpus: int = 1, **options) -> tuple[dict, Gpus]:
        if not options and (name, flags, gpus) in _known:
            return _known[name, flags, gpus]
        script, asked = RUNS[name]
        folder, model = (
            Path(f"run-{next(numbers)}"),
            request.getfixturevalue("pruned" if name == "heal" else "tiny_folder"),
        )
        command = ["--model", model, *asked]
        if script == "save_gradient":
            command += ["--dataset", text_file, "--output", folder / "result.json"]
        else:
            calibration, evaluation = (
                "--calibration_dataset",
                "--eval_datasets" if script != "alp_prune" else "--dataset",
            )
            command += ["--seqlen", 32, evaluation, text_file, "--eval_windows", 6, "--output_dir", folder]
            command += [] if "--dataset" in asked else [calibration, text_file]
        places = [] if "--device_map" in flags else ["--device", "cuda" if gpus else "cpu"]
        shutil.rmtree("gradients", ignore_errors=True)  # of an earlier run
        with pretend_cuda(gpus, **options) as pretended:
            status = run(*command, *flags, *places, monkeypatch=monkeypatch, script=SCRIPTS[script])
        assert status == 0, pretended.refused
        found = _result(folder), pretended
        if not options:
            _known[name, flags, gpus] = found
        return found

    return of


def _result(folder: Path) -> dict:
    """What a run measured and chose."""
    path = folder / "result.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    return {name: content[name] for name in (*MEASURED, *CHOSEN) if name in content}


def alike(found: object, other: object, tolerance: float = 1e-4) -> bool:
    if isinstance(found, dict) and isinstance(other, dict):
        return found.keys() == other.keys() and all(alike(found[name], other[name], tolerance) for name in found)
    if isinstance(found, list) and isinstance(other, list):
        return len(found) == len(other) and all(alike(*pair, tolerance) for pair in zip(found, other, strict=True))
    if isinstance(found, float):
        return found == pytest.approx(other, rel=tolerance, abs=tolerance)
    return found == other


@pytest.mark.parametrize("name", ["compensated", "sparsegpt_alp", "save_gradient", "heal"])
def test_a_gpu_gives_what_the_cpu_gives(go, name):
    found, pretended = go(name)
    assert pretended.allocations > 100 and pretended.launches.total() > 100 and not any(pretended.held)
    assert found and alike(found, go(name, gpus=0)[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppllms", "blockpruner", "own text", "ria_owl", "admm", "2:4", "gptq"])
def test_other_methods_too(go, name):
    assert alike(go(name)[0], go(name, gpus=0)[0])


@pytest.mark.parametrize(
    "name, place",
    [("ppllms", "disk"), ("sparsegpt_alp", "cpu"), pytest.param("sparsegpt_alp", "disk", marks=pytest.mark.slow)],
)
def test_an_offloaded_model_gives_the_same(go, name, place):
    assert alike(go(name, "--offload", place)[0], go(name)[0])


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("sparsegpt_alp", "bfloat16"),
        pytest.param("heal", "bfloat16", marks=pytest.mark.slow),
        *(pytest.param(name, "float16", marks=pytest.mark.slow) for name in ("compensated", "sparsegpt_alp", "heal")),
    ],
)
def test_half_precision_runs(go, name, dtype):
    assert alike(go(name, "--dtype", dtype)[0], go(name, "--dtype", dtype, gpus=0)[0], tolerance=0.05)


@pytest.mark.parametrize("name", ["ppllms", pytest.param("sparsegpt_alp", marks=pytest.mark.slow)])
def test_two_gpus_share_a_model(go, name):
    found, pretended = go(name, "--device_map", "balanced", gpus=2)
    assert min(pretended.peak) > 0 and alike(found, go(name)[0])


@pytest.mark.parametrize("name", ["sparsegpt_alp", pytest.param("ppllms", marks=pytest.mark.slow)])
def test_hidden_states_of_an_offloaded_model_stay_on_a_gpu_that_has_room(go, name, monkeypatch):
    """Else they go to the host after each layer."""
    found, roomy = go(name, "--offload", "cpu")
    monkeypatch.setattr(lib.models.decoder, "free_bytes", lambda device: 0)
    other, full = go(name, "--offload", "cpu", limit=2**30)

    def to_host(gpus: Gpus) -> int:
        places = gpus.copied.items()
        return sum(size for (direction, line), size in places if direction == "cuda to cpu" and "activations" in line)

    assert alike(found, other) and 2 * to_host(roomy) < to_host(full)


def test_with_little_memory_batches_are_halved(go):
    whole, _ = go("sparsegpt_alp", "--batch_size", 4)
    tight, other = go("sparsegpt_alp", "--batch_size", 4, fails=lambda n, size: size > 800_000)  # logits of 4 windows
    assert other.refused and alike(tight, whole)


@pytest.mark.parametrize(
    "name, places",
    [
        ("sparsegpt_alp", 3),
        *(pytest.param(n, 30, marks=pytest.mark.slow) for n in ("sparsegpt_alp", "compensated")),
    ],
)
def test_memory_that_is_out_for_once_costs_no_run(go, name, places):
    """At one allocation of many; not among the first, since a model is loaded once."""
    expected, pretended = go(name)
    numbers = range(pretended.allocations // 10, pretended.allocations, pretended.allocations // places)
    for number in numbers:
        found, other = go(name, fails=lambda n, size, number=number: n == number)
        assert len(other.refused) == 1 and alike(found, expected), (number, other.refused)


@pytest.mark.parametrize("name, most", [("sparsegpt_alp", 40), pytest.param("ria_owl", 30, marks=pytest.mark.slow)])
def test_a_layer_waits_for_the_gpu_only_so_often(go, name, most):
    """Of what prunes, so not of evaluation, samples and loading."""
    pretended = go(name)[1]
    waits = sum(count for (_, line), count in pretended.waits.items() if line.startswith("lib/sparsity/"))
    assert 0 < waits <= 4 * most
    assert sum(count for (_, line), count in pretended.waits.items() if "weight_deltas" in line) == 4, "one a layer"
