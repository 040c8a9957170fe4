"""The command lines of ALP: what they print and write, and that every flag does what it says."""

import json
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lib.sparsity.prepare
import lib.sparsity.run
from lib.config.gradients import GradientSettings
from lib.config.methods import METHODS
from lib.config.mixture import Mixture
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import evaluation_windows, sampled_windows
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.reporting.plots import has_matplotlib
from lib.sensitivity import artifact
from lib.sensitivity.gradients import connection_sensitivity
from lib.storage import log_tsv
from tests import reference
from tests.command import GOES_ON, gradient_path, run_alp, run_gradient, stopped


@pytest.fixture
def prune(alp_arguments, tmp_path, monkeypatch):
    """Runs alp_prune.py with more flags; gives result.json."""

    def run(*flags, status=0) -> dict:
        assert run_alp(*alp_arguments, "--overwrite", *flags, monkeypatch=monkeypatch) == status
        return json.loads((tmp_path / "run/result.json").read_text())

    return run


@pytest.fixture
def prune_quickly(prune):
    """As `prune`, and measures the model on little text."""
    return lambda *flags: prune("--eval_windows", 4, *flags)


@pytest.fixture
def gradient(tiny_folder, text_file, alp_arguments, monkeypatch):
    """Runs save_gradient.py with more flags, in the folder where `prune` runs."""

    def run(*flags, status=0) -> None:
        arguments = ["--model", tiny_folder, "--dataset", text_file, "--ngrad", 3, "--grad_seqlen", 16]
        assert run_gradient(*arguments, *flags, monkeypatch=monkeypatch) == status

    return run


