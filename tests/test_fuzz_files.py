"""States, results and gradients that anybody may have written: what is right is taken, all else is one line."""

import json
import math
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lib.config.gradients import GradientSettings
from lib.config.mixture import Mixture
from lib.errors import InputError
from lib.files import canonical, digest_of_json
from lib.reporting.entries import entries
from lib.reporting.tables import check_result, csv_table, markdown
from lib.sensitivity import artifact
from lib.sensitivity.gradients import LayerSensitivity, Spread
from lib.storage import output_folder, resume_state, state_folder
from lib.storage.results_jsonl import ResultsFile
from lib.storage.resume_state import State
from tests.fuzzing import ANY_JSON, changed, cut_or_flipped, fuzz, parse, written

KEY = {"tool": "alp_prune", "method": "wanda", "seed": 0}
RESULT = {
    "tool": "alp_prune",
    "model": "demo",
    "prune_method": "wanda",
    "sparsity_ratio": 0.5,
    "sparsity_type": "unstructured",
    "sparsity": 0.5,
    "seed": 0,
    "seqlen": 256,
    "nsamples": 32,
    "eval_stride": None,
    "dataset": "demo",
    "perplexity": {"demo": {"dense": 21.4, "pruned": 24.8}},
    "perplexity_standard_error": {"demo": {"dense": 0.6, "pruned": 0.7}},
    "kl_divergence": {"demo": {"pruned": 0.2}},
    "kl_divergence_standard_error": {"demo": {"pruned": 0.01}},
    "kl_divergence_by_window": {"demo": {"pruned": [0.1, 0.3]}},
    "top1_agreement": {"demo": {"pruned": 0.8}},
    "top1_agreement_standard_error": {"demo": {"pruned": 0.01}},
}


def valid_files() -> dict[str, bytes]:
    """The content of a file of each kind, as this version writes it."""
    folder = Path(tempfile.mkdtemp())
    try:
        spread = Spread(100, 0.5, 0.25, 80.0)
        layers = [LayerSensitivity(spread, {"q_proj": spread})]
        gradients = artifact.Artifact(
            "demo", "0" * 64, "1" * 64, GradientSettings(Mixture.of("demo")), layers, {"torch": "2"}
        )
        artifact.write(folder / "gradients.json", gradients)
        ResultsFile(folder).add(canonical(KEY), RESULT)
        state = State(folder / "state", KEY)
        with state.session({"prune": 1.5}):
            state.put("scores", [0.5, 0.25])
            state.put("perplexity of dense on demo", [21.4, 0.6])
            return {
                "gradients": (folder / "gradients.json").read_bytes(),
                "results": (folder / output_folder.RESULTS).read_bytes(),
                "state": (folder / "state" / state_folder.FILE).read_bytes(),
            }
    finally:
        shutil.rmtree(folder)


VALID = valid_files()


def of_state(content: dict) -> dict:
    return {**content, "digest": digest_of_json({name: value for name, value in content.items() if name != "digest"})}


def of_gradients(content: dict) -> dict:
    inner = {name: value for name, value in content.items() if name not in ("format", "digest")}
    return {**content, "digest": digest_of_json(inner)}


SIGNED = {"state": of_state, "results": of_state, "gradients": of_gradients}  # with the digest of their content


def signed(kind: str) -> st.SearchStrategy[bytes]:
    """The valid file with values changed, and the digest that belongs to them."""

    def sign(content: dict) -> bytes:
        try:
            return written(SIGNED[kind](content))
        except ValueError:  # numbers that JSON does not have
            return written(content)

    return changed(json.loads(VALID[kind])).map(sign)


def files_of(kind: str) -> st.SearchStrategy[bytes]:
    """Bytes, JSON, and the valid file with values or bytes changed."""
    valid, content = VALID[kind], json.loads(VALID[kind])
    return (
        st.binary(max_size=200)
        | ANY_JSON.map(written)
        | changed(content).map(written)
        | signed(kind)
        | cut_or_flipped(valid)
        | st.just(valid)
        | st.lists(changed(content).map(written) | st.just(valid), max_size=3).map(b"".join)
    )


