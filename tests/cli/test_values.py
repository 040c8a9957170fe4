"""What the command lines make of values and flags as people write them, and what they propose instead of wrong ones."""

import argparse
import re

import pytest

import alp_prune
import ppllms
import save_gradient
from lib.cli import types
from lib.config.methods import METHODS, Pattern, parse_method
from lib.errors import InputError

SHARES = (types.between_0_and_1, types.share, types.at_most_1)


def refused(function, text: str) -> str:
    with pytest.raises(argparse.ArgumentTypeError) as told:
        function(text)
    assert "\n" not in str(told.value)
    return str(told.value)


def told(script, *flags: str, capsys) -> str:
    """The one line that a script ends with at parsing."""
    try:
        script.parse(list(flags))
    except InputError as error:
        return str(error)
    except SystemExit as ended:
        assert ended.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.endswith("\n") and line.isprintable() is False and line[:-1].isprintable()
    return line


# Numbers --------------------------------------------------------------------------------------------------------------

MEANT = {"25": "0.25", "25%": "0.25", "0,25": "0.25", "70 %": "0.7", "12.5": "0.125", "70,5": "0.705", ",5": "0.5"}
NOT_CERTAIN = ("5", "1.5", "100", "-25", "1,000", "0.2.5", "25%%", "abc", "", "nan", "inf", "1/4", "120%")


@pytest.mark.parametrize("function", SHARES)
@pytest.mark.parametrize("text", MEANT)
def test_a_share_in_percent_or_with_a_comma_is_refused_with_what_was_meant(function, text):
    assert refused(function, text).endswith(f"did you mean {MEANT[text]}?")


@pytest.mark.parametrize("text", NOT_CERTAIN)
def test_nothing_is_proposed_for_a_share_where_it_is_not_certain(text):
    assert "did you mean" not in refused(types.between_0_and_1, text)


def test_other_numbers_propose_what_a_comma_and_a_percent_sign_mean():
    assert refused(types.above_0, "5,5").endswith("did you mean 5.5?")
    assert refused(types.up_to_10, "1%").endswith("did you mean 0.01?")
    assert refused(types.ratio, "2,5").endswith("did you mean 2.5?")
    assert "did you mean" not in refused(types.up_to_10, "25")


@pytest.mark.parametrize("text, number", [(" 0.25 ", 0.25), ("2.5e-1", 0.25), ("+.25", 0.25)])
def test_a_share_may_be_written_as_numbers_are(text, number):
    assert types.between_0_and_1(text) == number


def test_minus_zero_is_zero():
    assert str(types.share("-0.0")) == "0.0"


@pytest.mark.parametrize("text, number", [("5", 5), (" 5", 5), ("+5", 5), ("005", 5), (str(2**63 - 1), 2**63 - 1)])
def test_a_count_is_digits(text, number):
    assert types.positive(text) == number


@pytest.mark.parametrize(
    "text, meant", [("1e3", 1000), ("128.0", 128), ("1_000", 1000), ("1,000", 1000), ("1,000,000", 10**6), ("٣", 3)]
)
def test_a_count_written_otherwise_is_refused_with_what_was_meant(text, meant):
    assert refused(types.positive, text).endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("text", ["1.5", "-1", "0", "", " ", "abc", "nan", "1e-3", "1,5", "0x10", "-" + "9" * 400])
def test_nothing_is_proposed_for_what_is_no_count(text):
    assert "did you mean" not in refused(types.positive, text)


@pytest.mark.parametrize("text", [str(2**63), "9" * 400, "1" + "0" * 5000, "1e400", "inf"])
def test_a_count_beyond_64_bits_is_told_in_a_short_line(text):
    line = refused(types.count, text)
    assert "too large" in line and len(line) < 100


@pytest.mark.parametrize("text", ["4:2", "2/4", "2-4", "2of4", "2 : 4", " 4/2"])
def test_a_pattern_written_otherwise_is_refused_with_what_was_meant(text):
    assert refused(types.pattern, text).endswith("did you mean 2:4?")


@pytest.mark.parametrize("text", ["structured", "0:4", "2:2", "2:", ":", "", "2:4:8", "1234567:9999999", "２:４"])
def test_no_pattern_is_proposed_where_it_is_not_certain(text):
    assert "did you mean" not in refused(types.pattern, text)


def test_a_pattern_may_be_in_any_case():
    assert types.pattern(" Unstructured") == Pattern() and types.pattern("2:4 ") == Pattern(2, 4)


# Names and words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a\udcff", "x\0y", "a/" + "b" * 256, "x/" * 3000, "ü" * 128, "", "  ", "\t\n"])
@pytest.mark.parametrize("function", [types.name, types.folder])
def test_what_no_file_can_be_called_is_refused_at_parsing(function, text):
    refused(function, text)


