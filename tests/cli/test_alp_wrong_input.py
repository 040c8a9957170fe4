"""What the ALP command lines say to wrong input: one line, exit status 2, and nothing is written."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.command import gradient_path, run_alp, run_gradient
from tests.sensitivity.rewritten import rewritten

BOTH = [
    (["--model", "no/such/model"], "model no/such/model: no such folder"),
    (["--model", "nobody/nothing"], "nobody/nothing: .*without a network give the path of a local folder"),
    (["--device", "cpu", "--device_map", "auto"], "--device cpu and --device_map auto: give one of them"),
    (["--device", "gpu"], "--device gpu: not available"),
    (["--grad_type", "l3"], "--grad_type: invalid choice: 'l3'"),
    (["--grad_seqlen", "65"], "--grad_seqlen 65: .* has a context of 64 tokens"),
    (["--grad_seqlen", "1"], "--grad_seqlen 1: a window needs 2 tokens"),
    (["--seed", "-1"], "--seed(/--grad_seed)?: '-1' is not a whole number of at least 0"),
]


def check_refused(run, arguments, problem, tmp_path, capsys) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        sys.exit(run(*arguments))
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and re.search(": error: (argument )?" + problem, told), told
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def refuse(alp_arguments, tmp_path, monkeypatch, capsys):
    """Runs alp_prune.py with more flags, which must be refused before anything is written."""

    def run(*flags, problem: str) -> None:
        check_refused(
            lambda *a: run_alp(*a, monkeypatch=monkeypatch), [*alp_arguments, *flags], problem, tmp_path, capsys
        )

    return run


@pytest.fixture
def refuse_gradient(tiny_folder, text_file, tmp_path, alp_arguments, monkeypatch, capsys):
    def run(*flags, problem: str) -> None:
        arguments = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16, *flags]
        check_refused(lambda *a: run_gradient(*a, monkeypatch=monkeypatch), arguments, problem, tmp_path, capsys)

    return run


@pytest.mark.parametrize(
    "flags, problem",
    [
        *BOTH,
        (["--prune_method", "wanda_allp"], "--prune_method wanda_allp: no such method; did you mean wanda_alp?"),
        (["--prune_method", "xyz"], "--prune_method xyz: no such method; choose from dense, magnitude, magnitude_alp"),
        (["--sparsity_ratio", "1"], "--sparsity_ratio: '1' is not a number of at least 0 and below 1"),
        (["--sparsity_ratio", "-0.1"], "--sparsity_ratio: '-0.1' is not a number of at least 0 and below 1"),
        (["--sparsity_ratio", "nan"], "--sparsity_ratio: 'nan' is not"),
        (["--sparsity_type", "2:4", "--sparsity_ratio", "0.7"], "--sparsity_ratio 0.7: --sparsity_type 2:4 prunes 0.5"),
        (["--sparsity_type", "4:2"], "--sparsity_type: '4:2' is neither unstructured nor n:m"),
        (["--sparsity_type", "0:4"], "--sparsity_type: '0:4' is neither"),
        (["--sparsity_type", "structured"], "--sparsity_type: 'structured' is neither"),
        (
            ["--sparsity_type", "2:5"],
            "--sparsity_type 2:5 does not fit: layer 0 self_attn.q_proj has 32 columns, no mul",
        ),
        (["--groupsize", "10", "--wbits", "4"], "--groupsize 10 does not fit: layer 0 self_attn.q_proj has 32 columns"),
        (["--wbits", "1"], "--wbits: invalid choice: 1"),
        (["--wbits", "9"], "--wbits: invalid choice: 9"),
        (["--gptq"], "--gptq: nothing is quantized without --wbits 2 to 8"),
        (["--sym", "--wbits", "16"], "--sym: nothing is quantized without --wbits 2 to 8"),
        (["--act-order", "--wbits", "4"], "--act-order: needs --gptq"),
        (["--static-groups", "--wbits", "4", "--gptq"], "--static-groups: needs --groupsize"),
        (
            ["--prune_method", "sparsegpt", "--sparsity_type", "2:4", "--wbits", "4", "--act-order"],
            "--act-order: takes apart the neighbours of 2:4",
        ),
        (["--use_variant", "--prune_method", "ria"], "--use_variant: is a way of wanda"),
        (["--use_variant", "--sparsity_type", "2:4"], "--use_variant: is a way of wanda to prune unstructured"),
        (["--alpha", "-1"], "--alpha: '-1' is not a number from 0 to 1"),
        (["--a", "0"], "--a: '0' is not a number above 0"),
        (["--model_name", "a/b"], "--model_name a/b: is used in file names"),
        (["--seqlen", "65"], "--seqlen 65: .* has a context of 64 tokens"),
        (["--dataset", "/no/such.txt"], "dataset /no/such.txt: no such file or folder"),
        (["--calibration_dataset", "/no/such.txt"], "dataset /no/such.txt: no such file or folder"),
        (["--save", "/dev/null/log"], "--save /dev/null/log: /dev/null is not a folder"),
        (["--gradients", "no.json"], "gradients no.json: no such file; make it with save_gradient.py"),
        (
            ["--gradients", "x.json", "--prune_method", "ria"],
            "--gradients: ria unstructured does not use them",
        ),
        (["--nsample", "4"], "unrecognized arguments: --nsample 4"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(refuse, flags, problem):
    refuse(*flags, problem=problem)


@pytest.mark.parametrize(
    "flags, problem",
    [
        *BOTH,
        (["--output", "/dev/null/x.json"], "--output /dev/null: /dev/null is not a folder"),
        (["--output", "."], "--output .: name a file that ends in .json"),
        (["--output", "x.png"], "--output x.png: name a file that ends in .json"),
        (["--ngrad", "0"], "--ngrad: '0' is not a whole number of at least 1"),
        (["--dataset", "missing.jsonl"], "dataset missing.jsonl: no such file or folder"),
    ],
)
def test_wrong_flags_of_save_gradient(refuse_gradient, flags, problem):
    refuse_gradient(*flags, problem=problem)


def test_an_artefact_is_replaced_only_when_told(refuse_gradient, tiny_folder, text_file, monkeypatch):
    arguments = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16]
    assert run_gradient(*arguments, monkeypatch=monkeypatch) == 0
    refuse_gradient(problem="--output gradients/.*json: exists; name another file or add --overwrite")
    assert run_gradient(*arguments, "--overwrite", monkeypatch=monkeypatch) == 0


def test_documents_that_are_too_short(refuse, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"only {i} words"}) for i in range(9)))
    refuse(
        "--calibration_dataset", rows, problem=f"dataset {rows}: no document has more than 64 tokens, the longest \\d+;"
    )


# Artefacts ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(tiny_folder, text_file) -> Path:
    """Where alp_prune.py looks for an artefact."""
    return gradient_path(tiny_folder, text_file)


@pytest.fixture(scope="module")
def artefact(tiny_folder, text_file, tmp_path_factory) -> Path:
    """An artefact of the model and text."""
    path = tmp_path_factory.mktemp("gradients") / "gradient.json"
    arguments = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16, "--output", path]
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_gradient(*arguments, monkeypatch=monkeypatch) == 0
    return path


@pytest.fixture
def made(found, artefact, alp_arguments) -> dict:
    """The content of an artefact that stands where alp_prune.py looks for it."""
    found.parent.mkdir()
    shutil.copy(artefact, found)
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: "",
        lambda c: json.dumps(c)[:500],
        lambda c: "[]",
        lambda c: '{"tool": "ppllms"}',
        lambda c: "\udcff\x00",
    ],
    ids=["empty", "cut", "list", "result", "binary"],
)
def test_what_is_no_artefact_is_refused_and_never_advised_to_be_deleted(refuse, made, found, damage):
    found.write_bytes(damage(made).encode("utf-8", "surrogateescape"))
    refuse(problem=f"gradients {found}: holds no gradients .*; give a file of save_gradient.py, or move this one away")


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: json.dumps({**c, "format": "connection-sensitivity/1"}),
        lambda c: json.dumps({k: v for k, v in c.items() if k != "layers"}),
        lambda c: json.dumps(c).replace('"redundancy": 2', '"redundancy": 3', 1).replace('e": 1', 'e": 2', 1),
        lambda c: json.dumps({**c, "environment": {"device": "another"}}),
    ],
    ids=["format", "no layers", "a number", "a word"],
)
def test_a_changed_artefact_is_refused(refuse, made, found, damage):
    assert damage(made) != json.dumps(made)
    found.write_text(damage(made))
    refuse(problem=f"gradients {found}: broken .*make it again with save_gradient.py --overwrite, or delete it")


@pytest.mark.parametrize(
    "changes",
    [
        {"layers": [{"layer": {"count": 1}}]},
        {"layers": []},
        {"layers": "x"},
        {"model": 3},
        {"model": "\x1b[31m"},
        {"settings": {}},
        {"settings": {"dataset": "x", "nsamples": -1, "seqlen": 1, "loss": "last", "gradient_type": "l2", "seed": 0}},
        {"settings": {"dataset": "x", "nsamples": 1, "seqlen": 1, "loss": "lost", "gradient_type": "l2", "seed": 0}},
        {"settings": {"dataset": "x", "nsamples": True, "seqlen": 1, "loss": "last", "gradient_type": "l2", "seed": 0}},
        {"fingerprint": None},
    ],
    ids=str,
)
def test_an_artefact_of_what_no_run_writes_is_refused(refuse, made, found, changes):
    rewritten(found, **changes)
    refuse(problem=f"gradients {found}: (broken .*make it again with|made for another model .*move the file away)")


@pytest.mark.parametrize(
    "spread",
    [{"mean": -0.5}, {"count": -3}, {"count": 1.0}, {"redundancy": 1e300}, {"std": "0"}, {"mean": None}, {"x": 1}],
    ids=str,
)
def test_numbers_that_cannot_be_are_refused(refuse, made, found, spread):
    layers = made["layers"]
    layers[1]["layer"] |= spread
    rewritten(found, layers=layers)
    refuse(problem=f"gradients {found}: broken .*make it again with save_gradient.py")


@pytest.mark.parametrize(
    "content", ["[" * 200_000, '{"format": ' * 50_000, '{"format": 1e999}', f'{{"a": {"9" * 5000}}}']
)
def test_an_artefact_that_is_deep_or_huge_is_one_line(refuse, found, content):
    found.parent.mkdir()
    found.write_text(content)
    refuse(problem=f"gradients {found}: holds no gradients")


def test_a_file_that_is_no_artefact_is_not_replaced(refuse_gradient, tmp_path):
    other = tmp_path / "result.json"
    for content in ('{"tool": "ppllms"}', "", "text"):
        other.write_text(content)
        for flags in (["--overwrite"], ["--resume"], ["--overwrite", "--resume"]):
            refuse_gradient("--output", other, *flags, problem=f"--output {other}: is no file of gradients")
        assert other.read_text() == content


@pytest.mark.parametrize("changed", ["model.layers.3.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_an_artefact_of_another_model_is_refused(
    refuse, made, found, tiny_folder, text_file, tmp_path_factory, demo_tokenizer, changed
):
    """Another model of the same shape and name, wherever it differs: all of it goes into the gradients."""
    folder = tmp_path_factory.mktemp("other") / "tiny-llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.get_parameter(changed).data.mul_(1.01)
    model.save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    own = shutil.copy(found, gradient_path(folder, text_file))
    refuse("--model", folder, problem=f"gradients {own}: made for another model than {folder}")
    refuse("--model", folder, "--gradients", found, problem=f"gradients {found}: made for another model")


def test_an_artefact_of_fewer_layers_is_refused(refuse, made, found, tiny_folder):
    rewritten(found, layers=made["layers"][:3])
    refuse(problem=f"gradients {found}: made for another model than {tiny_folder}")


def test_an_artefact_of_other_settings_or_text_is_refused_where_it_is_found_by_its_name(refuse, made, found, text_file):
    rewritten(found, settings={**made["settings"], "gradient_type": "l1"})
    refuse(problem=f"gradients {found}: made with gradient_type l1, not l2")
    rewritten(found, settings=made["settings"], text="0")
    refuse(problem=f"gradients {found}: made on other text than {text_file} is now")


def test_what_is_no_log_is_refused(refuse):
    Path("results/log.tsv").mkdir(parents=True)
    refuse("--save_log", problem="--save: results/log.tsv is no log that can be appended to")


def test_a_log_with_other_columns_is_refused(refuse):
    Path("results").mkdir()
    Path("results/log.tsv").write_text("method\tppl\n")
    refuse("--save_log", problem="--save: results/log.tsv has other columns than this version writes")
