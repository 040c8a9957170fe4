"""Text from every kind of source becomes the windows that the reference would have made of it."""

import gzip
import json

import datasets
import numpy as np
import pytest
import torch

import lib.data.corpora
from lib.config.mixture import Mixture
from lib.data.corpora import Corpus, load_corpus
from lib.data.sampling import (
    calibration_windows,
    cut_windows,
    draw_parts,
    evaluation_windows,
    sampled_windows,
    tokenize,
    tokenize_start,
    unsampled,
)
from lib.demo.text import documents, is_held_out
from lib.errors import InputError


def _rows(texts, **columns):
    return datasets.Dataset.from_dict({"text": texts, **columns})


class Letters:
    """A tokenizer of one token a character, with a token of its own at the start."""

    def __call__(self, text, verbose=True):
        return {"input_ids": [1, *map(ord, text)]}


# Sources


def test_c4_is_told_by_its_file_names_and_columns(tmp_path):
    folder = tmp_path / "copy" / "en"
    folder.mkdir(parents=True)
    for name, texts in {"train.00000-of-01024": ["one", "two"], "validation.00000-of-00008": ["a"] * 1200}.items():
        with gzip.open(folder / f"c4-{name}.json.gz", "wt") as file:
            for text in texts:
                file.write(json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) + "\n")
    train, test = (load_corpus(str(tmp_path / "copy"), purpose) for purpose in ("train", "test"))
    assert list(train.documents) == ["one", "two"]
    assert len(test.documents) == 1100 and test.separator == " " and test.max_windows == 256


def test_wikitext_is_told_by_its_headings(tmp_path):
    folder = tmp_path / "anything" / "wikitext-2-raw-v1"
    folder.mkdir(parents=True)
    for split, line in {"train": " Of the train .\n", "test": " Of the test .\n", "validation": " No .\n"}.items():
        _rows(["", " = Title = \n", "", line]).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    (tmp_path / "anything" / "wikitext-103-raw-v1").mkdir()
    _rows(["not this"]).to_parquet(tmp_path / "anything/wikitext-103-raw-v1/train-00000-of-00001.parquet")
    for path in (tmp_path / "anything", folder):
        assert load_corpus(str(path), "train").documents == ["  = Title = \n   Of the train .\n"]
        assert load_corpus(str(path), "test").documents == ["\n\n = Title = \n\n\n\n\n Of the test .\n"]


def test_a_path_that_says_c4_is_not_taken_for_c4(tmp_path):
    path = tmp_path / "c4-wikitext2.jsonl"
    _rows(["first", "second"]).to_json(path)
    corpus = load_corpus(str(path), "test")
    assert list(corpus.documents) == ["first", "second"]
    assert (corpus.separator, corpus.max_windows) == ("\n\n", None)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".parquet"])
def test_rows_of_files_are_documents(tmp_path, suffix):
    path, rows = tmp_path / f"rows{suffix}", _rows(["first", "second\nline"], number=[1, 2])
    if suffix == ".parquet":
        rows.to_parquet(path)
    else:
        text = json.dumps(list(rows)) if suffix == ".json" else "\n".join(json.dumps(row) for row in rows)
        (gzip.open if suffix.endswith("gz") else open)(path, "wt").write(text)
    for source in (path, tmp_path):
        assert list(load_corpus(str(source), "train").documents) == ["first", "second\nline"]


def test_content_is_a_text_column(tmp_path):
    datasets.Dataset.from_dict({"content": ["x", None], "id": [1, 2]}).to_parquet(tmp_path / "rows.parquet")
    assert list(load_corpus(str(tmp_path), "train").documents) == ["x", None]


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "story.txt").write_text("Once.\n\n  Twice. \n")
    assert load_corpus(str(tmp_path / "story.txt"), "train").documents == ["Once.\n\n  Twice. \n"]


PTB = " no it was n't black monday \n but while the new york stock exchange did n't fall N points <unk> \n"


def test_the_penn_treebank_is_one_document_of_its_sentences(tmp_path):
    sentences = "no it was n't black monday but while the new york stock exchange did n't fall N points <unk>"
    for split in ("train", "valid", "test"):
        (tmp_path / f"ptb.{split}.txt").write_text(PTB if split != "valid" else PTB.replace("fall", "rise"))
    for source, purpose in ((tmp_path / "ptb.test.txt", "test"), (tmp_path, "test"), (tmp_path, "train")):
        assert load_corpus(str(source), purpose).documents == [sentences]
    rows = datasets.Dataset.from_dict({"sentence": [line.strip() for line in PTB.splitlines()]})
    rows.to_parquet(tmp_path / "rows.parquet")
    assert load_corpus(str(tmp_path / "rows.parquet"), "test").documents == [sentences]
    datasets.Dataset.from_dict({"sentence": ["a good film", "a bad one"]}).to_parquet(tmp_path / "other.parquet")
    other = load_corpus(f"{tmp_path}/other.parquet::sentence", "test")
    assert list(other.documents) == ["a good film", "a bad one"]