def saved_linears(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = enumerate(reference.layer_linears(model))
    return {f"{index}.{name}": linear.weight.detach() for index, layer in layers for name, linear in layer.items()}


# What a run writes ----------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_a_run_writes_what_it_prints(prune, alp_arguments, tmp_path, monkeypatch, capsys):
    result = prune("--sparsity_ratio", 0.6)
    printed = capsys.readouterr().out
    order = ["Model ", "Parameters ", "Method ", "Calibration", "Gradients", "Importance", "Sparsity measured"]
    places = [printed.index(part) for part in (*order, "Perplexity (dense -> pruned)", "Written")]
    assert places == sorted(places) and printed == (tmp_path / "run/log.txt").read_text()
    assert (result["tool"], result["prune_method"], result["sparsity_ratio"]) == ("alp_prune", "wanda_alp", 0.6)
    assert (result["sparsity_type"], result["alpha"], result["grad_type"]) == ("unstructured", 0.15, "l2")
    assert (result["seed"], result["nsamples"], result["seqlen"]) == (0, 4, 64)
    expected = {"snapshot", "load", "data", "allocate", "prune", "evaluate", "samples", "save"}
    assert set(result["seconds"]) == expected
    assert set(result["prune_seconds"]["pruned"]) == {"observe", "select", "advance"}
    assert {"versions", "device", "command"} <= set(result["environment"]) and result["peak_memory_bytes"] > 0
    assert sum(result["layer_density"]) / 4 == pytest.approx(0.4, abs=1e-9)
    assert max(result["layer_density"]) - min(result["layer_density"]) == pytest.approx(0.3)
    for density, sparsity in zip(result["layer_density"], result["layer_sparsity"], strict=True):
        assert 1 - density - 1 / 32 <= sparsity <= 1 - density  # whole weights of rows of 32 and 48
    ((found,),) = [list(result["perplexity"].values())]
    assert set(found) == {"dense", "pruned"} and found["dense"] != found["pruned"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run/sparsity.png").stat().st_size > 10_000


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "ria_alp", "admm"])
def test_the_saved_model_is_the_one_that_was_measured(prune, text_file, tmp_path, method):
    result = prune("--prune_method", method, "--save_model", tmp_path / "out", "--sparsity_ratio", 0.5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(saved).__name__ == "LlamaForCausalLM" and not list((tmp_path / "out").glob("*.py"))
    windows = evaluation_windows(
        load_corpus(str(text_file), "test"), load_tokenizer(ModelSource(str(tmp_path / "out"))), 64
    )
    found = perplexity(reference.model_window_losses(saved), windows).value
    assert found == pytest.approx(result["perplexity"][str(text_file)]["pruned"], rel=1e-5)
    linears = saved_linears(tmp_path / "out").values()
    assert sum((w == 0).sum() for w in linears) / sum(w.numel() for w in linears) == pytest.approx(result["sparsity"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_to_the_ratio(prune_quickly, method):
    result = prune_quickly("--prune_method", method, "--sparsity_ratio", 0.5)
    assert result["prune_method"] == method
    if method == "dense":
        assert result["sparsity"] == result["sparsity_ratio"] == 0 and result["layer_density"] == [1.0] * 4
        ((found,),) = [list(result["perplexity"].values())]
        assert found["dense"] == found["pruned"]
    else:
        assert result["sparsity"] == pytest.approx(0.5, abs=0.03)
        assert (len(set(result["layer_density"])) > 1) == ("_" in method) == (result["alpha"] is not None)
        assert method.endswith("_alp") == (result["grad_type"] is not None)


def test_n_of_m_sets_every_layers_sparsity(prune, tmp_path, capsys):
    result = prune("--sparsity_type", "4:8", "--save_model", tmp_path / "out")
    assert result["layer_sparsity"] == [0.5] * 4 and result["sparsity_ratio"] == 0.5
    assert "4:8 sets the sparsity of every layer, so alp is not used" in capsys.readouterr().out
    assert result["grad_type"] is None and not Path("gradients").exists()
    assert all(((w == 0).view(-1, 8).sum(dim=1) == 4).all() for w in saved_linears(tmp_path / "out").values())
    assert prune("--sparsity_type", "1:16", "--sparsity_ratio", 0.0625, "--prune_method", "wanda")["sparsity"] == 1 / 16


def test_text_flags_choose_the_windows(prune, tiny_folder, text_file, tmp_path, monkeypatch):
    seen = []
    loop = lib.sparsity.run.prune_layers
    monkeypatch.setattr(lib.sparsity.run, "prune_layers", lambda *args: seen.append(args[4]) or loop(*args))
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"Number {i}: " + " ".join(str(i * j % 97) for j in range(60))}) for i in range(20)]
    rows.write_text("\n".join(lines))
    tokenizer = load_tokenizer(ModelSource(str(tiny_folder)))
    for dataset, nsamples, seqlen, seed in [(text_file, 4, 64, 0), (rows, 5, 32, 3)]:
        flags = ["--calibration_dataset", dataset, "--nsamples", nsamples, "--seqlen", seqlen, "--seed", seed]
        prune("--prune_method", "wanda", *flags)
        expected = sampled_windows(load_corpus(str(dataset), "train"), tokenizer, nsamples, seqlen, seed)
        assert torch.equal(seen[-1], expected)
    assert list(prune("--dataset", text_file, rows)["perplexity"]) == [str(text_file), str(rows)]


def test_magnitude_reads_no_calibration_text(prune, monkeypatch):
    read = []
    load = lib.sparsity.prepare.load_corpus
    monkeypatch.setattr(lib.sparsity.prepare, "load_corpus", lambda *args: read.append(args[1]) or load(*args))
    prune("--prune_method", "magnitude")
    assert read == ["test"]


def test_alpha_variant_and_power_change_what_goes(prune_quickly):
    plain = prune_quickly("--prune_method", "wanda_alp")
    assert prune_quickly("--alpha", 0)["layer_density"] == pytest.approx([0.3] * 4)
    assert len(set(prune_quickly("--alpha", 0.3)["layer_density"])) == 4 and len(set(plain["layer_density"])) == 4
    perplexities = [
        prune_quickly("--prune_method", *flags)["perplexity"]
        for flags in (["wanda"], ["wanda", "--use_variant"], ["ria"], ["ria", "--a", 2], ["sparsegpt"])
    ]
    perplexities.append(prune_quickly("--prune_method", "sparsegpt", "--percdamp", 5)["perplexity"])
    assert len({str(p) for p in perplexities}) == 6


