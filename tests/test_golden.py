"""PP-LLMs and ALP on a real trained model and real text give what the reference code gives."""

import copy
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ppllms
from lib.cli.exit_status import run_script
from lib.config.methods import parse_method, parse_pattern
from lib.config.plan import Plan
from lib.config.sources import ModelSource
from lib.data.corpora import load_corpus
from lib.data.sampling import evaluation_windows, sampled_windows
from lib.engine.window_scores import plan_window_losses
from lib.evaluation.perplexity import perplexity
from lib.models.decoder import Decoder
from lib.models.loading import load_model, load_tokenizer
from lib.models.matrices import input_groups
from lib.runtime.batching import Batcher
from lib.sensitivity.gradients import connection_sensitivity, importance
from lib.sparsity.densities import spread_densities
from lib.sparsity.layerwise import count_zeros, prune_layers
from lib.sparsity.pruners import Magnitude, Ria, SparseGpt, Wanda
from tests.command import run_alp


@pytest.mark.parametrize("run", [0, 1], ids=["2of3", "1of2"])
def test_ppllms_is_the_reference(shared, tmp_path, monkeypatch, run):
    golden = json.loads((shared / "golden/ppllms.json").read_text())
    expected, c4 = golden["runs"][run], str(shared / "data/c4")
    flags = {
        "--model_name": shared / "models/stories260K",
        "--dtype": golden["dtype"],
        "--dataset": c4,
        "--eval_datasets": c4,
        "--seqlen": golden["seqlen"],
        "--bi_windows": 1,
        "--output_dir": tmp_path / "run",
        **{f"--{name}": expected[name] for name in ("nsamples", "seed", "mha_remove_layers", "ffn_remove_layers")},
    }
    monkeypatch.setattr(sys, "argv", ["ppllms.py", *(str(part) for flag in flags.items() for part in flag)])
    assert run_script("ppllms.py", ppllms.main) == 0
    result = json.loads((tmp_path / "run/result.json").read_text())

    assert result["bi_scores"] == pytest.approx(expected["bi_scores_first_window"], abs=1e-4)
    assert result["candidates"] == expected["candidates"]
    for found, wanted in zip(result["rounds"], expected["rounds"], strict=True):
        assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5)
        assert found["selected"] == wanted["selected"]
    assert result["mha_removed"] == expected["mha_removed"]
    assert result["ffn_removed"] == expected["ffn_removed"]
    assert result["perplexity"][c4]["pruned"] == pytest.approx(expected["ppl_c4"], rel=1e-4)
    dense = json.loads((shared / "golden/weight_pruning.json").read_text())["dense"]["ppl_c4"]
    assert result["perplexity"][c4]["dense"] == pytest.approx(dense, rel=1e-4)


# ALP ------------------------------------------------------------------------------------------------------------------

PRUNERS = {"magnitude": Magnitude, "wanda": Wanda, "ria": Ria, "sparsegpt": SparseGpt}
RUNS = [
    *((method, 0.5, "unstructured") for method in PRUNERS),
    *((method, 0.5, "2:4") for method in ("wanda", "sparsegpt")),
    *((method + alp, 0.7, "unstructured") for method in ("wanda", "ria", "sparsegpt") for alp in ("", "_alp")),
]


@pytest.fixture(scope="module")
def stories(shared) -> SimpleNamespace:
    """The small trained model, its text and what the reference code made of it."""
    tokenizer = load_tokenizer(ModelSource(str(shared / "models/stories260K")))
    c4 = load_corpus(str(shared / "data/c4"), "train")
    return SimpleNamespace(
        model=load_model(ModelSource(str(shared / "models/stories260K"), "float32")),
        tokenizer=tokenizer,
        windows=sampled_windows(c4, tokenizer, 32, 512, 0),
        gradient_windows=sampled_windows(c4, tokenizer, 10, 64, 0),
        c4=str(shared / "data/c4"),
        golden=json.loads((shared / "golden/weight_pruning.json").read_text()),
        masks=np.load(shared / "golden/weight_pruning_masks.npz"),
    )


def golden_run(stories, method: str, ratio: float, pattern: str) -> dict:
    wanted = (method, ratio, pattern)
    keys = ("method", "sparsity_ratio", "sparsity_type")
    (run,) = [run for run in stories.golden["runs"] if tuple(run[key] for key in keys) == wanted]
    return run


def test_all_golden_runs_are_tested(stories):
    assert len(RUNS) == len(stories.golden["runs"]) and all(golden_run(stories, *run) for run in RUNS)


