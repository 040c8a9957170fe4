"""Texts are mixed in the shares that are asked for, or one line says why not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.config.mixture import Mixture, check_evaluation_text, parse_mixture
from lib.errors import InputError


@pytest.mark.parametrize(
    "names, texts, shares",
    [
        (["c4"], ["c4"], [1]),
        (["c4", "wikitext2"], ["c4", "wikitext2"], [1, 1]),
        (["c4:0.7", "wikitext2:0.3"], ["c4", "wikitext2"], [0.7, 0.3]),
        (["c4:3", "wikitext2:1", "self:1e-1"], ["c4", "wikitext2", "self"], [3, 1, 0.1]),
        (["rows.csv::answer:2", "a/b:config:1"], ["rows.csv::answer", "a/b:config"], [2, 1]),
        (["a/b:20231101.en", "c4"], ["a/b:20231101.en", "c4"], [1, 1]),
        (["a::2", "c4"], ["a::2", "c4"], [1, 1]),
        (["a:2::text", "c4"], ["a:2::text", "c4"], [1, 1]),
        (["a:2:1", "c4:1"], ["a:2", "c4"], [1, 1]),
    ],
)
def test_a_number_after_the_last_colon_is_a_share_and_all_else_is_the_name(names, texts, shares):
    assert parse_mixture("--dataset", names) == Mixture(tuple(texts), tuple(shares))


def test_a_file_or_folder_of_the_whole_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text:2").mkdir()
    assert parse_mixture("--dataset", ["text:2", "c4"]).texts == ("text:2", "c4")
    assert parse_mixture("--dataset", ["text:2:3", "c4:1"]) == Mixture(("text:2", "c4"), (3.0, 1.0))
    check_evaluation_text("--dataset", "text:2")


@pytest.mark.parametrize(
    "names, problem",
    [
        (["c4:0", "demo:1"], "--dataset: 0 is no share of a text; give a number above 0"),
        (["demo:1", "c4:-0.5"], "--dataset: -0.5 is no share of a text; give a number above 0"),
        (["c4:nan", "demo:1"], "--dataset: nan is no share"),
        (["c4:inf", "demo:1"], "--dataset: inf is no share"),
        (["c4:0.7"], "--dataset c4:0.7: is the share of a single text; name others too, or leave it out"),
        (["c4:0.7", "demo"], "--dataset: demo has no share, but others have; give one to each text, or to none"),
        (["demo", "./x", "demo"], "--dataset: names a text twice"),
        (["demo:1", "demo:2"], "--dataset: names a text twice"),
        (["a/text", "a/../a/text"], "--dataset: names a text twice"),
    ],
)
def test_what_is_no_mixture_is_told(names, problem):
    with pytest.raises(InputError, match=re.escape(problem)):
        parse_mixture("--dataset", names)


@pytest.mark.parametrize("name", ["self", "c4:0.7", "a.txt:2"])
def test_evaluation_texts_are_neither_mixed_nor_made(name):
    with pytest.raises(InputError, match=f"^--eval_datasets {name}: "):
        check_evaluation_text("--eval_datasets", name)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 400))
def test_samples_are_divided_by_the_shares_with_the_remainder_from_the_first(tenths, total):
    """Against whole numbers: the shares are tenths, as people write them."""
    texts = tuple(map(str, range(len(tenths))))
    mixture = Mixture(texts, tuple(share / 10 for share in tenths))
    expected = [total * share // sum(tenths) for share in tenths]
    for text in range(total - sum(expected)):
        expected[text] += 1
    if 0 in expected:
        with pytest.raises(InputError, match=f" {expected.index(0)} gives none of {total} samples; ask for more"):
            mixture.counts(total)
    else:
        assert mixture.counts(total) == dict(zip(texts, expected, strict=True))
        assert sum(expected) == total


def test_a_single_text_is_told_by_its_name_and_a_mixture_as_it_is_asked_for():
    assert str(Mixture.of("a/b.txt")) == "a/b.txt"
    assert str(parse_mixture("--dataset", ["c4", "demo"])) == "c4:1 demo:1"
    assert str(parse_mixture("--dataset", ["c4:0.70", "demo:0.30"])) == "c4:0.7 demo:0.3"
    assert parse_mixture("--dataset", ["self", "c4"]).read == ("c4",)
