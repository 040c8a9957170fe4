"""A file given as a plan holds one, or is refused in a line: whatever anybody may have written into it."""

import copy
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.config.plan import SavedPlan, read_plan
from lib.errors import InputError

VALID = {
    "tool": "ppllms",
    "model": "some/model",
    "model_path": None,
    "num_layers": 4,
    "mha_removed": [2],
    "ffn_removed": [1, 2],
    "parameters": {"total": 1000, "removed": 250},
}
BOUNDED = settings(max_examples=200, derandomize=True, deadline=None, database=None)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANY_JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5)
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("plans") / "result.json"


def plan_or_line(path) -> SavedPlan | None:
    """The plan in a file, whose fields are right; None where it is refused in one line."""
    try:
        saved = read_plan(path)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000 and str(path) in str(error)
        return None
    plan = saved.plan
    assert type(plan.num_layers) is int and 0 < plan.num_layers <= 10_000
    assert type(saved.parameters) is int and saved.parameters > 0
    assert isinstance(saved.model, str) and saved.model.strip() and saved.model.isprintable()
    for layers in (plan.mha_removed, plan.ffn_removed):
        assert len(set(layers)) == len(layers)
        assert all(type(layer) is int and 0 <= layer < plan.num_layers for layer in layers)
    assert len(plan.mha_removed) < plan.num_layers and len(plan.modes) == plan.num_layers
    return saved


@BOUNDED
@given(st.binary(max_size=200))
def test_bytes_are_no_plan(path, content):
    path.write_bytes(content)
    assert plan_or_line(path) is None


@BOUNDED
@given(ANY_JSON)
def test_json_is_a_plan_or_refused(path, content):
    path.write_text(json.dumps(content))
    assert plan_or_line(path) is None


def places(content, before=()) -> list[tuple]:
    """The places of all values in JSON, as keys and indices."""
    found = [before] if before else []
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return found + [place for key, value in inner for place in places(value, (*before, key))]


@BOUNDED
@given(st.sampled_from(places(VALID)), ANY_JSON | st.integers(-3, 20_000), st.booleans())
def test_a_plan_with_another_value_is_right_or_refused(path, place, value, is_removed):
    content = copy.deepcopy(VALID)
    owner = content
    for key in place[:-1]:
        owner = owner[key]
    if is_removed:
        del owner[place[-1]]
    else:
        owner[place[-1]] = value
    path.write_text(json.dumps(content))
    plan_or_line(path)


@BOUNDED
@given(st.integers(0, 199), st.integers(0, 255), st.integers(0, 3))
def test_a_plan_with_another_byte_is_right_or_refused(path, at, byte, cut):
    content = bytearray(json.dumps(VALID).encode())
    content[at % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    plan_or_line(path)


def test_the_plan_that_is_changed_is_one(path):
    path.write_text(json.dumps(VALID))
    saved = plan_or_line(path)
    assert (saved.model, saved.plan.mha_removed, saved.plan.ffn_removed) == ("some/model", (2,), (1, 2))


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