@pytest.mark.parametrize(
    "gradient_type, key", [("l2", "layer_density"), ("l2_hundred_total", "layer_density_l2_hundred_total")]
)
def test_spread_densities_are_those_of_the_reference(stories, gradient_type, key):
    layers = connection_sensitivity(Decoder(stories.model), stories.gradient_windows, gradient_type)
    densities = spread_densities(importance(layers), [layer.layer.count for layer in layers], 0.7, 0.15)
    assert densities == pytest.approx(golden_run(stories, "wanda_alp", 0.7, "unstructured")[key], abs=1e-5)


def slow_unless(is_fast: bool, *values):
    return pytest.param(*values, marks=() if is_fast else pytest.mark.slow)


WITH_PERPLEXITY = [("wanda", 0.5, "2:4"), ("sparsegpt", 0.5, "unstructured"), ("sparsegpt", 0.5, "2:4")]


@pytest.mark.parametrize(
    "method, ratio, pattern, has_perplexity",
    [
        *((*run, False) for run in RUNS if run not in WITH_PERPLEXITY),
        *(slow_unless(run in WITH_PERPLEXITY, *run, True) for run in RUNS),
    ],
)
def test_masks_and_perplexity_are_those_of_the_reference(stories, method, ratio, pattern, has_perplexity):
    expected = golden_run(stories, method, ratio, pattern)
    decoder = Decoder(copy.deepcopy(stories.model))
    groups, pair = input_groups(decoder), parse_method(method)
    sparsities = [1 - density for density in expected.get("layer_density", [1 - ratio] * 5)]
    pruner = PRUNERS[pair.pruner](parse_pattern(pattern))
    prune_layers(decoder, groups, pruner, sparsities, stories.windows, Batcher(2))
    equal = total = 0
    for index, layer in enumerate(groups):
        for name, weight in (
            (n, m.weight) for group in layer for n, m in zip(group.names, group.matrices, strict=True)
        ):
            packed = stories.masks[f"{method}-{ratio}-{pattern.replace(':', 'x')}/{index}.{name}"]
            mask = torch.from_numpy(np.unpackbits(packed)[: weight.numel()]).bool().view_as(weight)
            equal += int(((weight == 0) == mask).sum())
            total += weight.numel()
    assert equal / total >= (0.995 if pair.pruner == "sparsegpt" else 0.999)
    zeros = count_zeros(decoder, groups)
    assert sum(z for z, _ in zeros) / total == pytest.approx(expected["sparsity"], abs=1e-4)
    if not has_perplexity:
        return
    c4 = evaluation_windows(load_corpus(stories.c4, "test"), stories.tokenizer, 512)
    found = perplexity(plan_window_losses(decoder, Plan(5), Batcher(2)), c4).value
    assert found == pytest.approx(expected["ppl_c4"], rel=0.02 if pair.pruner == "sparsegpt" else 0.005)


TEXTS = [("data/c4", "ppl_c4"), ("data/wikitext", "ppl_wikitext2")]


@pytest.mark.parametrize("text, key", [slow_unless(key == "ppl_c4", text, key) for text, key in TEXTS])
def test_the_command_gives_the_perplexities_of_the_reference(shared, stories, tmp_path, monkeypatch, text, key):
    """Gradients, densities and masks, by the flags alone; both methods in one table, where dense is measured once."""
    monkeypatch.chdir(tmp_path)
    text, methods = str(shared / text), ("sparsegpt_alp", "wanda")
    flags = ["--model", shared / "models/stories260K", "--calibration_dataset", shared / "data/c4", "--nsamples", 32]
    flags += ["--dtype", "float32", "--output_dir", "table", "--dataset", text, "--prune_method", *methods]
    assert run_alp(*flags, monkeypatch=monkeypatch) == 0
    lines = (tmp_path / "table/results.jsonl").read_text().splitlines()
    for method, result in zip(methods, (json.loads(line)["result"] for line in lines), strict=True):
        expected, found = golden_run(stories, method, 0.7, "unstructured"), result["perplexity"][text]
        assert result["prune_method"] == method
        assert found["dense"] == pytest.approx(stories.golden["dense"][key], rel=1e-4)
        assert found["pruned"] == pytest.approx(expected[key], rel=0.02 if method.startswith("sparsegpt") else 0.005)
        if method.endswith("_alp"):
            assert result["layer_density"] == pytest.approx(expected["layer_density"], abs=1e-3)