@pytest.mark.parametrize(
    "text",
    [
        " One day , <unk> . \n It was N . \n",
        " a <unk> \n One day . ",
        " a b \n c N \n",
        "no it was\nbut while\n",
        " a b \n\n c \n d \n",
    ],
)
def test_other_lines_are_not_taken_for_the_penn_treebank(tmp_path, text):
    (tmp_path / "story.txt").write_text(text)
    assert load_corpus(str(tmp_path / "story.txt"), "test").documents == [text]


def test_the_penn_treebank_by_name_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give the path of ptb.test.txt"):
        load_corpus("ptb", "test")


def test_windows_with_a_stride_cover_the_same_text(demo_tokenizer):
    corpus = Corpus("words", [" ".join(f"word {i}" for i in range(400))], max_windows=5)
    plain, strided = (evaluation_windows(corpus, demo_tokenizer, 32, stride) for stride in (None, 8))
    assert plain.shape == (5, 32) and strided.shape == (17, 32)
    assert torch.equal(strided[::4], plain) and torch.equal(strided[1][:-8], strided[0][8:])


def test_files_named_for_a_split_serve_its_purpose(tmp_path):
    for name in ("train.txt", "my-validation.txt", "contest.txt"):
        (tmp_path / name).write_text(name)
    assert load_corpus(str(tmp_path), "train").documents == ["train.txt"]
    assert load_corpus(str(tmp_path), "test").documents == ["my-validation.txt"]
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "my-validation.txt").unlink()
    (tmp_path / "contest.txt").unlink()
    with pytest.raises(InputError, match="no test or validation file"):
        load_corpus(str(tmp_path), "test")
    assert load_corpus(str(tmp_path / "train.txt"), "test").documents == ["train.txt"]


def test_demo_splits_do_not_overlap():
    train, held_out = set(documents("train")), set(documents("held_out"))
    assert len(train) > 100 and len(held_out) > 15 and not train & held_out
    assert 0.05 < np.mean([is_held_out(f"topic:{i}") for i in range(1000)]) < 0.15
    assert load_corpus("demo", "test").documents != load_corpus("demo", "train").documents


@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("no/such/folder", None, "no such file or folder"),
        ("./nothing.txt", None, "no such file or folder"),
        ("picture.png", "x", "no .txt"),
        ("empty.txt", "", "is empty"),
        ("broken.parquet", "this is no parquet", "cannot be read"),
        ("broken.jsonl", '{"text": "a"\n', "cannot be read"),
        ("numbers.jsonl", '{"a": 1}\n', "no text column among a"),
        ("many.jsonl", '{"a": "x", "b": "y"}\n', "no text column among a, b"),
    ],
)
def test_sources_that_cannot_be_used(tmp_path, name, content, problem):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=problem) as error:
        load_corpus(str(path) if content is not None else name, "train")
    assert "\n" not in str(error.value) and name.rsplit("/")[-1] in str(error.value)


def test_a_hub_id_without_a_network_says_what_to_do():
    with pytest.raises(InputError, match="without a network give the path of a local copy"):
        load_corpus("nobody/nothing", "train")


# Windows


