"""A saved folder has a card, its plan and the license of its base; and no file of the user's is replaced."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lib.config.plan import read_plan
from lib.config.sources import ModelSource
from lib.demo import DEMO_MODEL
from lib.errors import InputError
from lib.export import model_card
from lib.storage.model_folder import check_model_target
from tests.command import ROOT, run, run_alp

WORDS = ROOT / "README.md"  # a text that is read at once
FLAGS = ["--dataset", WORDS, "--nsamples", 2, "--eval_datasets", WORDS, "--seqlen", 32, "--eval_windows", 2]
COUNTS = ["--mha_remove_layers", 1, "--ffn_remove_layers", 2]
ALP = ["--calibration_dataset", WORDS, "--nsamples", 2, "--dataset", WORDS, "--seqlen", 32, "--eval_windows", 2]


@pytest.fixture
def base(tmp_path) -> Path:
    return make_base(tmp_path / "base")


def make_base(folder: Path) -> Path:
    """The demo model in a folder, as it could come from a hub."""
    shutil.copytree(DEMO_MODEL, folder)
    head = "license: other\nlicense_name: some\nlicense_link: LICENSE\nlanguage: en\ntags: [theirs]"
    (folder / "README.md").write_text(f"---\n{head}\n---\n# A model of somebody\n")
    (folder / "LICENSE").write_text("Do with it what you like.")
    (folder / "Notice.txt").write_text("By somebody.")
    (folder / "notes.txt").write_text("no notice")
    return folder


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory) -> Path:
    """A folder with a model `base`, a `run` that pruned it, and what that saved, `out`."""
    folder = tmp_path_factory.mktemp("once")
    flags = [*FLAGS, *COUNTS, "--compensate", "all", "--save_model", folder / "out", "--output_dir", folder / "run"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run("--model_name", make_base(folder / "base"), *flags, monkeypatch=monkeypatch) == 0
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    shutil.copytree(saved_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_the_card_says_what_was_removed_and_how_near_it_is(saved, tmp_path):
    result = json.loads((tmp_path / "run/result.json").read_text())
    card = ModelCard.load(saved / "README.md")
    head = card.data.to_dict()
    assert head["tags"] == ["pruned", "depth-pruning"] and head["library_name"] == "transformers"
    assert (head["license"], head["license_name"], head["license_link"], head["language"]) == (
        "other",
        "some",
        "LICENSE",
        "en",
    )
    assert "base_model" not in head  # a folder is no model of a hub
    assert f"# base, without {result['parameters']['actual_rate']:.1%} of its parameters" in card.text
    assert f"| FFN | {', '.join(map(str, sorted(result['ffn_removed'])))} |" in card.text
    perplexity, kl = result["perplexity"][str(WORDS)], result["kl_divergence"][str(WORDS)]
    for stage in ("dense", "pruned", "compensated"):
        assert f"| README.md | {stage} | {perplexity[stage]:.2f} ± " in card.text
    assert f"| {kl['compensated']:.3f} ± " in card.text and f"Verdict: {result['verdict']}." in card.text
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)' in card.text
    assert result["environment"]["command"] in card.text
    assert result["samples"]["continuations"]["pruned"][0]["text"].strip()[:10] in card.text
    assert result["schema"] == 1


def test_the_plan_in_the_folder_can_be_applied(saved, tmp_path):
    plan, result = read_plan(saved / "plan.json"), json.loads((tmp_path / "run/result.json").read_text())
    assert list(plan.plan.mha_removed) == result["mha_removed"] and list(plan.plan.ffn_removed) == result["ffn_removed"]


def test_the_license_and_notices_of_the_base_are_carried_along(saved, tmp_path):
    for name in ("LICENSE", "Notice.txt"):
        assert (saved / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert not (saved / "notes.txt").exists()


def test_a_link_out_of_the_model_is_not_followed(base, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (base / "LICENSE").unlink()
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    assert set(model_card._carried(ModelSource(str(base)))) == {"Notice.txt"}


def test_a_snapshot_of_a_hubs_cache_links_to_its_blobs(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "4567").write_text("a license")
    (snapshot / "LICENSE").symlink_to("../../blobs/4567")
    assert model_card._carried(ModelSource(str(snapshot))) == {"LICENSE": b"a license"}


def test_a_hub_model_is_named_as_the_base_and_missing_files_do_no_harm(saved, tmp_path):
    result = json.loads((tmp_path / "run/result.json").read_text())
    (saved / "README.md").unlink()
    model_card.write_card(saved, result, ModelSource("some/model", cache_dir=tmp_path / "empty"), "")
    card = ModelCard.load(saved / "README.md")
    assert card.data.base_model == "some/model" and "[some/model](https://huggingface.co/some/model)" in card.text


@pytest.mark.parametrize("card", ["---\nlicense: [\n---\n", "---\n- 1\n---\n", "\0", "---\nlicense: 3\n---\n"])
def test_a_strange_card_of_the_base_does_no_harm(card, base, tmp_path, monkeypatch):
    (base / "README.md").write_text(card)
    flags = [*FLAGS, *COUNTS, "--eval_ppl", "no", "--save_model", tmp_path / "out"]
    assert run("--model_name", base, *flags[:4], *flags[6:8], *flags[10:], monkeypatch=monkeypatch) == 0
    assert "Not measured." in (tmp_path / "out/README.md").read_text()


def test_a_model_with_zeros_has_a_card_too(base, tmp_path, monkeypatch):
    flags = [*ALP, "--prune_method", "magnitude", "--sparsity_ratio", 0.5, "--save_model", tmp_path / "out"]
    assert run_alp("--model", base, *flags, monkeypatch=monkeypatch) == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "# base, with 50.1% zeros in its pruned matrices" in card.text and card.data.tags == ["pruned", "sparse"]
    assert not (tmp_path / "out/plan.json").exists() and (tmp_path / "out/LICENSE").exists()


# What --overwrite replaces --------------------------------------------------------------------------------------------


def test_a_folder_with_its_card_is_replaced_when_asked(saved):
    check_model_target(saved, True)
    shutil.move(saved, saved.with_name("moved"))
    check_model_target(saved.with_name("moved"), True)


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "plan.json"])
@pytest.mark.parametrize("how", ["changed", "replaced by a link", "unlisted"])
def test_what_a_user_changed_is_not_replaced(name, how, saved, tmp_path):
    path = saved / name
    if how == "changed":
        path.write_text("my notes\n" + path.read_text())
    elif how == "unlisted" and name == "README.md":
        path.write_text("my own card")
    elif how == "unlisted":
        (saved / "README.md").unlink()
    else:
        shutil.copy(path, tmp_path / "elsewhere")
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="beside a model, so --overwrite does not replace it"):
        check_model_target(saved, True)


def test_other_files_are_still_not_replaced(saved):
    (saved / "my.txt").write_text("mine")
    with pytest.raises(InputError, match="holds my.txt beside a model"):
        check_model_target(saved, True)
    os.remove(saved / "my.txt")
    check_model_target(saved, True)


# Room on the disk -----------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_model_is_told_before_the_work(base, tmp_path, monkeypatch, capsys):
    size = 4 * 4_048_800  # float32
    usage = shutil.disk_usage(tmp_path)
    for free, status in ((size // 2, 2), (int(0.9 * size), 0)):  # the plan removes a quarter
        monkeypatch.setattr(
            "lib.storage.model_folder.shutil.disk_usage", lambda path, free=free: usage._replace(free=free)
        )
        flags = [*FLAGS, "--mha_remove_layers", 2, "--ffn_remove_layers", 4, "--save_model", tmp_path / "out"]
        assert (
            run("--model_name", base, *flags, "--output_dir", tmp_path / f"run{status}", monkeypatch=monkeypatch)
            == status
        )
        told = capsys.readouterr()
        assert ("Block Influence" in told.out) == (status == 0)
        if status:
            assert f"--save_model {tmp_path / 'out'}: the model takes about 12 MB, and the disk has 8 left" in told.err
            assert not (tmp_path / "run2").exists() and not (tmp_path / "out").exists()
