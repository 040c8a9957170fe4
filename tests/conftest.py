"""Fixtures: no network, no files outside temporary folders, and the shared material where it exists."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # the tests' processes share the cores; their children inherit it
    os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
os.environ["HF_HUB_OFFLINE"] = "1"
_CACHES = tempfile.TemporaryDirectory(prefix="caches-")
os.environ["HF_MODULES_CACHE"] = f"{_CACHES.name}/modules"  # code of reloaded checkpoints
os.environ["HF_DATASETS_CACHE"] = f"{_CACHES.name}/datasets"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by whichever test comes first

import lib.engine.activations  # noqa: E402
import lib.engine.speed  # noqa: E402
import lib.engine.tail  # noqa: E402
import lib.evaluation.samples  # noqa: E402
import lib.reporting.plots  # noqa: E402
from lib.runtime.batching import Batcher  # noqa: E402
from lib.runtime.setup import quiet_libraries  # noqa: E402
from tests.families import tiny_model  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    quiet_libraries()


@pytest.fixture(scope="session", autouse=True)
def _no_caches_stay():
    yield
    _CACHES.cleanup()  # workers of pytest-xdist leave without running finalizers


@pytest.fixture(autouse=True)
def _plots_are_not_rendered(request, monkeypatch):
    """But for tests that are marked `draws`: it takes longer than the rest of a small run."""
    if lib.reporting.plots.has_matplotlib() and not request.node.get_closest_marker("draws"):
        monkeypatch.setattr(lib.reporting.plots, "_save", lambda figure, path: path.touch())


@pytest.fixture(autouse=True)
def _speeds_are_of_few_runs(monkeypatch):
    monkeypatch.setattr(lib.engine.speed, "SECONDS", 0)
    monkeypatch.setattr(lib.engine.speed, "LEAST_RUNS", 1)


@pytest.fixture(autouse=True)
def _samples_are_short(request, monkeypatch):
    """But for tests that are marked `samples`: writing them takes as long as the rest of a small run."""
    if not request.node.get_closest_marker("samples"):
        monkeypatch.setattr(lib.evaluation.samples, "NEW_TOKENS", 4)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real text, a small trained Llama and the reference's figures; not part of the repository."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("the shared reference material is not on this machine")
    return SHARED


@pytest.fixture(scope="session")
def demo_tokenizer():
    from lib.config.sources import ModelSource
    from lib.models.loading import load_tokenizer

    return load_tokenizer(ModelSource("demo"))


@pytest.fixture
def batcher() -> Batcher:
    return Batcher(2)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, demo_tokenizer) -> Path:
    """A checkpoint on disk: a tiny random Llama with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), demo_tokenizer.eos_token_id)
    tiny_model("Llama", vocab_size=len(demo_tokenizer), **ends).save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Some kilobytes of text in one file."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(f"The layer {i} of {i * 7 % 31} was removed, and nothing changed. " for i in range(120)))
    return path


@pytest.fixture
def fails_once(monkeypatch) -> Callable[[int], list]:
    """Lets the n-th call of the model's tail run out of memory; gives the list that every call is added to."""

    def at(number: int) -> list:
        calls, whole = [], lib.engine.tail.tail_losses

        def tail_losses(*args):
            calls.append(1)
            if len(calls) == number:
                raise torch.OutOfMemoryError("out of memory")
            return whole(*args)

        monkeypatch.setattr(lib.engine.activations, "tail_losses", tail_losses)
        return calls

    return at


@pytest.fixture
def arguments(tiny_folder, text_file, tmp_path) -> list:
    """A run of seconds: tiny model, little text, one attention and two FFNs."""
    model = ["--model_name", tiny_folder, "--dataset", text_file, "--eval_datasets", text_file, "--nsamples", 3]
    return [*model, "--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--output_dir", tmp_path / "run"]


@pytest.fixture
def alp_arguments(tiny_folder, text_file, tmp_path, monkeypatch) -> list:
    """An ALP run of seconds: tiny model, little text; in a folder of its own, where gradients and logs are kept."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    text = ["--calibration_dataset", text_file, "--dataset", text_file, "--nsamples", 4, "--grad_nsamples", 3]
    return ["--model", tiny_folder, *text, "--grad_seqlen", 16, "--output_dir", tmp_path / "run"]
