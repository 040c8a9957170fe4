"""Text in the encodings, columns, formats and folders that people have is read right, or refused in one line."""

import csv
import gzip
import json
import os
import random
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow
import pytest

import lib.data.documents
import lib.data.readers
import lib.data.recognition
from lib.config.snapshot import Snapshot
from lib.config.sources import check_text, is_hub_text
from lib.data.corpora import load_corpus
from lib.data.inspection import describe_texts, looks_like_text
from lib.data.sampling import tokenize
from lib.errors import InputError, describe_failure

SENTENCE = "The small robot walked past the café and counted seven birds. "
TEXT = "".join(f"{SENTENCE}Then it counted {i}. " for i in range(20))
SHARED = Path(__file__).resolve().parents[3] / "shared/inputs"


class Templated:
    """A tokenizer with a chat template of its own."""

    chat_template, bos_token = "some", "<s>"

    def apply_chat_template(self, messages, tokenize):
        if messages[0]["role"] == "system":
            raise RuntimeError("no system here")
        return "<s>" + "".join(f"[{message['role']}]{message['content']}" for message in messages)


def documents(source, purpose="train", tokenizer=None) -> list:
    return list(load_corpus(str(source), purpose, tokenizer).documents)


def refusal(source, purpose="train", tokenizer=None) -> str:
    """The one line that refuses a text, when it is loaded or read."""
    with pytest.raises(InputError) as error:
        documents(source, purpose, tokenizer)
    line = describe_failure(error.value)
    assert line and "\n" not in line and "Traceback" not in line
    return line


def write_jsonl(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Content decides ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".parquet"])
def test_a_text_edited_in_place_is_read_anew(tmp_path, suffix):
    """With the same name, size and time, as rsync and `cp -p` leave it."""
    path = tmp_path / f"rows{suffix}"
    for word in ("first", "other"):
        rows = datasets.Dataset.from_dict({"text": [word]})
        write = {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}.get(suffix)
        write(path) if write else path.write_text(word)
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert documents(path) == [word]


def test_a_text_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.data.documents.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    corpus = load_corpus(str(write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})), "train")
    assert not list((tmp_path / "temporary").iterdir()) and list(corpus.documents) == ["a", "b"]
    assert corpus.documents[-1] == "b" and len(corpus.documents) == 2


# Encodings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".json", ".ndjson", ".csv", ".tsv"])
def test_text_is_decoded_by_its_mark(tmp_path, suffix, packing, encoding):
    row = {"text": TEXT, "id": "7"}
    content = {
        ".json": json.dumps([row], ensure_ascii=False, indent=1),
        ".csv": f'id,text\n7,"{TEXT}"\n',
        ".tsv": f"id\ttext\r\n7\t{TEXT}\r\n",
    }.get(suffix, TEXT if suffix in (".txt", ".md") else json.dumps(row, ensure_ascii=False) + "\n")
    path = tmp_path / f"rows{suffix}{packing}"
    with pyarrow.output_stream(str(path), {"": None, ".gz": "gzip", ".zst": "zstd"}[packing]) as file:
        file.write(content.encode(encoding))
    assert documents(path) == documents(tmp_path) == [TEXT]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_other_encodings_are_refused_with_what_to_do(tmp_path, name, encoding):
    content = {"a.txt": TEXT, "a.csv": f"text\n{TEXT}\n"}.get(name, json.dumps({"text": TEXT}, ensure_ascii=False))
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert "is not UTF-8, nor UTF-16 with its mark; convert it (if it is Latin-1: iconv -f latin1" in refusal(
        tmp_path / name
    )


def test_half_a_surrogate_pair_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine \\ud83d\\ude00"}\n{"text": "cut \\ud83d"}\n')
    assert "row 1: 'utf-8' codec can't encode character '\\ud83d' in position 4: surrogates not allowed" in refusal(
        tmp_path / "a.jsonl"
    )


# Columns --------------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]
SHAREGPT = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}, CHAT[1]]


