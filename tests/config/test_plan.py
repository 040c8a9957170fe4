"""A file given as a plan holds one, or is refused in a line: whatever anybody may have written into it."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import strategies as st

from lib.config.plan import Changed, SavedPlan, read_plan
from lib.errors import InputError
from tests.fuzzing import ANY_JSON, changed, cut_or_flipped, fuzz, parse, written

VALID = {
    "tool": "ppllms",
    "model": "some/model",
    "model_path": None,
    "num_layers": 4,
    "mha_removed": [2],
    "ffn_removed": [1, 2],
    "parameters": {"total": 1000, "removed": 250},
}
SAVED = {"saved_model": "/models/out", "saved": "0123456789abcdef", "save_format": "hf"}
PROJECTION = {"layer": 3, "name": "mlp.down_proj", "kept": True}
PROJECTIONS = [PROJECTION, {"layer": 0, "name": "self_attn.o_proj", "kept": False}]
CHANGED = {**VALID, "save_format": "hf", "changed": [[3, "mlp.down_proj"], [0, "self_attn.q_proj"]]}  # beside a model
COMPENSATED = {**VALID, **SAVED, "compensation": {"mode": "all", "projections": PROJECTIONS}}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("plans") / "result.json"


def plan_or_line(path, content: bytes | None = None) -> SavedPlan | None:
    """The plan in a file, whose fields are right; None where it is refused in one line."""
    saved = parse(path, content, lambda: read_plan(path))
    if saved is None:
        return None
    plan = saved.plan
    assert type(plan.num_layers) is int and 0 < plan.num_layers <= 10_000
    assert type(saved.parameters) is int and saved.parameters > 0
    assert isinstance(saved.model, str) and saved.model.strip() and saved.model.isprintable()
    for layers in (plan.mha_removed, plan.ffn_removed):
        assert len(set(layers)) == len(layers)
        assert all(type(layer) is int and 0 <= layer < plan.num_layers for layer in layers)
    assert len(plan.mha_removed) < plan.num_layers and len(plan.modes) == plan.num_layers
    if refitted := saved.changed:
        assert refitted.linears and len(set(refitted.linears)) == len(refitted.linears)
        assert all(type(layer) is int and 0 <= layer < plan.num_layers for layer, _ in refitted.linears)
        assert all(isinstance(name, str) and name.strip() and name.isprintable() for _, name in refitted.linears)
        assert refitted.folder is None or refitted.folder.parts
        assert refitted.folder in (None, path.parent) or isinstance(refitted.signature, str)
    return saved


@fuzz(st.binary(max_size=200))
def test_bytes_are_no_plan(path, content):
    assert plan_or_line(path, content) is None


@fuzz(
    changed(COMPENSATED).map(written)
    | cut_or_flipped(written(COMPENSATED))
    | changed(CHANGED).map(written)
    | cut_or_flipped(written(CHANGED))
)
def test_json_with_changed_weights_is_a_plan_or_refused(path, content):
    plan_or_line(path, content)


@fuzz(ANY_JSON.map(written) | changed(VALID).map(written) | cut_or_flipped(written(VALID)))
def test_json_is_a_plan_or_refused(path, content):
    plan_or_line(path, content)


def test_the_plan_that_is_changed_is_one(path):
    saved = plan_or_line(path, written(VALID))
    assert (saved.model, saved.plan.mha_removed, saved.plan.ffn_removed) == ("some/model", (2,), (1, 2))


def test_a_plan_says_what_its_run_refitted_and_where_that_is(path):
    projections = ((3, "mlp.down_proj"),)
    for content, refitted in (
        (VALID, None),
        ({**VALID, **SAVED}, None),
        ({**COMPENSATED, "compensation": None}, None),
        ({**COMPENSATED, "compensation": {"projections": PROJECTIONS[1:]}}, None),
        (COMPENSATED, Changed(path, projections, Path("/models/out"), "0123456789abcdef")),
        (
            {**COMPENSATED, "save_format": "masked"},
            Changed(path, projections, Path("/models/out"), "0123456789abcdef", is_masked=True),
        ),
        ({**VALID, "compensation": COMPENSATED["compensation"]}, Changed(path, projections)),
    ):
        assert plan_or_line(path, written(content)).changed == refitted


def test_the_plan_beside_a_model_says_which_of_its_weights_were_changed(path):
    linears = ((3, "mlp.down_proj"), (0, "self_attn.q_proj"))
    for content, found in (
        (CHANGED, Changed(path, linears, path.parent)),
        ({**CHANGED, "save_format": "masked"}, Changed(path, linears, path.parent, is_masked=True)),
        ({**CHANGED, "changed": []}, None),
    ):
        assert plan_or_line(path, written(content)).changed == found


@pytest.mark.parametrize("value", [{}, 3, [3], [[3]], [[4, "a"]], [[True, "a"]], [[3, ""]], [[3, "a"], [3, "a"]]])
def test_changes_that_no_run_writes_are_refused(path, value):
    path.write_text(json.dumps({**CHANGED, "changed": value}))
    with pytest.raises(InputError, match="holds no plan .*changed linear.*; give a run's result.json"):
        read_plan(path)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"compensation": []}, "fields of its compensation have other types"),
        ({"compensation": {"projections": {}}}, "fields of its compensation have other types"),
        ({"compensation": {"projections": [3]}}, "fields of its compensation have other types"),
        ({"compensation": {"mode": "all"}}, "has no 'projections'"),
        ({"compensation": {"projections": [{"layer": 3, "name": "a"}]}}, "has no 'kept'"),
        ({"compensation": {"projections": [PROJECTION | {"layer": 4}]}}, "in a layer below 4"),
        ({"compensation": {"projections": [PROJECTION | {"layer": True}]}}, "in a layer below 4"),
        ({"compensation": {"projections": [PROJECTION | {"kept": 1}]}}, "must be kept or not"),
        ({"compensation": {"projections": [PROJECTION | {"name": ["a"]}]}}, "linear must have a name"),
        ({"compensation": {"projections": [PROJECTION | {"name": "a\x1b[31mb"}]}}, "linear must have a name"),
        ({"compensation": {"projections": [PROJECTION, PROJECTION]}}, "comes twice"),
        ({"saved_model": ["/"]}, "must have a folder, a digest and a format"),
        ({"saved_model": ""}, "must have a folder, a digest and a format"),
        ({"saved": None}, "must have a folder, a digest and a format"),
        ({"save_format": 1}, "must have a folder, a digest and a format"),
    ],
)
def test_compensations_that_no_run_writes_are_refused(path, change, problem):
    path.write_text(json.dumps(COMPENSATED | change))
    with pytest.raises(InputError, match="--apply_plan .*; give .*result.json") as told:
        read_plan(path)
    assert "\n" not in str(told.value) and problem in str(told.value)


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"num_layers": 10**6, "mha_removed": [], "ffn_removed": []}, "no model has 1,000,000 layers"),
        ({"num_layers": 10**19}, "too large a number"),
        ({"num_layers": True}, "must be whole"),
        ({"mha_removed": [False]}, "must be whole"),
        ({"mha_removed": [2.0]}, "must be whole"),
        ({"mha_removed": {"2": 2}}, "have other types"),
        ({"mha_removed": list(range(10**5))}, "must name different layers below 4"),
        ({"parameters": [1]}, "have other types"),
        ({"parameters": {"total": -1}}, "no model has"),
        ({"model": "a\x1b[31mb"}, "must have a name"),
        ({"model": ["a"]}, "must have a name"),
        ({"model": "\ud800"}, "must have a name"),
        ({"extra": float("nan")}, "NaN is no number"),
    ],
)
def test_what_no_run_writes_is_refused_by_name(path, change, problem):
    path.write_text(json.dumps(VALID | change))
    with pytest.raises(InputError, match="--apply_plan .*holds no plan .*; give a run's result.json") as told:
        read_plan(path)
    assert "\n" not in str(told.value) and len(str(told.value)) < 1000
    assert problem in str(told.value) or len(change.get("mha_removed", "")) > 100


def test_pipes_folders_and_deep_json_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "deep").write_text("[" * 10**6)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "deep", "loop", "folder", "nothing"):
        assert plan_or_line(tmp_path / name) is None