def test_running_flags_reach_the_model(prune, monkeypatch):
    loaded, sizes = [], []
    load, batch = lib.sparsity.prepare.load_model, lib.sparsity.prepare.Batcher
    monkeypatch.setattr(lib.sparsity.prepare, "load_model", lambda *args: loaded.append(load(*args)) or loaded[-1])
    monkeypatch.setattr(lib.sparsity.prepare, "Batcher", lambda size, *ranks: sizes.append(size) or batch(size, *ranks))
    assert prune("--dtype", "bfloat16")["dtype"] == "bfloat16" and loaded[0].dtype == torch.bfloat16
    prune("--device_map", "auto", "--batch_size", 3)
    assert sizes[1] == 3 and loaded[1].dtype == torch.float32
    assert len(list(Path("gradients").iterdir())) == 2  # one for each dtype


def test_a_hub_model_is_found_in_the_folder_of_cache_dir(prune, tiny_folder, tmp_path):
    """Laid out as the hub's client keeps its files."""
    repository, commit = tmp_path / "cache/models--someone--tiny-llama", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    flags = ["--model", "someone/tiny-llama", "--cache_dir", tmp_path / "cache"]
    result = prune(*flags)
    assert (result["model"], result["model_name"]) == ("someone/tiny-llama", "tiny-llama")
    (path,) = Path("gradients").iterdir()
    assert path.name.startswith("someone--tiny-llama-l2-3x16-last-words.txt-")


def test_names_of_any_kind_do_no_harm(prune, alp_arguments, tiny_folder, tmp_path, monkeypatch):
    """Too long for a file, or what a plot would read as mathematics."""
    long = tmp_path / ("m" * 215)
    long.symlink_to(tiny_folder)
    at = alp_arguments.index("--output_dir")
    assert run_alp(*alp_arguments[:at], "--model", long, monkeypatch=monkeypatch) == 0
    flags = ["--prune_method", "magnitude", "--model_name", "a$_$b", "--save_model", tmp_path / "out"]
    assert prune(*flags)["model_name"] == "a$_$b" and (tmp_path / "out/config.json").exists()


def test_model_name_names_the_output(tiny_folder, alp_arguments, monkeypatch):
    at = alp_arguments.index("--output_dir")
    flags = [*alp_arguments[:at], "--prune_method", "magnitude", "--model_name", "my-llama", "--save_log"]
    assert run_alp(*flags, monkeypatch=monkeypatch) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("alp_prune-my-llama-")
    assert "my-llama" in Path("results/log.tsv").read_text()


# Gradients ------------------------------------------------------------------------------------------------------------


def test_gradients_are_computed_once_kept_and_found(prune, gradient, tiny_folder, text_file, monkeypatch, capsys):
    path = gradient_path(tiny_folder, text_file)
    first = prune()
    assert f"not in {path} yet: computing" in capsys.readouterr().out and path.is_file()
    kept = path.read_bytes()
    monkeypatch.setattr("lib.sensitivity.compute.connection_sensitivity", None)
    second = prune()
    assert f"found in {path}" in capsys.readouterr().out
    assert second["layer_density"] == first["layer_density"] and path.read_bytes() == kept


@pytest.mark.draws
def test_save_gradient_writes_what_alp_prune_finds(prune, gradient, tiny_folder, text_file, monkeypatch, capsys):
    gradient()
    printed = capsys.readouterr().out
    path = gradient_path(tiny_folder, text_file)
    assert str(path) in printed and "Importance by layer" in printed
    assert not has_matplotlib() or path.with_suffix(".png").stat().st_size > 10_000
    kept = artifact.read(path)
    tokenizer = load_tokenizer(ModelSource(str(tiny_folder)))
    windows = sampled_windows(load_corpus(str(text_file), "train"), tokenizer, 3, 16, 0)
    assert kept.layers == connection_sensitivity(Decoder(load_model(ModelSource(str(tiny_folder)))), windows)
    assert kept.settings == GradientSettings(Mixture.of(str(text_file)), 3, 16) and kept.model == str(tiny_folder)
    monkeypatch.setattr("lib.sensitivity.compute.connection_sensitivity", None)
    assert prune()["gradients"]["nsamples"] == 3