@pytest.mark.parametrize(
    "row, label, expected",
    [
        ({"id": "x", "text": "t", "content": "c"}, "column `text`", "t"),
        ({"source": "x", "Text": "t"}, "column `Text`", "t"),
        ({"id": "x", "content": "c", "messages": CHAT}, "column `content`", "c"),
        ({"id": "x", "messages": CHAT}, "chats of `messages`, with role headers", "User: Hello\n\nAssistant: Good day"),
        ({"messages": PARTS}, "chats of `messages`, with role headers", "User: Hello\n\nAssistant: Good day"),
        ({"source": "x", "conversations": SHAREGPT}, "chats of `conversations`", "User: Hello\n\nAssistant: Good day"),
        ({"text": [1, 2], "messages": SHAREGPT}, "chats of `messages`", "User: Hello\n\nAssistant: Good day"),
    ],
)
def test_the_text_column_is_the_one_that_is_text(tmp_path, row, label, expected):
    paths = [write_jsonl(tmp_path / "a.jsonl", row, row)]
    if row.get("messages") != PARTS:  # which Parquet cannot hold
        paths.append(tmp_path / "a.parquet")
        datasets.Dataset.from_list([row, row]).to_parquet(paths[-1])
    for path in paths:
        corpus = load_corpus(str(path), "train")
        assert list(corpus.documents) == [expected] * 2 and corpus.label.startswith(label)


def test_chats_are_rendered_by_the_template_of_the_tokenizer(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": []}, {"messages": [{"role": "system", "content": ""}]}
    )
    corpus = load_corpus(str(path), "train", Templated())
    assert corpus.documents[0] == "[user]Hello[assistant]Good day" and corpus.documents[1] is None
    assert "in the tokenizer's chat template" in corpus.label
    assert "row 2: the tokenizer's chat template refuses it (no system here)" in refusal(path, tokenizer=Templated())


def test_alpaca_rows_are_its_prompt_with_the_answer(tmp_path):
    rows = [{"instruction": "Add.", "input": given, "output": "3"} for given in ("", "1 and 2")]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    without, with_input = documents(tmp_path / "a.json")
    assert without.endswith("completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n3")
    assert with_input.endswith("### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3")
    write_jsonl(tmp_path / "b.jsonl", {"instruction": "Add {x}.", "output": "3"})
    assert documents(tmp_path / "b.jsonl")[0].endswith("### Instruction:\nAdd {x}.\n\n### Response:\n3")


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"id": "row0", "tokens": [1, 2]}, "id, tokens"),
        ({"file_name": "a.png"}, "file_name"),
        ({"messages": "fix the build"}, "messages"),
        ({"sentence": "a good film"}, "sentence"),
        ({f"c{i}": "x" for i in range(30)}, "c18, c19 and 10 more"),
    ],
)
def test_a_table_without_text_is_refused_with_its_columns(tmp_path, row, columns):
    assert columns in refusal(write_jsonl(tmp_path / "a.jsonl", row))


def test_a_row_without_the_column_is_refused_and_one_with_null_is_empty(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "one"}, {"text": None}, {"content": "three"})
    assert "row 2 has no column `text`" in refusal(path)
    write_jsonl(tmp_path / "b/a.jsonl", *[{"text": "one"}] * 300)
    write_jsonl(tmp_path / "b/b.jsonl", {"content": "other"})
    assert "row 300 has no column `text`" in refusal(tmp_path / "b")
    path = write_jsonl(tmp_path / "c.jsonl", {"text": None, "messages": CHAT})
    assert documents(path) == ["User: Hello\n\nAssistant: Good day"]


def test_messages_may_have_parts_calls_of_tools_and_further_keys(tmp_path):
    user = {"role": "user", "content": ["Hello ", {"type": "text", "text": "you"}]}
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    share = {"from": "gpt", "value": "Yes", "role": "assistant"}
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [user, call]}, {"messages": [share]})
    assert documents(path) == ["User: Hello you\n\nAssistant: ", "Assistant: Yes"]
    for content in ({"value": "x"}, 3):
        path = write_jsonl(tmp_path / "b.jsonl", {"messages": [{"role": "user", "content": [{"text": content}]}]})
        assert "row 0: a message is no text of a role" in refusal(path)


def test_colours_of_a_terminal_are_no_noise():
    assert looks_like_text("\x1b[32mINFO\x1b[0m the server has started and listens\n" * 20)


def test_a_column_can_be_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "t", "other: one": "o", "chat": CHAT, "n": 1})
    assert documents(f"{path}::other: one") == ["o"]
    assert documents(f"{path}::chat") == ["User: Hello\n\nAssistant: Good day"]
    assert "no column `n` of text or chats; its columns are text, other: one, chat, n" in refusal(f"{path}::n")
    assert "no column `gone`" in refusal(f"{path}::gone") and "no column after `::`" in refusal(f"{path}::")
    (tmp_path / "b.txt").write_text(TEXT)
    assert "is plain text, without columns" in refusal(tmp_path / "b.txt::text")
    assert "no such file or folder" in refusal(tmp_path / "c.jsonl::text")
    names = [f"{path}::chat", f"{path}::text", str(path)]
    assert len(set(Snapshot.take(("text", name) for name in names).stamps.values())) == 3


