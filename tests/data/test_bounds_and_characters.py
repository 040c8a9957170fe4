"""Sizes are counted in what is stored, and odd characters are named for what they are."""

import json

import pytest

import lib.data.inspection
from lib.data.corpora import load_corpus
from lib.data.documents import Documents
from lib.data.inspection import describe_texts
from lib.data.recognition import Corpus
from lib.errors import InputError


def refusal(source) -> str:
    with pytest.raises(InputError) as caught:
        load_corpus(str(source), "train")
    return str(caught.value)


def test_rows_of_chinese_count_as_many_bytes_as_their_text():
    rows = [{"text": "文" * 1000}] * 10
    documents = Documents("a", rows, lambda row: row["text"], 31_000)
    assert list(documents) == [row["text"] for row in rows] and 30_000 <= documents.bytes < 31_000
    with pytest.raises(InputError, match="more than 29,000 bytes of text"):
        Documents("a", rows, lambda row: row["text"], 29_000)


def test_half_of_a_surrogate_pair_is_told_with_its_row():
    documents = Documents("a", [{"text": "one"}, {"text": "\ud800"}], lambda row: row["text"], 1000)
    with pytest.raises(InputError, match="dataset a: row 1: "):
        list(documents)


def test_utf8_with_a_nul_is_not_said_to_be_another_encoding(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("Ein Satz über\0 etwas. ".encode() * 100)
    assert "holds NUL characters; take them out" in refusal(path) and "iconv" not in refusal(path)
    path.write_bytes(b"\0\xff\xfe" * 100)
    assert "is not UTF-8" in refusal(path)


@pytest.mark.parametrize("place", [{"data_files": "/etc/*.txt"}, {"data_files": "../*.txt"}, {"data_dir": "../x"}])
def test_a_card_that_names_files_outside_its_folder_is_refused(tmp_path, place):
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("one")
    card = json.dumps({"configs": [{"config_name": "default", **place}]})
    (tmp_path / "text/README.md").write_text(f"---\n{card}\n---\n")
    assert "its README.md names files outside the folder (" in refusal(tmp_path / "text")


def test_only_files_of_equal_size_are_compared_and_each_is_read_once(tmp_path, monkeypatch):
    files = {}
    for name in ("one", "two"):
        files[name] = [tmp_path / f"{name}-{number}.txt" for number in range(30)]
        for number, file in enumerate(files[name]):
            file.write_text(f"{name} {number:02}" + "." * number)
    read, digest = [], lib.data.inspection._digest
    monkeypatch.setattr(lib.data.inspection, "_digest", lambda path: read.append(path) or digest(path))

    def warnings() -> list[str]:
        first, second = (Corpus(name, ["A text."], files=tuple(files[name])) for name in files)
        return [line for line in describe_texts([first], [second]) if "is calibration text too" in line]

    assert not warnings() and len(read) == len(set(read)) == 60
    read.clear()
    for file in files["two"]:
        file.write_text(file.read_text() + "." * 100)
    assert not warnings() and not read
    files["two"][7].write_bytes(files["one"][3].read_bytes())
    assert len(warnings()) == 1 and len(read) == 2
