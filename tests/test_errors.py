"""What ends a run is one line: what a disk refuses, in the words of Python or of a library, and what libraries say."""

import errno
import os
from pathlib import Path

import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from lib.errors import InputError, describe_disk, describe_failure, first_line, is_out_of_memory, nearest
from lib.export import huggingface
from lib.export.reload import SaveError
from lib.sensitivity import artifact
from tests.families import tiny_model

DISK = Path("/dev/full")


class Rust(SafetensorError):
    """As safetensors raises it for a failed system call."""

    def __init__(self, number: int):
        super().__init__(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("kind", [lambda number: OSError(number, os.strerror(number)), Rust], ids=["os", "safetensors"])
def test_a_disk_or_quota_that_is_full_is_told(kind, number):
    assert describe_failure(kind(number)) == "no space left on the disk; free some"
    told = "no space left to write a/b; free some, or name a folder on another disk"
    assert describe_disk(kind(number), Path("a/b")) == told


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ELOOP])
@pytest.mark.parametrize("kind", [lambda number: OSError(number, os.strerror(number)), Rust], ids=["os", "safetensors"])
def test_other_refusals_of_a_disk_are_told_with_advice(kind, number):
    what, _, advice = describe_failure(kind(number)).partition("; ")
    assert what == os.strerror(number) and advice
    assert describe_disk(kind(number), Path("a/b")) == f"a/b: {what}; {advice}"


@pytest.mark.skipif(not DISK.exists(), reason="needs a disk that is always full")
@pytest.mark.parametrize(
    "write",
    [
        lambda: numpy.zeros(50_000).tofile(DISK),
        lambda: torch.save(torch.zeros(50_000), DISK),
        lambda: DISK.write_text("x" * 50_000),
    ],
    ids=["numpy", "torch", "python"],
)
def test_a_full_disk_is_recognized_in_the_errors_of_libraries(write):
    with pytest.raises(Exception) as raised:  # noqa: B017
        write()
    assert describe_failure(raised.value).startswith("no space left")


def test_a_folder_that_is_gone_inside_safetensors_is_one_line(tmp_path):
    with pytest.raises(SafetensorError) as raised:
        save_file({"a": torch.zeros(3)}, tmp_path / "no/a.safetensors")
    assert "No such file or directory" in describe_failure(raised.value)


def test_a_loop_of_links_is_one_line_wherever_it_is_noticed(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for use in (lambda: (tmp_path / "loop").open(), lambda: (tmp_path / "loop").resolve(strict=True)):
        with pytest.raises((OSError, RuntimeError)) as raised:
            use()
        told = describe_failure(raised.value)
        assert str(tmp_path / "loop") in told and told.endswith("mend it")


def test_a_path_that_is_not_utf8_is_one_line():
    with pytest.raises(UnicodeEncodeError) as raised:
        "a\udcff".encode()
    assert describe_failure(raised.value) == "a\\udcff: a name that is not UTF-8; rename it"


@pytest.mark.parametrize("error", [ValueError("a fault"), RuntimeError("no"), KeyError("x"), UnicodeError("x")])
def test_faults_of_the_program_are_none_of_these(error):
    assert describe_failure(error) is None


def test_control_characters_of_a_path_are_shown_as_escapes():
    told = describe_failure(OSError(errno.EACCES, "Permission denied", "a\x1b[31m\nb"))
    assert told.isprintable() and "Permission denied" in told


# Lines that are quoted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  \n-----\n  one  two\nthree"), "one two"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (KeyError("model"), "KeyError: 'model'"),
        (IndexError(), "IndexError"),
        (ValueError("Validation error for 'layers':\n    TypeError: expected int"), None),
        (ValueError("a\x1b[2Jb\x00"), "a\\x1b[2Jb\\x00"),
    ],
)
def test_the_line_of_an_error_that_is_quoted_says_something(error, line):
    assert first_line(error) == (line or "Validation error for 'layers': TypeError: expected int")


def test_a_report_that_nobody_sees_is_not_pointed_to():
    error = RuntimeError("We set `ignore_mismatched_sizes` to `False`. For details look at the above report!")
    assert "report" not in first_line(error) and "shapes" in first_line(error)


def test_a_quoted_line_is_of_bounded_length():
    assert len(first_line(ValueError("x" * 10**6))) == 300


@pytest.mark.parametrize(
    "word, expected",
    [
        ("modle_name", "--model_name"),
        ("--model", "--model_name"),
        ("--Act_Order", "--act-order"),
        ("zzz", None),
        ("", None),
    ],
)
def test_the_nearest_word_is_one_that_differs_little_or_begins_alike(word, expected):
    assert nearest(word, ["--model_name", "--method", "--act-order"]) == expected


# Errors without a text ------------------------------------------------------------------------------------------------


class Silent(Exception):
    """An error that says nothing."""


def fail(*_, **__) -> None:
    raise Silent


def test_a_model_that_cannot_be_rebuilt_is_told_though_the_error_says_nothing(monkeypatch):
    model = tiny_model("Llama")
    monkeypatch.setattr(type(model), "__init__", fail)
    with pytest.raises(SaveError, match="a reload would fail .Silent."):
        huggingface._check_rebuilt(model)


def test_gradients_that_cannot_be_read_are_told_though_the_error_says_nothing(tmp_path, monkeypatch):
    def fail_to_read(_) -> None:
        raise ValueError

    monkeypatch.setattr(artifact, "read_json", fail_to_read)
    with pytest.raises(InputError, match="holds no gradients .ValueError."):
        artifact.read(tmp_path / "gradients.json")


def test_a_package_of_another_package_that_is_missing_is_one_line():
    assert "the package yaml is not installed" in describe_failure(ModuleNotFoundError(name="yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to",
    ],
)
def test_out_of_memory_is_known_in_the_words_of_every_library(text):
    assert is_out_of_memory(RuntimeError(text)) and not is_out_of_memory(ValueError(text))
    assert describe_failure(RuntimeError(text)).startswith("out of memory, though batches were made smaller")