def test_every_gradient_flag_counts(prune_quickly, gradient):
    found = set()
    variants = [
        [],
        ["--grad_type", "l1"],
        ["--grad_type", "l2_hundred_total"],
        ["--grad_loss", "all"],
        ["--grad_seed", 4],
    ]
    variants += [["--grad_seqlen", 20]]
    for flags in variants:
        gradient(*flags)
        found.add(str(prune_quickly(*flags)["layer_density"]))
    assert len(found) == len(list(Path("gradients").glob("*.json"))) == len(variants)
    gradient("--ngrad", 5, "--output", "other/five.json")
    assert prune_quickly("--gradients", "other/five.json", "--grad_nsamples", 5)["grad_nsamples"] == 5
    assert not list(Path("gradients").glob("*5x16*"))


# The log --------------------------------------------------------------------------------------------------------------


def read_log(folder="results") -> list[dict]:
    lines = [line.split("\t") for line in (Path(folder) / log_tsv.FILE).read_text().splitlines()]
    assert lines[0] == list(log_tsv.COLUMNS) and all(len(line) == len(lines[0]) for line in lines)
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def test_the_log_gets_a_row_for_each_run(prune, text_file, capsys):
    first = prune("--save_log")
    prune("--save_log", "--prune_method", "dense", "--wbits", 4)
    assert "try --gptq, or more bits\n" in capsys.readouterr().out  # as nothing is pruned
    seconds = prune("--save_log", "--prune_method", "dense")["seconds"]
    assert seconds["prune"] == seconds["allocate"] == seconds["save"] == 0
    prune("--save", "elsewhere", "--prune_method", "wanda")
    one, two, plain = read_log()
    assert list(one)[:3] == ["method", "actual_sparsity", "ppl_test"]
    assert (one["method"], one["alpha"], one["grad_type"], one["dataset"]) == (
        "wanda_alp",
        "0.15",
        "l2",
        str(text_file),
    )
    assert float(one["ppl_test"]) == pytest.approx(first["perplexity"][str(text_file)]["pruned"], abs=1e-4)
    assert float(one["actual_sparsity"]) == pytest.approx(first["sparsity"], abs=1e-6)
    assert two["method"] == "dense" and two["alpha"] == "" and float(two["ppl_quantized"]) > 0
    assert plain["ppl_test"] == plain["ppl_dense"] and plain["actual_sparsity"] == "0.000000"
    (three,) = read_log("elsewhere")
    assert three["method"] == "wanda"


def _append(folder: Path, result: dict, count: int, start, process: int) -> None:
    start.wait()
    for number in range(count):
        log_tsv.append(folder / str(number), log_tsv.rows(result, Path(f"a\t{process}")))


