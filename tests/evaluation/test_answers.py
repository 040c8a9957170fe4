"""Accuracies and flips, against counts by hand."""

import pytest

from lib.evaluation.answers import Answers, accuracy_metric, as_fields, flips


def test_flips_are_answers_that_changed_in_percent_of_all_documents():
    assert flips("1100110000", "1010011000") == {"right_to_wrong": 20.0, "wrong_to_right": 20.0, "total": 40.0}
    assert flips("111", "111") == {"right_to_wrong": 0.0, "wrong_to_right": 0.0, "total": 0.0}


def test_flips_are_found_where_the_accuracy_stays_the_same():
    fields = as_fields(
        {
            "dense": Answers({"one": {"acc,none": 0.5}}, {}, {"one": "1100"}),
            "pruned": Answers({"one": {"acc,none": 0.5}}, {}, {"one": "0011"}),
        }
    )
    assert fields["accuracy"] == {"one": {"dense": 50.0, "pruned": 50.0}}
    assert fields["flips"]["one"]["pruned"]["total"] == fields["mean"]["pruned"]["flips"] == 100.0


@pytest.mark.parametrize(
    "metrics, expected",
    [
        (["acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none"], "acc_norm,none"),
        (["f1,none", "acc,none"], "acc,none"),
        (["exact_match,strict-match", "exact_match,flexible-extract"], "exact_match,strict-match"),
        (["brier_score,none", "acc_stderr,none"], None),
        ([], None),
    ],
)
def test_the_accuracy_is_the_normalized_one_where_there_is_one_and_the_first_of_several_filters(metrics, expected):
    assert accuracy_metric(dict.fromkeys(metrics, 0.5)) == expected


def test_fields_have_every_stage_and_means_over_tasks_that_have_an_accuracy():
    def answers(one: float, two: float, right: str) -> Answers:
        of_one = {"acc,none": one, "acc_stderr,none": 0.03}
        of_two = {"exact_match,first": two, "exact_match_stderr,first": 0.04}
        return Answers({"one": of_one, "two": of_two, "three": {"f1,none": 0.7}}, {"two": 5}, {"two": right})

    found = {"dense": answers(0.75, 0.5, "10"), "pruned": answers(0.5, 0.5, "01")}
    fields = as_fields(found | {"quantized": answers(0.25, 0.0, "00")})
    assert fields["accuracy"]["one"] == {"dense": 75.0, "pruned": 50.0, "quantized": 25.0}
    assert fields["accuracy_standard_error"]["two"] == dict.fromkeys(("dense", "pruned", "quantized"), 4.0)
    assert set(fields["accuracy"]) == {"one", "two"} and fields["metrics"]["three"]["pruned"] == {"f1,none": 0.7}
    assert set(fields["flips"]) == {"two"} and set(fields["flips"]["two"]) == {"pruned", "quantized"}
    assert fields["mean"]["dense"] == {"accuracy": 62.5, "standard_error": pytest.approx(2.5), "flips": None}
    assert fields["mean"]["quantized"]["accuracy"] == 12.5 and fields["mean"]["quantized"]["flips"] == 50.0
    assert fields["num_fewshot"] == {"two": 5}


def test_without_an_accuracy_there_is_no_mean():
    found = {"dense": Answers({"one": {"f1,none": 0.5}}, {}, {}), "pruned": Answers({"one": {"f1,none": 0.4}}, {}, {})}
    fields = as_fields(found)
    assert fields["mean"] == fields["accuracy"] == fields["flips"] == {}
    assert fields["metrics"]["one"] == {"dense": {"f1,none": 0.5}, "pruned": {"f1,none": 0.4}}


def test_one_document_has_no_standard_error():
    found = {"dense": Answers({"one": {"acc,none": 1.0}}, {}, {"one": "1"})}
    fields = as_fields(found)
    assert fields["accuracy_standard_error"] == {"one": {"dense": None}}
    assert fields["mean"]["dense"]["standard_error"] is None
