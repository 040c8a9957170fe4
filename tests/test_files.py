"""Files of others are read within bounds, and as the standards have them."""

import os

import pytest

from lib.errors import printable
from lib.files import parse_json, read_file, read_json


def test_a_regular_file_is_read(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, 2.5, null, "ü"]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": [1, 2.5, None, "ü"]}


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a regular file"):
        read_file(tmp_path / "pipe")


def test_a_file_of_more_bytes_than_allowed_is_refused_unread(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than"):
        read_file(tmp_path / "large")


BROKEN = {
    "nothing": b"",
    "no JSON": b"{",
    "deep": b"[" * 100_000,
    "not a number": b"NaN",
    "infinite": b"1e999",
    "a long integer": b"1" * 5000,
    "an integer of 65 bits": b"18446744073709551616",
    "Latin-1": b'"\xe9"',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_what_is_not_json_is_a_value_error(content):
    with pytest.raises(ValueError):
        parse_json(content)


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31mb\x07 ü\udc80\n") == "a\\x1b[31mb\\x07 ü\\udc80\n"
