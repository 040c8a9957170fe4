"""Nothing that is given to a run can run code unasked, and no name in it leads to files outside the output folder."""

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from safetensors.torch import load_file

import alp_prune
import ppllms
import save_gradient
from lib.config.gradients import GradientSettings
from lib.config.mixture import Mixture
from lib.config.sources import ModelSource, check_model, short_name
from lib.data.corpora import load_corpus
from lib.errors import InputError
from lib.evaluation.distance import FIELDS
from lib.files import digest_of_json
from lib.models.loading import load_model, load_tokenizer
from lib.storage import output_folder
from tests.command import ROOT, run
from tests.families import tiny_model
from tests.lm_eval_tasks import CHOICE
from tests.sensitivity.rewritten import rewritten

SCRIPTS = {"ppllms": ppllms, "alp_prune": alp_prune, "save_gradient": save_gradient}
OUTSIDE = "../../../evil"  # from `here` a path beside the model, where every test looks


class Trap:
    """A file that appears when the code runs that makes it."""

    def __init__(self, path: Path):
        self.path = path
        self.code = f"from pathlib import Path\n\nPath({str(path)!r}).touch()\n"

    def __reduce__(self):
        return Path.touch, (self.path,)

    def has_sprung(self) -> bool:
        return self.path.exists()


@pytest.fixture
def trap(tmp_path) -> Trap:
    return Trap(tmp_path / "sprung")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """The working folder, deep enough that what climbs out of it is still found."""
    folder = tmp_path / "a/b/here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def model(tiny_folder, tmp_path) -> Path:
    """A checkpoint of the test's own."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def change(path: Path, **fields) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def flags_of(script, model: Path | str, text: Path) -> list:
    """A run of less than a second on a model."""
    if script is ppllms:
        counts = ["--mha_remove_layers", 1, "--ffn_remove_layers", 2, "--eval_ppl", "no"]
        return ["--model_name", model, "--dataset", text, "--nsamples", 3, *counts]
    if script is alp_prune:
        texts = ["--calibration_dataset", text, "--dataset", text, "--nsamples", 3]
        return ["--model", model, *texts, "--grad_nsamples", 2, "--grad_seqlen", 16, "--prune_method", "magnitude"]
    return ["--model", model, "--dataset", text, "--ngrad", 2, "--grad_seqlen", 16, "--overwrite"]


def assert_told(capsys, *words: str) -> None:
    """One line was said to stderr, with these words."""
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ": error: " in told and all(word in told for word in words), told


@contextmanager
def nothing_changes_outside(here: Path) -> Iterator[None]:
    """Asserts that what is written meanwhile is written in the folder."""
    root = here.parents[2]

    def state() -> dict[Path, int]:
        found = (path for path in root.rglob("*") if here not in (path, *path.parents) and not path.is_dir())
        return {path: path.lstat().st_mtime_ns for path in found}

    before = state()
    yield
    assert state() == before


# No pickles -----------------------------------------------------------------------------------------------------------

PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def unsafe(code: str) -> list[str]:
    """What a module imports or calls that reads or writes pickles, runs text as code, or trusts a checkpoint's."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] if str(node.module).split(".")[0] in PICKLES else []
            found += names & {"torch.load", "torch.save", "torch.serialization"}
        elif isinstance(node, ast.Attribute) and (ast.unparse(node) in ("torch.load", "torch.save", "torch.hub.load")):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            found.append(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec", "__import__"):
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.keyword) and (node.arg, ast.unparse(node.value)) in (
            ("allow_pickle", "True"),
            ("weights_only", "False"),
            ("trust_remote_code", "True"),
        ):
            found.append(node.arg)
    return found