@pytest.mark.parametrize("kind", VALID)
def test_what_is_signed_again_is_as_it_was_written(kind):
    content = json.loads(VALID[kind])
    assert SIGNED[kind](content) == content


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def state_or_line(folder: Path, content: bytes | None = None) -> dict | None:
    found = parse(folder / state_folder.FILE, content, lambda: resume_state.read(folder))
    if found is not None:
        assert isinstance(found["key"], str) and isinstance(found["values"], dict)
        assert all(isinstance(name, str) for name in found["values"])
        assert all(isinstance(name, str) and is_number(n) and n >= 0 for name, n in found["seconds"].items())
        json.dumps(found, allow_nan=False)
    return found


@fuzz(files_of("state"))
def test_a_state_is_read_whole_or_refused_in_a_line(folder, content):
    state_or_line(folder, content)
    parse(folder / state_folder.FILE, content, lambda: resume_state.is_unfinished(folder))
    parse(folder / state_folder.FILE, content, lambda: resume_state.was_saved(folder, folder / "model"))
    parse(folder / state_folder.FILE, content, lambda: State(folder, KEY, resume=True))


@fuzz(files_of("results"))
def test_results_are_read_whole_or_refused_in_a_line(folder, content):
    path = folder / output_folder.RESULTS
    results = parse(path, content, lambda: ResultsFile(folder))
    if results and (found := results.find(canonical(KEY))) is not None:
        assert isinstance(found, dict)
        json.dumps(found, allow_nan=False)
        try:
            check_result(found)
        except ValueError as error:
            assert str(error).isprintable()
        else:
            table = entries([found])
            assert markdown(table) is not None and csv_table(table)


@fuzz(files_of("gradients"))
def test_gradients_are_read_whole_or_refused_in_a_line(folder, content):
    found = parse(folder / "gradients.json", content, lambda: artifact.read(folder / "gradients.json"))
    if found is None:
        return
    assert all(isinstance(text, str) for text in (found.model, found.fingerprint, found.text))
    assert isinstance(found.settings.dataset, Mixture) and isinstance(found.environment, dict)
    assert all(type(getattr(found.settings, name)) is int for name in ("nsamples", "seqlen", "seed"))
    assert all(isinstance(getattr(found.settings, name), str) for name in ("loss", "gradient_type"))
    for layer in found.layers:
        for spread in (layer.layer, *layer.linears.values()):
            assert type(spread.count) is int and spread.count > 0
            assert all(is_number(n) and n >= 0 for n in (spread.mean, spread.std, spread.redundancy))


def test_the_files_that_are_changed_are_right(folder):
    assert state_or_line(folder, VALID["state"])["values"]["scores"] == [0.5, 0.25]
    (folder / output_folder.RESULTS).write_bytes(VALID["results"])
    assert ResultsFile(folder).find(canonical(KEY)) == RESULT
    (folder / "gradients.json").write_bytes(VALID["gradients"])
    assert artifact.read(folder / "gradients.json").model == "demo"


READERS = {
    state_folder.FILE: resume_state.read,
    output_folder.RESULTS: ResultsFile,
    "gradients.json": lambda folder: artifact.read(folder / "gradients.json"),
}
ODD = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "deep": lambda path: path.write_text("[" * 10**6 + "\n"),
    "a long number": lambda path: path.write_text("1" * 10_000 + "\n"),
    "not a number": lambda path: path.write_text("NaN\n"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_pipes_folders_loops_and_deep_json_are_refused(name, make, tmp_path):
    def waits(*_) -> None:
        raise TimeoutError("waits for a pipe")

    make(tmp_path / name)
    before = signal.signal(signal.SIGALRM, waits)
    signal.alarm(10)
    try:
        with pytest.raises(InputError) as told:
            READERS[name](tmp_path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert str(told.value).isprintable()