def test_calibration_is_shuffled_joined_and_cut_as_in_the_reference():
    texts = [chr(97 + i) * (i + 1) for i in range(20)]
    shuffled = _rows(texts).shuffle(seed=3)["text"][:6]
    tokens = torch.tensor([1, *map(ord, " ".join(shuffled))])
    windows = calibration_windows(Corpus("x", texts), Letters(), nsamples=6, seqlen=5, seed=3)
    assert torch.equal(windows, tokens[: len(tokens) // 5 * 5].view(-1, 5))


def test_one_document_gives_its_first_windows():
    windows = calibration_windows(Corpus("x", ["abcdefghijklm"]), Letters(), nsamples=2, seqlen=4, seed=9)
    assert windows.tolist() == [[1, *map(ord, "abc")], [*map(ord, "defg")]]


def test_a_long_text_is_tokenized_as_far_as_it_is_needed(demo_tokenizer):
    text, seen = load_corpus("demo", "train").documents[0], []

    class Tokenizer:
        def __call__(self, text, **options):
            seen.append(len(text))
            return demo_tokenizer(text, **options)

    whole = tokenize(text, demo_tokenizer)
    for count in (10, 1000, 40000):
        assert torch.equal(tokenize_start(text, Tokenizer(), count)[:count], whole[:count])
    assert max(seen) < len(text) / 2
    assert torch.equal(tokenize_start(text, Tokenizer(), 10**9), whole)


def test_the_start_of_a_text_is_tokenized_alike_without_words(shared):
    """A tokenizer of the sentencepiece kind takes a whole text as one word."""
    from lib.config.sources import ModelSource
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelSource(str(shared / "models/stories260K")))
    text = (shared / "data/tinystories/tinystories_2MiB.txt").read_text()[:200_000]
    assert torch.equal(tokenize_start(text, tokenizer, 5000)[:5000], tokenize(text, tokenizer)[:5000])


def test_evaluation_joins_all_documents_and_drops_the_remainder():
    corpus = Corpus("x", ["ab", "", None, "cd"])
    assert evaluation_windows(corpus, Letters(), 3).flatten().tolist() == [1, *map(ord, "ab\n\n\n\n\n\n")]
    assert len(evaluation_windows(Corpus("x", ["abcdef"], " ", max_windows=2), Letters(), 2)) == 2


def test_too_little_text_says_how_little():
    with pytest.raises(InputError, match="dataset x: 3 tokens are too few for one window of 8"):
        cut_windows(torch.arange(3), 8, "x")


@pytest.mark.parametrize("name, folder", [("c4", "c4"), ("wikitext2", "wikitext")])
def test_the_hubs_data_sets_are_those_of_their_local_copies(shared, monkeypatch, name, folder):
    """The loading from the hub, pointed at folders that are laid out as the hub lays them out."""
    path = str(shared / "data" / folder)
    monkeypatch.setitem(lib.data.corpora.ALIASES, name, path)
    for purpose in ("train", "test"):
        hub, local = load_corpus(name, purpose), load_corpus(path, purpose)
        assert list(hub.documents) == list(local.documents)
        assert (hub.separator, hub.max_windows) == (local.separator, local.max_windows)


def test_real_c4_and_wikitext_make_the_windows_of_the_published_evaluations(shared):
    from lib.config.sources import ModelSource
    from lib.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelSource(str(shared / "models/stories260K")))
    c4, wikitext = (load_corpus(str(shared / "data" / name), "test") for name in ("c4", "wikitext"))
    assert evaluation_windows(c4, tokenizer, 512).shape == (256, 512)
    assert len(wikitext.documents) == 1 and wikitext.documents[0].startswith("\n\n = Robert <unk> = \n\n\n\n\n Robert")
    assert len(load_corpus(str(shared / "data/wikitext"), "train").documents) == 1


@pytest.mark.parametrize("draw", [calibration_windows, sampled_windows])
def test_each_text_of_a_mixture_gives_what_it_gives_alone_for_its_share(draw, demo_tokenizer):
    """One text after another; a single text gives what it always gave."""
    corpora = {
        "rows": Corpus("rows", [f"Row {i}. " + " ".join(f"{i * j % 89}" for j in range(60)) for i in range(30)]),
        "story": Corpus("story", [" ".join(f"word {i}" for i in range(900))]),
    }

    def alone(text: str, nsamples: int) -> torch.Tensor:
        return draw(corpora[text], demo_tokenizer, nsamples, 16, 5)

    def mixed(*shares: float) -> dict[str, torch.Tensor]:
        return draw_parts(Mixture(tuple(corpora), shares), corpora, demo_tokenizer, 10, 16, 5, draw)

    for shares, counts in {(0.7, 0.3): (7, 3), (1, 1): (5, 5), (2, 1): (7, 3)}.items():
        parts = mixed(*shares)
        assert list(parts) == ["rows", "story"]
        assert all(torch.equal(parts[text], alone(text, n)) for text, n in zip(corpora, counts, strict=True))
    (single,) = draw_parts(Mixture.of("rows"), corpora, demo_tokenizer, 10, 16, 5, draw).values()
    assert torch.equal(single, alone("rows", 10))


def test_the_models_own_text_is_yet_to_be_sampled_but_for_its_first_token():
    mixture, corpora = Mixture(("story", "self"), (1.0, 1.0)), {"story": Corpus("story", ["abcdefgh" * 9])}
    tokenizer = Letters()
    for bos, eos, first in ((0, 2, 0), (None, 2, 2)):
        tokenizer.bos_token_id, tokenizer.eos_token_id = bos, eos
        parts = draw_parts(mixture, corpora, tokenizer, 5, 8, 0, calibration_windows)
        assert parts["self"].shape == (2, 8) and parts["self"][:, 0].tolist() == [first] * 2
        assert unsampled(parts["self"]).all() and not unsampled(parts["story"]).any()
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="the tokenizer has no BOS or EOS that text begins with"):
        draw_parts(mixture, corpora, tokenizer, 5, 8, 0, calibration_windows)