def test_runs_that_append_at_once_write_one_header_and_lose_no_row(prune, tmp_path):
    result, count = prune(), 50
    context = multiprocessing.get_context("forkserver")
    start = context.Barrier(4)
    processes = [context.Process(target=_append, args=(tmp_path / "log", result, count, start, i)) for i in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    for number in range(count):
        rows = read_log(tmp_path / "log" / str(number))
        assert sorted(row["output_dir"] for row in rows) == [f"a {i}" for i in range(4)]


def test_rows_that_are_there_are_not_appended_again(prune, tmp_path):
    lines = log_tsv.rows(prune(), Path("a"))
    path = log_tsv.append(tmp_path / "log", lines)
    whole = path.read_text()
    assert log_tsv.append(tmp_path / "log", lines).read_text() == whole
    for cut in (len(whole) - 5, 7):  # as by a full disk: in a row, in the header
        path.write_text(whole[:cut])
        assert log_tsv.append(tmp_path / "log", lines).read_text() == whole
    other = whole + "a line without an end"
    path.write_text(other)
    assert log_tsv.append(tmp_path / "log", lines).read_text() == other + "\n"
    path.write_bytes(whole.encode() + b"\xe9\n")
    assert log_tsv.append(tmp_path / "log", lines).read_bytes() == whole.encode() + b"\xe9\n"


# Quantization ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        ["wanda", "--wbits", 4],
        ["wanda", "--wbits", 4, "--gptq"],
        ["ria_alp", "--wbits", 3, "--gptq", "--sym"],
        ["magnitude", "--wbits", 4, "--groupsize", 16],
        ["sparsegpt", "--wbits", 4],
        ["sparsegpt", "--wbits", 4, "--gptq", "--act-order"],
        ["sparsegpt", "--wbits", 3, "--gptq", "--groupsize", 16, "--static-groups", "--act-order"],
        ["sparsegpt", "--wbits", 2, "--sparsity_type", "2:4"],
        ["admm", "--wbits", 4],
        ["admm", "--wbits", 4, "--gptq"],
        ["admm", "--wbits", 2, "--sparsity_type", "2:4", "--gptq", "--act-order"],
        ["dense", "--wbits", 4, "--gptq"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_quantized_models_keep_their_zeros_and_have_few_values(prune_quickly, tmp_path, flags):
    ratio = [] if "--sparsity_type" in flags else ["--sparsity_ratio", 0.5]
    result = prune_quickly("--prune_method", *flags, *ratio, "--save_model", tmp_path / "out")
    plain = prune_quickly("--prune_method", flags[0], *ratio, *(flags[3:5] if "--sparsity_type" in flags else []))
    ((found,), (without,)) = (list(r["perplexity"].values()) for r in (result, plain))
    assert list(found) == ["dense", "pruned", "quantized"]
    assert found["pruned"] == pytest.approx(without["pruned"]) and found["quantized"] != found["pruned"]
    assert result["sparsity"] == plain["sparsity"] <= result["quantized_sparsity"]
    assert result["quantization"].startswith(f"{flags[2]} bits") and ("act-order" in result["quantization"]) == (
        "--act-order" in flags
    )
    bits, columns = flags[2], 16 if "--groupsize" in flags else None
    if columns and "--act-order" in flags and "--static-groups" not in flags:
        return
    for weight in saved_linears(tmp_path / "out").values():
        for group in weight.split(columns or weight.shape[1], dim=1):
            assert max(len(row.unique()) for row in group) <= 2**bits


def test_each_quantization_flag_changes_the_outcome(prune_quickly):
    flags = ["--prune_method", "wanda", "--wbits", 3, "--sparsity_ratio", 0.5]
    variants = [[], ["--sym"], ["--gptq"], ["--gptq", "--act-order"], ["--groupsize", 8], ["--gptq", "--groupsize", 8]]
    variants += [["--gptq", "--groupsize", 8, "--static-groups"], ["--gptq", "--percdamp", 1]]
    found = [prune_quickly(*flags, *more)["perplexity"] for more in variants]
    assert len({str(perplexity) for perplexity in found}) == len(variants)


# When things go wrong -------------------------------------------------------------------------------------------------


def test_a_failed_save_keeps_the_result(prune, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(lib.sparsity.run, "save_weights", fail)
    assert prune("--save_model", tmp_path / "out", status=1)["sparsity"] > 0.6
    assert (
        capsys.readouterr().err == "alp_prune.py: failed: no space left on device; what is finished is kept: " + GOES_ON
    )


def test_without_matplotlib_there_is_a_result_and_a_word_about_it(prune, gradient, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("lib.reporting.plots.has_matplotlib", lambda: False)
    gradient()
    prune()
    assert capsys.readouterr().out.count("matplotlib is not installed") == 2
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_run_that_is_stopped_leaves_no_half_result(alp_arguments, tmp_path, kind):
    flags = [*alp_arguments, "--nsamples", 20000, "--seqlen", 4, "--batch_size", 1, "--save_model", tmp_path / "out"]
    status, told = stopped("alp_prune.py", *flags, "--save_log", at=b"Importance", kind=kind)
    assert status == (130 if kind == signal.SIGINT else -signal.SIGKILL)
    advice = f"alp_prune.py: stopped; what is finished is kept: {GOES_ON}".encode()
    assert told == (advice if kind == signal.SIGINT else b"")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.txt", "run.json", "state"]
    assert not (tmp_path / "out").exists() and not Path("results").exists()
    (path,) = Path("gradients").glob("*.json")
    artifact.read(path)  # what was done is kept, and whole