@pytest.mark.parametrize("function", [types.name, types.folder])
def test_a_loop_of_links_is_refused_at_parsing(function, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "loop", tmp_path / "loop/model"):
        assert "a link leads back to itself" in refused(function, str(path))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_may_be_in_any_case(name):
    assert parse_method(f" {name.title()}").name == name


def test_an_allocator_alone_goes_with_wanda():
    assert [parse_method(name).name for name in ("alp", "OWL", "dlp")] == ["wanda_alp", "wanda_owl", "wanda_dlp"]


def test_the_same_method_written_otherwise_is_the_same_table():
    asked = [alp_prune.parse(["--prune_method", *names]) for names in (("wanda_alp", "ria"), ("ALP", "Ria"))]
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    "script, flags, name, value",
    [
        *((alp_prune, ["--dtype", text], "dtype", "bfloat16") for text in ("bf16", "BF16", "bfloat16")),
        *((alp_prune, ["--dtype", text], "dtype", "float16") for text in ("fp16", "half")),
        *((alp_prune, ["--dtype", text], "dtype", "float32") for text in ("fp32", "float", "Float32")),
        (ppllms, ["--method", "PPLLMs", "Beam"], "method", ["ppllms", "beam"]),
        (ppllms, ["--offload=CPU"], "offload", "cpu"),
        (ppllms, ["--save_format", "HF", "--save_model", "x"], "save_format", "hf"),
        (save_gradient, ["--grad_type", "L1"], "grad_type", "l1"),
        (save_gradient, ["--seed", "1", "--seed=2"], "seed", 2),
        (ppllms, ["--preset", "Demo"], "preset", "demo"),
        (ppllms, ["--preset", "Demo"], "nsamples", 32),
    ],
)
def test_words_are_taken_in_any_case_and_the_last_of_a_flag_counts(script, flags, name, value):
    assert getattr(script.parse(flags), name) == value


@pytest.mark.parametrize(
    "script, flags, advice",
    [
        (ppllms, ["--modle_name", "x"], "did you mean --model_name?"),
        (save_gradient, ["--model_name", "x"], "did you mean --model?"),
        (ppllms, ["--prune-rate", "0.2"], "did you mean --prune_rate?"),
        (ppllms, ["--prune_rat=0.2"], "did you mean --prune_rate?"),
        (ppllms, ["--Overwrite"], "did you mean --overwrite?"),
        (ppllms, ["-model", "x"], "did you mean --model?"),
        (ppllms, ["--prune_method", "x"], "did you mean --method?"),
        (ppllms, ["--calibration_datasets", "x"], "did you mean --calibration_dataset?"),
        (alp_prune, ["--act_order"], "did you mean --act-order?"),
        (alp_prune, ["--sparcity_ratio", "0.5"], "did you mean --sparsity_ratio?"),
        (alp_prune, ["--zzz"], "--help lists all flags"),
        (save_gradient, ["--model=--"], "argument --model: expected a value, not --"),
        (ppllms, ["--preset=--"], "argument --preset: expected a value, not --"),
        (alp_prune, ["some words"], "--help lists all flags"),
        (ppllms, ["--save_format", "maskd"], "did you mean masked?"),
        (ppllms, ["--offload", "dsk"], "did you mean disk?"),
        (ppllms, ["--offload", "gpu"], "choose from auto, none, cpu, disk"),
        (ppllms, ["--dtype", "int8"], "choose from auto, float32, bfloat16, float16"),
        (ppllms, ["--preset", "demmo"], "did you mean demo?"),
        (save_gradient, ["--grad_loss", "lst"], "did you mean last?"),
        (alp_prune, ["--prune_method", "wanda_al"], "did you mean wanda_alp?"),
        (alp_prune, ["--prune_method", "sparse"], "did you mean sparsegpt?"),
        (alp_prune, ["--wbits", "4.0"], "did you mean 4?"),
        (ppllms, ["--prune_rate", "25"], "did you mean 0.25?"),
        (alp_prune, ["--alpha", "15%"], "did you mean 0.15?"),
    ],
)
def test_a_wrong_flag_or_word_is_refused_with_the_nearest(script, flags, advice, capsys):
    assert re.search(re.escape(advice) + "\n?$", told(script, *flags, capsys=capsys))


@pytest.mark.parametrize(
    "flags",
    [["--\x1b[31m"], ["a\nb"], ["--nsamples", "1\n2"], ["--model_name", "a\udcff"], ["--output_dir", "~x\x07y/z"]],
)
def test_what_is_quoted_of_a_command_line_is_one_printable_line(flags, capsys):
    assert told(ppllms, *flags, capsys=capsys)