def test_no_code_of_ours_reads_or_writes_pickles_or_trusts_code():
    files = [*ROOT.glob("*.py"), *(ROOT / "lib").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert {"ppllms.py", "loading.py", "healing.py", "train.py"} <= {file.name for file in files}
    assert not {file.name: found for file in files if (found := unsafe(file.read_text(encoding="utf-8")))}


@pytest.mark.parametrize(
    "code",
    [
        "def f():\n    import pickle",
        "from dill import loads",
        "from torch import save, nn",
        "torch.load('x')",
        "read = torch.load",
        "np.load('x', allow_pickle=True)",
        "pandas.read_pickle('x')",
        "M.from_pretrained('x', trust_remote_code=True)",
        "M.from_pretrained('x', weights_only=False)",
        "exec(text)",
    ],
)
def test_the_search_for_pickles_finds_them(code):
    assert unsafe(code)


@pytest.mark.parametrize("kind", ["plain", "zip", "old"])
def test_weights_that_would_run_code_are_refused(model, text_file, here, trap, monkeypatch, capsys, kind):
    (model / "model.safetensors").unlink()
    if kind == "plain":
        (model / "pytorch_model.bin").write_bytes(pickle.dumps(trap, protocol=2))
    else:
        torch.save({"a": trap}, model / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
    assert run(*flags_of(ppllms, model, text_file), monkeypatch=monkeypatch) == 2
    assert_told(capsys, str(model), "could run code; give *.safetensors")
    assert not trap.has_sprung() and not any(here.iterdir())
    with suppress(RuntimeError):  # the code runs, and leaves no weights
        torch.load(model / "pytorch_model.bin", weights_only=False)
    assert trap.has_sprung()


def test_weights_that_are_tensors_load_from_a_bin_file(model):
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    loaded = load_model(ModelSource(str(model))).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


# Data sets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text.pkl", "text.json", "text.jsonl", "text.json.gz", "text.parquet"])
def test_a_pickle_is_no_text_whatever_its_name(tmp_path, trap, name):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(pickle.dumps(trap))
    for path in (tmp_path / "data", tmp_path / "data" / name):
        with pytest.raises(InputError, match="cannot be read|is not UTF-8|no .txt, .md, .json"):
            load_corpus(str(path), "train")
    assert not trap.has_sprung()


def test_the_script_in_a_folder_of_text_is_not_run(tmp_path, trap):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(trap.code)
    for path in (folder, folder / "data.py"):
        with pytest.raises(InputError, match="no .txt, .md, .json"):
            load_corpus(str(path), "train")
    (folder / "train.jsonl").write_text('{"text": "one"}\n')
    assert list(load_corpus(str(folder), "train").documents) == ["one"] and not trap.has_sprung()


def test_a_folder_with_the_name_of_a_data_set_of_the_hub_runs_no_script(here, trap):
    folder = here / "allenai/c4"
    folder.mkdir(parents=True)
    (folder / "c4.py").write_text(trap.code)
    with pytest.raises(InputError, match="dataset c4: cannot be loaded"):
        load_corpus("c4", "train")
    assert not trap.has_sprung()


@pytest.mark.parametrize("name", ["a[1].jsonl", "?1.jsonl", "*.jsonl"])
def test_the_name_of_a_text_is_no_pattern(tmp_path, name):
    (tmp_path / "a1.jsonl").write_text('{"text": "another"}\n')
    (tmp_path / name).write_text('{"text": "this"}\n')
    assert list(load_corpus(str(tmp_path / name), "train").documents) == ["this"]


def test_files_that_a_table_names_are_not_opened(tmp_path):
    """A column of images holds paths or addresses, and reading its rows would open them."""
    image = tmp_path / "image.png"
    image.touch()
    column = [{"path": str(image), "bytes": None}]
    table = datasets.Dataset.from_dict({"text": ["one"], "image": column}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "text.parquet")
    column = pyarrow.array([{"path": str(tmp_path / "no.png"), "bytes": None}])
    found = pyarrow.parquet.read_table(tmp_path / "text.parquet")
    column = column.cast(found.schema.field("image").type)
    pyarrow.parquet.write_table(found.set_column(1, found.schema.field("image"), column), tmp_path / "text.parquet")
    assert list(load_corpus(str(tmp_path / "text.parquet"), "train").documents) == ["one"]


@pytest.mark.parametrize(
    "name", ["https://a.b/c.json", "hf://datasets/a/b.json", "zip://x::a.json", "a/b:../c", "a\nb"]
)
def test_a_text_is_a_path_or_a_hub_id_and_no_address(here, name):
    with pytest.raises(InputError, match="no such file or folder"):
        load_corpus(name, "train")


# Code that comes with a model -----------------------------------------------------------------------------------------

OWN = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig if {is_own} else LlamaConfig


class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def add_code(model: Path, part: str, trap: Trap) -> None:
    """Makes a part of a checkpoint ask for code that lies beside it."""
    (model / "own.py").write_text(trap.code + OWN.format(is_own=part == "config"))
    config = model / "config.json"
    if part == "tokenizer":
        auto_map = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
        change(model / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    elif part == "model":
        change(config, auto_map={"AutoModelForCausalLM": "own.OwnForCausalLM"})
    else:
        auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
        change(config, auto_map=auto_map, model_type="own", architectures=["OwnForCausalLM"])


@pytest.mark.parametrize("part", ["model", "config", "tokenizer"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_code_in_a_checkpoint_runs_only_with_the_flag(model, text_file, here, trap, monkeypatch, capsys, script, part):
    add_code(model, part, trap)
    flags = flags_of(SCRIPTS[script], model, text_file)
    needs_code = part != "model"  # transformers has a model of that type, and takes its own
    assert run(*flags, monkeypatch=monkeypatch, script=SCRIPTS[script]) == (2 if needs_code else 0)
    if needs_code:
        assert_told(capsys, f"{script}.py: error: {model}: ", "if you trust it add --trust_remote_code")
    assert not trap.has_sprung()
    assert run(*flags, "--trust_remote_code", monkeypatch=monkeypatch, script=SCRIPTS[script]) == 0
    assert trap.has_sprung()


@pytest.mark.parametrize("trust", [[], ["--trust_remote_code"]], ids=["untrusted", "trusted"])
def test_a_pruned_checkpoint_loads_with_our_code_and_never_its_own(
    tiny_folder, text_file, here, trap, monkeypatch, trust
):
    saved, again = here / "saved", here / "again"
    flags = flags_of(ppllms, tiny_folder, text_file)
    assert run(*flags, "--save_model", saved, monkeypatch=monkeypatch) == 0
    ours = (saved / "modeling_pruned.py").read_text()
    (saved / "modeling_pruned.py").write_text(trap.code + ours)
    for script in SCRIPTS.values():
        flags = [*flags_of(script, saved, text_file), *trust]
        flags += ["--save_model", again, "--ffn_remove_layers", 1, "--mha_remove_layers", 0] * (script is ppllms)
        assert run(*flags, monkeypatch=monkeypatch, script=script) == 0
    assert not trap.has_sprung()
    assert (again / "modeling_pruned.py").read_text() == ours


@pytest.mark.parametrize(
    "architectures",
    [["PrunedAutoModelForCausalLM"], ["PrunedNoForCausalLM"], ["Pruned../xForCausalLM"], ["../../x"], [3], [], 3, "x"],
)
def test_a_config_names_a_model_class_or_is_not_heard(model, architectures):
    change(model / "config.json", architectures=architectures, per_layer_config={"1": {"skip": ["mlp"]}})
    assert type(load_model(ModelSource(str(model)))) is transformers.LlamaForCausalLM


# Names that a checkpoint holds ----------------------------------------------------------------------------------------


def split_weights(model: Path, name: str, index: str = "model.safetensors.index.json") -> None:
    """Renames the file of weights, with an index that tells the name."""
    weights = dict.fromkeys(load_file(model / "model.safetensors"), name)
    (model / name).parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / name)
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": weights}))


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_outside_the_folder_are_not_read(model, text_file, here, monkeypatch, capsys, script):
    split_weights(model, "../outside.safetensors")
    flags = flags_of(SCRIPTS[script], model, text_file)
    assert run(*flags, monkeypatch=monkeypatch, script=SCRIPTS[script]) == 2
    assert_told(capsys, f"model {model}: ", "names weights outside the folder (../outside.safetensors); copy them")
    assert not any(here.iterdir())


@pytest.mark.parametrize(
    "name, index",
    [
        ("../outside.safetensors", "pytorch_model.bin.index.json"),
        ("x/../../outside.safetensors", "model.safetensors.index.json"),
        ("/etc/outside.safetensors", "model.safetensors.index.json"),
        ("../outside\n.safetensors", "x/own.safetensors.index.json"),  # of a config with `transformers_weights`
    ],
)
def test_an_index_that_leads_out_of_the_folder_is_refused(model, name, index):
    (model / "x").mkdir()
    (model / index).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(InputError, match="names weights outside the folder"):
        check_model(str(model))


def test_weights_below_the_folder_or_linked_from_it_are_read(model, tmp_path):
    split_weights(model, "parts/..1.safetensors")
    (model / "parts/..1.safetensors").rename(tmp_path / "blob")
    (model / "parts/..1.safetensors").symlink_to(tmp_path / "blob")
    check_model(str(model))
    assert load_model(ModelSource(str(model))).state_dict()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_a_broken_index_is_told_in_one_line(model, text_file, here, monkeypatch, capsys, content):
    split_weights(model, "part.safetensors")
    (model / "model.safetensors.index.json").write_text(content)
    assert run(*flags_of(ppllms, model, text_file), monkeypatch=monkeypatch) == 2
    assert_told(capsys, str(model))


@pytest.mark.parametrize("name", [OUTSIDE, "..", "a/b", "/etc/x", "a\0b", "", "x" * 300])
def test_a_chat_template_named_by_a_path_is_refused_before_the_work(model, text_file, here, monkeypatch, capsys, name):
    change(model / "tokenizer_config.json", chat_template=[{"name": name, "template": "x"}])
    with nothing_changes_outside(here):
        flags = [*flags_of(ppllms, model, text_file), "--save_model", here / "saved"]
        assert run(*flags, monkeypatch=monkeypatch) == 2
    assert_told(capsys, f"{model}: chat template ", "rename it")
    assert not any(here.iterdir())


def test_chat_templates_with_plain_names_are_saved(model, text_file, here, monkeypatch):
    templates = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
    given = [{"name": name, "template": template} for name, template in templates.items()]
    change(model / "tokenizer_config.json", chat_template=given)
    flags = [*flags_of(ppllms, model, text_file), "--save_model", here / "saved"]
    assert run(*flags, monkeypatch=monkeypatch) == 0
    assert load_tokenizer(ModelSource(str(here / "saved"))).chat_template == templates


@pytest.mark.parametrize("save_format", ["hf", "masked", "nemotron-nas"])
def test_no_name_in_a_checkpoint_becomes_a_path(model, text_file, here, monkeypatch, save_format):
    paths = ("_name_or_path", "name_or_path", "save_directory", "filename_prefix", "processor_class", "tokenizer_file")
    hostile = dict.fromkeys((*paths, "vocab_file", "special_tokens_map_file"), OUTSIDE)
    change(model / "config.json", architectures=[OUTSIDE], **hostile)
    change(model / "tokenizer_config.json", **hostile)
    change(model / "generation_config.json", custom_generate=OUTSIDE, **hostile)
    with nothing_changes_outside(here):
        flags = [*flags_of(ppllms, model, text_file), "--save_model", here / "saved", "--save_format", save_format]
        assert run(*flags, monkeypatch=monkeypatch) == 0
    assert (here / "saved/model.safetensors").is_file()


def test_links_in_model_folders_are_read_and_never_written_through(model, tiny_folder, text_file, here, monkeypatch):
    for name in ("model.safetensors", "tokenizer.json", "config.json", "modeling_pruned.py", "log.txt"):
        target = model.parent / f"linked-{name}"
        (model / name).rename(target) if (model / name).exists() else target.write_text("keep")
        (model / name).symlink_to(target)
    with nothing_changes_outside(here):
        flags = [*flags_of(ppllms, model, text_file), "--save_model", here / "saved"]
        assert run(*flags, monkeypatch=monkeypatch) == 0
    assert not [path for path in (here / "saved").iterdir() if path.is_symlink()]
    (model / "log.txt").unlink()
    model.rename(here / "old")
    with nothing_changes_outside(here):
        flags = [*flags_of(ppllms, tiny_folder, text_file), "--save_model", here / "old", "--overwrite"]
        assert run(*flags, monkeypatch=monkeypatch) == 0
    assert not [path for path in (here / "old").iterdir() if path.is_symlink()]


# Names that a user gives ----------------------------------------------------------------------------------------------

NAMES = (
    "..",
    "../..",
    "a/..",
    "/",
    "/etc/..",
    "a/b/../../c",
    "nobody/..",
    "..:..",
    "a\\..\\b",
    "x\ny",
    "../" * 60 + "x",
)


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_model_or_text_leads_out_of_our_folders(here, name):
    with output_folder.chosen(None, f"ppllms-{short_name(name)[:80]}") as folder:
        assert folder.resolve().parent == here / "runs"
    for model, text in ((name, "c4"), ("nobody/model", name), (name, name)):
        assert GradientSettings(Mixture.of(text)).path(model, "float16").resolve().parent == here / "gradients"


@pytest.mark.parametrize("name", ["..", ".", "a/b", OUTSIDE, "/etc/x", "a\nb", "a\tb"])
def test_a_name_for_outputs_is_one_of_a_file(tiny_folder, text_file, here, monkeypatch, capsys, name):
    flags = [*flags_of(alp_prune, tiny_folder, text_file), "--model_name", name, "--save_log"]
    assert run(*flags, monkeypatch=monkeypatch, script=alp_prune) == 2
    assert_told(capsys, "--model_name", "is used in file names; give one without slashes")
    assert not any(here.iterdir())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_model_and_a_text_of_odd_names_stay_in_our_folders(model, text_file, here, monkeypatch, script):
    model = model.rename(model.with_name("x\n..:$(y)"))
    text = shutil.copy(text_file, model.parent / "..\t:words.txt")
    flags = flags_of(SCRIPTS[script], model, text)
    with nothing_changes_outside(here):
        flags += ["--save_log"] if script == "alp_prune" else []
        assert run(*flags, monkeypatch=monkeypatch, script=SCRIPTS[script]) == 0
    assert {path.name for path in here.iterdir()} <= {"runs", "gradients", "results"}
    if script == "alp_prune":
        header, *rows = (here / "results/log.tsv").read_text().splitlines()
        assert len(rows) == 1 and rows[0].count("\t") == header.count("\t")


# Names in files of ours -----------------------------------------------------------------------------------------------


def write_plan(path: Path, model: str, parameters: int) -> Path:
    """A result.json of ppllms.py, as far as it is read."""
    plan = {"tool": "ppllms", "num_layers": 4, "mha_removed": [1], "ffn_removed": [1, 2]}
    path.write_text(json.dumps({**plan, "model": model, "parameters": {"total": parameters}}))
    return path


def test_the_model_of_a_plan_is_only_read(model, here, monkeypatch, capsys):
    flags = ["--eval_ppl", "no", "--apply_plan", write_plan(here / "plan.json", "../../../model", 162080)]
    with nothing_changes_outside(here):
        assert run(*flags, monkeypatch=monkeypatch) == 0
    (written,) = (here / "runs").iterdir()
    assert written.name.startswith("ppllms-model-")
    capsys.readouterr()
    flags[-1] = write_plan(here / "plan.json", OUTSIDE, 162080)
    assert run(*flags, monkeypatch=monkeypatch) == 2
    assert_told(capsys, f"model {OUTSIDE}: no such folder")


def test_names_in_a_file_of_gradients_become_no_paths(tiny_folder, text_file, here, monkeypatch):
    flags = [*flags_of(save_gradient, tiny_folder, text_file), "--output", here / "gradients.json"]
    assert run(*flags, monkeypatch=monkeypatch, script=save_gradient) == 0
    content = json.loads((here / "gradients.json").read_text())
    settings = {**content["settings"], "dataset": OUTSIDE}
    rewritten(here / "gradients.json", model=OUTSIDE, environment={OUTSIDE: OUTSIDE}, settings=settings)
    flags = [*flags_of(alp_prune, tiny_folder, text_file), "--prune_method", "magnitude_alp", "--sparsity_ratio", 0.5]
    with nothing_changes_outside(here):
        flags += ["--gradients", here / "gradients.json"]
        assert run(*flags, monkeypatch=monkeypatch, script=alp_prune) == 0


def test_names_in_the_results_of_a_grid_become_no_paths(tiny_folder, text_file, here, monkeypatch):
    flags = [*flags_of(alp_prune, tiny_folder, text_file), "--sparsity_ratio", 0.5, 0.6, "--output_dir", here / "grid"]
    assert run(*flags, monkeypatch=monkeypatch, script=alp_prune) == 0
    names = {path.name for path in (here / "grid").iterdir()}
    ledger = here / "grid/results.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for line in lines:
        line["result"] |= dict.fromkeys(("model", "model_name", "dataset", "prune_method", "gradients"), OUTSIDE)
        for field in FIELDS:
            line["result"][field] = {OUTSIDE: next(iter(line["result"][field].values()))}
        line["digest"] = digest_of_json({"key": line["key"], "result": line["result"]})
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (here / "grid/table.md").unlink()
    with nothing_changes_outside(here):
        assert run(*flags, monkeypatch=monkeypatch, script=alp_prune) == 0
    assert OUTSIDE in (here / "grid/table.md").read_text()  # so it was heard
    assert {path.name for path in (here / "grid").iterdir()} == names


@pytest.mark.draws
def test_texts_that_are_told_apart_by_their_paths_have_plots_in_the_folder(
    tiny_folder, text_file, tmp_path, here, monkeypatch
):
    texts = [f"../../../{name}/words.txt" for name in "xy"]  # one name, so each goes by its path
    for text in texts:
        Path(text).parent.mkdir()
        shutil.copy(text_file, text)
    flags = [*flags_of(alp_prune, tiny_folder, text_file), "--dataset", *texts, "--sparsity_ratio", 0.5, 0.6]
    with nothing_changes_outside(here):
        assert run(*flags, "--output_dir", here / "grid", monkeypatch=monkeypatch, script=alp_prune) == 0
    assert len(list((here / "grid").glob("perplexity-*.png"))) == 2


def test_names_in_a_gguf_file_become_no_paths(tmp_path, here, monkeypatch):
    gguf = pytest.importorskip("gguf")
    from tests.export.gguf_writer import write_gguf

    write_header = gguf.GGUFWriter.write_header_to_file

    def with_names(writer):
        for key in ("general.name", "general.basename", "general.url", "tokenizer.ggml.model", "split.tensors"):
            writer.kv_data[0].pop(key, None)
            writer.add_string(key, OUTSIDE)
        write_header(writer)

    model = tiny_model("Llama")
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_header_to_file", with_names)
        write_gguf(model, tmp_path / "in.gguf")
    plan = write_plan(here / "plan.json", OUTSIDE, model.num_parameters())
    with nothing_changes_outside(here):
        flags = ["--apply_plan", plan, "--gguf", tmp_path / "in.gguf", here / "out.gguf"]
        assert run(*flags, monkeypatch=monkeypatch) == 0
    assert gguf.GGUFReader(here / "out.gguf").get_field("general.name").contents() == OUTSIDE
    assert {path.name for path in here.iterdir()} == {"plan.json", "out.gguf"}


def test_the_name_of_a_task_becomes_no_path(tiny_folder, text_file, tmp_path, here, monkeypatch):
    pytest.importorskip("lm_eval")
    (tmp_path / "q.jsonl").write_text('{"question": "The layer was", "choices": ["removed", "of 31"], "answer": 0}\n')
    (tmp_path / "task.yaml").write_text(CHOICE.format(name=OUTSIDE, data=tmp_path / "q.jsonl"))
    flags = [*flags_of(alp_prune, tiny_folder, text_file), "--tasks", tmp_path / "task.yaml"]
    with nothing_changes_outside(here):
        assert run(*flags, monkeypatch=monkeypatch, script=alp_prune) == 0
    (result,) = here.rglob("result.json")
    assert OUTSIDE in json.loads(result.read_text())["tasks"]["accuracy"]
