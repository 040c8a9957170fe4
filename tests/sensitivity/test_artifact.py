"""The gradients' file: bound to every weight, read strictly, and with settings of its own where it is given by name."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lib.sensitivity.compute
from lib.config.gradients import GradientSettings, is_ours
from lib.config.mixture import Mixture
from lib.errors import InputError
from lib.models.decoder import Decoder
from lib.sensitivity import artifact
from lib.sensitivity.artifact import Artifact, fingerprint
from lib.sensitivity.gradients import connection_sensitivity
from tests.command import run_alp, run_gradient
from tests.families import tiny_model, tiny_windows
from tests.sensitivity.rewritten import rewritten

SEARCHES = {"max_examples": 150, "deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(tiny_model("Llama"))


@pytest.fixture(scope="module")
def kept(decoder) -> Artifact:
    layers = connection_sensitivity(decoder, tiny_windows())
    return Artifact(
        "a model", fingerprint(decoder), "0", GradientSettings(Mixture.of("a text"), 5, 16), layers, {"threads": 1}
    )


# The fingerprint ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fingerprint_is_of_every_single_weight(dtype):
    decoder = Decoder(tiny_model("Llama").to(dtype))
    before, seen = fingerprint(decoder), set()
    for parameter in decoder.model.parameters():
        for place in torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))[:3].tolist():
            value = parameter.view(-1)[place].clone()
            parameter.view(-1)[place] = value + 0.5
            seen.add(fingerprint(decoder))
            parameter.view(-1)[place] = value
    assert before not in seen and len(seen) == 3 * len(list(decoder.model.parameters()))
    assert fingerprint(decoder) == before


def test_a_fingerprint_is_of_what_is_computed_from_the_weights():
    model = tiny_model("Llama")
    found = {fingerprint(Decoder(copy.deepcopy(model)))}
    for name, value in (("rms_norm_eps", 0.1), ("_name_or_path", "elsewhere")):
        other = copy.deepcopy(model)
        setattr(other.config, name, value)
        found.add(fingerprint(Decoder(other)))
    assert len(found) == 2  # it is not of the place


def test_a_fingerprint_is_read_in_pieces_of_any_size(decoder, monkeypatch):
    whole = fingerprint(decoder)
    monkeypatch.setattr(artifact, "_PIECE", 7)
    assert fingerprint(decoder) == whole


# The file -------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(kept, tmp_path):
    artifact.write(tmp_path / "a.json", kept)
    assert artifact.read(tmp_path / "a.json") == kept


@settings(**SEARCHES)
@given(data=st.data())
def test_a_file_with_any_byte_changed_is_refused_in_one_line(kept, tmp_path, data):
    path = tmp_path / "a.json"
    path.unlink(missing_ok=True)
    artifact.write(path, kept)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
    byte = data.draw(st.integers(0, 255))
    if kind == "cut":
        del content[place:]
    else:
        content[place : place + (kind == "change")] = [byte]
    path.write_bytes(content)
    try:
        assert artifact.read(path) == kept  # white space
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        assert is_ours(path) or "delete" not in str(error) and "--overwrite" not in str(error)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(**SEARCHES)
@given(data=st.data())
def test_a_file_of_other_values_is_refused_or_read_as_numbers_that_can_be(kept, tmp_path, data):
    """Even with the digest of its content: nothing that is read makes a traceback, or a density that is no number."""
    path = tmp_path / "a.json"
    path.unlink(missing_ok=True)
    artifact.write(path, kept)
    content = json.loads(path.read_text())
    inner, name = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(inner[name], dict | list) and inner[name] and data.draw(st.booleans()):
        inner = inner[name]
        name = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
    inner[name] = data.draw(json_values)
    path.write_text(json.dumps(content))
    if name not in ("format", "digest"):
        rewritten(path)
    try:
        found = artifact.read(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        for spread in [layer.layer for layer in found.layers]:
            assert type(spread.count) is int and 0 <= spread.redundancy <= spread.count


def test_a_file_of_another_kind_is_never_written_over(kept, tmp_path):
    (tmp_path / "a.json").write_text('{"tool": "ppllms"}')
    with pytest.raises(InputError, match="is no file of gradients, and is not replaced"):
        artifact.write(tmp_path / "a.json", kept)
    assert (tmp_path / "a.json").read_text() == '{"tool": "ppllms"}'


# Given by name --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made(tiny_folder, text_file, alp_arguments, tmp_path, monkeypatch) -> Path:
    """A file of settings that are not those of `alp_arguments`."""
    path = tmp_path / "made.json"
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 2, "--grad_seqlen", 20, "--grad_type", "l1"]
    assert run_gradient(*flags, "--grad_seed", 7, "--output", path, monkeypatch=monkeypatch) == 0
    return path


def test_a_file_that_is_named_is_taken_whatever_its_settings_which_the_result_has(
    made, alp_arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lib.sensitivity.compute, "connection_sensitivity", None)
    assert run_alp(*alp_arguments, "--gradients", made, "--seed", 3, monkeypatch=monkeypatch) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["seed"] == 3 and result["gradients"]["seed"] == 7
    assert (result["gradients"]["seqlen"], result["grad_type"], result["grad_nsamples"]) == (20, "l1", 2)
    told = capsys.readouterr().out
    assert "l1 of the last token's loss, 2 windows of 20 tokens" in told and f"found in {made}" in told
    assert not Path("gradients").exists()


def test_a_named_file_goes_with_several_seeds_and_counts_by_its_content(
    made, alp_arguments, tiny_folder, text_file, tmp_path, monkeypatch
):
    command = [*alp_arguments, "--gradients", made, "--seed", 0, 1]

    def lines() -> list[dict]:
        assert run_alp(*command, monkeypatch=monkeypatch) == 0
        return [json.loads(line)["result"] for line in (tmp_path / "run/results.jsonl").read_text().splitlines()]

    assert [(line["seed"], line["gradients"]["seed"]) for line in lines()] == [(0, 7), (1, 7)]
    assert len(lines()) == 2
    flags = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 4, "--grad_seqlen", 16, "--overwrite"]
    assert run_gradient(*flags, "--output", made, monkeypatch=monkeypatch) == 0
    assert [line["grad_nsamples"] for line in lines()] == [2, 2, 4, 4]


def test_the_seed_of_the_gradients_is_not_that_of_the_calibration(alp_arguments, tmp_path, monkeypatch):
    found = []
    for flags in ([], ["--seed", 3], ["--grad_seed", 3]):
        assert run_alp(*alp_arguments, "--overwrite", *flags, monkeypatch=monkeypatch) == 0
        found.append(json.loads((tmp_path / "run/result.json").read_text()))
    assert [one["gradients"]["seed"] for one in found] == [0, 0, 3]
    assert found[0]["layer_density"] == found[1]["layer_density"] != found[2]["layer_density"]
    assert found[0]["perplexity"] != found[1]["perplexity"]


def test_a_name_with_control_characters_is_written_on_one_line(text_file, alp_arguments, tmp_path, monkeypatch):
    text = tmp_path / "a\x1b[31m\nb.txt"
    text.write_text(text_file.read_text())
    for _ in range(2):  # computed, then found
        flags = ["--calibration_dataset", text, "--prune_method", "magnitude_alp", "--overwrite"]
        assert run_alp(*alp_arguments, *flags, monkeypatch=monkeypatch) == 0
    (path,) = Path("gradients").iterdir()
    assert "\x1b" not in str(artifact.read(path).settings.dataset)