def test_a_column_of_the_hub_can_be_named():
    assert all(map(is_hub_text, ("c4", "a/b", "a/b:en", "a/b::Any Column", "a/b:en::x", "wikitext2::text")))
    assert not any(map(is_hub_text, ("a.csv::x", "demo", "demo::text", "a/b:../c::x", "https://a.b/c::x", "a.md")))
    check_text("a/b:en::x")


def test_a_later_row_that_is_no_text_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *[{"text": "x"}] * 300, {"text": None}, {"text": 5})
    corpus = load_corpus(str(path), "train")
    assert corpus.documents[299] == "x" and corpus.documents[300] is None
    with pytest.raises(InputError, match="row 301: column `text` holds no text"):
        corpus.documents[301]


# Formats --------------------------------------------------------------------------------------------------------------


def test_tables_of_commas_and_tabs_keep_long_quoted_text(tmp_path):
    text = 'He said "no",\nand left.\t' + "word " * 50_000
    for name, delimiter in (("a.csv", ","), ("b.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([["id", "text"], [1, text], [2, "short"]])
        assert documents(tmp_path / name) == [text, "short"]


@pytest.mark.parametrize(
    "content, problem",
    [
        ("id,text\n1,Hello, world\n", "line 2 has more fields than the header; put text in quotes"),
        ('id,text\n1,"Hello\n', "after line 1: cannot be read (unexpected end of data)"),
        ("Hello world\nGood day\n", "no text column among Hello world"),
        ("text\n", "it has no rows"),
    ],
)
def test_a_table_of_commas_that_would_lose_text_is_refused(tmp_path, content, problem):
    (tmp_path / "a.csv").write_text(content)
    assert problem in refusal(tmp_path / "a.csv")


def test_what_save_to_disk_wrote_is_read(tmp_path):
    rows = {split: datasets.Dataset.from_dict({"id": ["i", "j"], "text": [split, None]}) for split in ("train", "test")}
    rows["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(rows).save_to_disk(tmp_path / "several")
    assert documents(tmp_path / "one", "test") == documents(tmp_path / "several", "train") == ["train", None]
    assert documents(tmp_path / "several", "test") == ["test", None]
    assert documents(f"{tmp_path}/several::id", "test") == ["i", "j"]
    (next((tmp_path / "one").glob("*.arrow"))).write_bytes(b"no arrow")
    assert "cannot be read" in refusal(tmp_path / "one")


@pytest.mark.parametrize(
    "content", ["[1, 2]", '["a"]', "[" * 100_000, '{"text": "a"}\n[1]\n', '{"text": 1e999', "nothing"]
)
def test_json_that_holds_no_rows_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    assert str(tmp_path / "a.json") in refusal(tmp_path / "a.json")


# Folders --------------------------------------------------------------------------------------------------------------


def test_a_card_decides_which_files_are_read(tmp_path):
    for name in ("en/train", "en/test", "xx/train", "xx/held_out"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"text": name})
    card = """---
configs:
- config_name: xx
  data_files:
  - split: train
    path: ["xx/train.jsonl"]
  - split: test
    path: xx/held*
- config_name: en
  default: true
  data_dir: en
---
The data set.
"""
    (tmp_path / "README.md").write_text(card)
    assert (documents(tmp_path), documents(tmp_path, "test")) == (["en/train"], ["en/test"])
    assert (documents(f"{tmp_path}:xx"), documents(f"{tmp_path}:xx", "test")) == (["xx/train"], ["xx/held_out"])
    assert "lists the configurations xx, en; add one, as :NAME" in refusal(f"{tmp_path}:yy")
    (tmp_path / "README.md").write_text(card.replace("  default: true\n", ""))
    assert "lists the configurations xx, en" in refusal(tmp_path) and documents(f"{tmp_path}:en") == ["en/train"]
    (tmp_path / "README.md").write_text(card.replace("data_dir: en", "data_files: ../*.jsonl"))
    assert "its README.md names files outside the folder (../*.jsonl)" in refusal(tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs: [x: {\n---\n")
    assert "its configurations cannot be read" in refusal(tmp_path)
    (tmp_path / "README.md").write_text("# A folder of text\n")
    assert documents(tmp_path) == ["en/train", "xx/train"]


def test_hidden_files_and_folders_are_not_read(tmp_path):
    for name in ("a.txt", "._a.txt", ".cache/b.txt", "deep/.git/c.txt", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(tmp_path) == ["a.txt", "deep/d.txt"]


def test_links_that_go_in_circles_are_no_text(tmp_path):
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/up").symlink_to(tmp_path / "folder")
    (tmp_path / "folder/loop.txt").symlink_to("loop.txt")
    (tmp_path / "folder/a.txt").write_text("a")
    assert documents(tmp_path / "folder") == ["a"]
    assert "no such file or folder" in refusal(tmp_path / "loop.txt")
    name = str(tmp_path / "loop.txt")
    assert list(Snapshot.take([("text", name)]).stamps.values()) == [name]


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    assert "no .txt" in refusal(tmp_path / "a.txt")


def test_damaged_files_are_read_or_refused(tmp_path):
    """Never a traceback, nor the end of the process, as damaged offsets in a file of Arrow's can cause."""
    rows = datasets.Dataset.from_list([{"text": f"café {i}", "messages": CHAT} for i in range(30)])
    rows.to_parquet(tmp_path / "a.parquet")
    rows.to_json(tmp_path / "b.jsonl")
    rows.to_csv(tmp_path / "c.csv")
    rows.save_to_disk(tmp_path / "disk")
    arrow, draw = next((tmp_path / "disk").glob("*.arrow")), random.Random(0)
    for path in (arrow, *(tmp_path / name for name in ("a.parquet", "b.jsonl", "c.csv", "disk/state.json"))):
        whole = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(whole)
            place = draw.randrange(len(whole))
            damaged[place : place + draw.randrange(3)] = draw.randbytes(draw.randrange(1, 5))
            path.write_bytes(damaged)
            with suppress(InputError):
                documents(path.parent if path.parent.name == "disk" else path)
        path.write_bytes(whole)


# Bounds ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("part", [slice(0, 100), slice(0, -4), slice(0, 0)])
def test_a_broken_packed_text_is_refused(tmp_path, suffix, part):
    whole = tmp_path / f"whole.jsonl{suffix}"
    with pyarrow.output_stream(str(whole), {".gz": "gzip", ".zst": "zstd"}[suffix]) as file:
        file.write(b"".join(json.dumps({"text": f"{i * i * 7919 % 10007}"}).encode() + b"\n" for i in range(500)))
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(whole.read_bytes()[part] or b"this was never packed")
    assert "cannot be read" in refusal(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz", "a.csv.gz", "line.jsonl.gz", "blank.jsonl.gz"])
def test_a_packed_text_that_grows_beyond_bounds_is_refused(tmp_path, monkeypatch, name):
    for module in (lib.data.readers, lib.data.recognition):
        monkeypatch.setattr(module, "LARGEST_IN_MEMORY", 200_000)
        monkeypatch.setattr(module, "LARGEST", 1_000_000)
    monkeypatch.setattr(lib.data.corpora, "LARGEST_IN_MEMORY", 200_000)
    row = json.dumps({"text": "word " * 1000}) + "\n"
    content = {
        "a.jsonl.gz": row * 300,
        "line.jsonl.gz": json.dumps({"text": "word " * 50_000}),
        "blank.jsonl.gz": "\n" * 1_100_000,
    }
    content |= {"a.json.gz": json.dumps([json.loads(row)] * 300), "a.csv.gz": "text\n" + "word\n" * 300_000}
    with gzip.open(tmp_path / name, "wt") as file:
        file.write(content.get(name, "word " * 300_000))
    assert " of text; give a part of it" in refusal(tmp_path / name)


def test_text_to_evaluate_on_must_fit_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(lib.data.recognition, "LARGEST_IN_MEMORY", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", *[{"text": "word"}] * 200)
    assert len(documents(path)) == 200 and "more than 1,000 bytes" in refusal(path, "test")


def test_a_tokenizer_that_explodes_is_told_before_memory_is_full():
    seen = []

    class Tokenizer:
        def __call__(self, text, verbose=True):
            seen.append(len(text))
            return {"input_ids": [1] * 500 * len(text)}

    with pytest.raises(InputError, match="the tokenizer makes 15,000 tokens of 30 characters"):
        tokenize(TEXT * 1000, Tokenizer())
    assert max(seen) <= 30


# What the run says ----------------------------------------------------------------------------------------------------


def lines(calibration, *evaluation) -> list[str]:
    corpora = [load_corpus(str(text), "test") for text in evaluation]
    return describe_texts([load_corpus(str(calibration), "train")] if calibration else [], corpora)


def test_a_run_says_how_it_read_its_texts_and_how_they_begin(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"Text": " \x1b[31mRed\n" + TEXT}, {"Text": "b"})
    (line,) = lines(path)
    assert line.startswith(f'Text        {path} (calibration): column `Text`, begins "\\x1b[31mRed The small robot ')
    assert len(line.partition('begins "')[2]) <= 60 + 4


def test_one_text_for_two_purposes_is_warned_of(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "copy.txt").write_text(TEXT)
    (tmp_path / "other.txt").write_text(TEXT.replace("small", "great"))
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"split/{split}.jsonl", {"text": split})
    for text in ("a.txt", "copy.txt"):
        assert lines(tmp_path / "a.txt", tmp_path / text)[-1].startswith(
            f"Warning     {tmp_path / text}: is calibration"
        )
    for pair in (("a.txt", "other.txt"), ("split", "split")):
        assert not any("Warning" in line for line in lines(*(tmp_path / name for name in pair)))
    assert not any("Warning" in line for line in (*lines("demo", "demo"), *lines(None, tmp_path / "a.txt")))


def test_noise_is_warned_of(tmp_path):
    draw = iter(range(10**9))
    noise = {
        "printable": "".join(chr(33 + next(draw) * 7919 % 10007 % 94) for _ in range(5000)),
        "bytes": bytes(next(draw) * 7919 % 10007 % 256 for _ in range(5000)).decode("latin-1"),
        "replaced": "Il \ufffdtait une fois. " * 100,
    }
    for text in noise.values():
        assert not looks_like_text(text)
    (tmp_path / "noise.txt").write_text(noise["printable"])
    assert (
        lines(tmp_path / "noise.txt")[-1]
        == f"Warning     {tmp_path}/noise.txt: does not look like text; figures on it mean little"
    )


@pytest.mark.parametrize(
    "text",
    [
        Path(__file__).read_text(),
        TEXT,
        "这是一个关于机器人的故事。它走过咖啡馆，数了七只鸟。" * 100,
        "ภาษาไทยเป็นภาษาที่มีระดับเสียงของคำแน่นอน" * 100,
        "\n".join(f"{i},{i * 0.37:.3f},{i * i % 97}" for i in range(1000)),
        "1. e4 e5 2. Nf3 Nc6 3. Bb5 a6 4. Ba4 Nf6 5. O-O Be7 " * 50,
        "f(x) = a x^2 + b x + c, g(y) = d y + e. " * 50,
        "var a=function(b){return b.length>0?b[0]:null};module.exports={first:a};" * 50,
        f"{TEXT} <img src='data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4'/> " * 5,
        "😀 great 🎉 " * 100,
        "",
    ],
)
def test_code_numbers_and_all_scripts_look_like_text(text):
    assert looks_like_text(text)


# The shared inputs ----------------------------------------------------------------------------------------------------

CHAT_START = "User: The small robot number 0 walked past the café and counted 0 birds"
ALPACA_START = "Below is an instruction that describes a task. Write a response"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared inputs are not on this machine")
@pytest.mark.parametrize(
    "name, expected",
    [
        ("plain.txt", "plain"),
        ("bom.txt", "plain"),
        ("utf16.txt", "plain"),
        ("latin1.txt", InputError("is not UTF-8")),
        ("latin1.jsonl", InputError("is not UTF-8")),
        ("chat.jsonl", CHAT_START),
        ("chat_id.jsonl", CHAT_START),
        ("sharegpt.jsonl", CHAT_START),
        ("alpaca.json", ALPACA_START),
        ("ids_and_tokens.jsonl", InputError("no text column among id, tokens")),
        ("caps.jsonl", "The small robot number 0 walked past"),
        ("noise.txt", "!!yuog]"),
        ("configs", "The small robot number 0 walked past"),
        ("hidden", "The small robot number 0 walked past"),
    ],
)
def test_the_shared_inputs_are_read_as_their_users_expect(name, expected, demo_tokenizer):
    if isinstance(expected, InputError):
        assert str(expected) in refusal(SHARED / name)
        return
    corpus = load_corpus(str(SHARED / name), "train", demo_tokenizer)
    assert corpus.documents[0].startswith((SHARED / "plain.txt").read_text() if expected == "plain" else expected)
    assert not any(word in document for document in corpus.documents for word in ("zzz", "tobor", "made", "conv-"))
    said = describe_texts([corpus], ())
    assert len(said) == (2 if name == "noise.txt" else 1)
    if name == "caps.jsonl":
        assert "column `Text`" in said[0]
