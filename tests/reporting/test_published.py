"""The published figures: that they are told where model, method and settings match, and only there."""

import re
import statistics
from collections import Counter

import pytest

import alp_prune
import ppllms
from lib.config.presets import ALP_PRESETS, DEPTH_PRESETS
from lib.config.tasks import ZERO_SHOT_TASKS
from lib.reporting.entries import entries
from lib.reporting.published import SOURCES, figures, find
from lib.reporting.tables import csv_table, markdown


def alp_result(**changes) -> dict:
    """A result of alp_prune.py with the settings of ALP's paper."""
    values = {"wikitext2": {"dense": 5.677, "pruned": 24.64}}
    result = {
        "tool": "alp_prune",
        "model": "Enoch/llama-7b-hf",
        "prune_method": "wanda_alp",
        "sparsity_ratio": 0.7,
        "sparsity_type": "unstructured",
        "sparsity": 0.7,
        "alpha": 0.15,
        "owl_m": 5.0,
        "a": 0.5,
        "percdamp": 0.01,
        "use_variant": False,
        "grad_nsamples": 10,
        "grad_type": "l2",
        "dataset": "c4",
        "nsamples": 128,
        "seqlen": 2048,
        "eval_stride": None,
        "seed": 0,
    }
    result |= changes
    values = result.setdefault("perplexity", values)
    result["perplexity_standard_error"] = {text: dict.fromkeys(found) for text, found in values.items()}
    return result | distances(values)


def tasks_of(names, error: float | None = None, flips: float | None = None, **stages: float) -> dict:
    """The `tasks` of a result in which all tasks have the same accuracy, by stage."""
    of_stages = {stage: {"right_to_wrong": flips, "wrong_to_right": 0.0, "total": flips} for stage in stages}
    del of_stages["dense"]
    return {
        "accuracy": {name: stages for name in names},
        "accuracy_standard_error": {name: dict.fromkeys(stages, error) for name in names},
        "flips": {name: of_stages for name in names} if flips is not None else {},
        "mean": {
            stage: {"accuracy": value, "standard_error": error, "flips": None if stage == "dense" else flips}
            for stage, value in stages.items()
        },
    }


def depth_result(method: str, target: float, actual: float, value: float, text="wikitext2") -> dict:
    return {
        "tool": "ppllms",
        "model": "/models/Llama-2-7b-hf",
        "method": method,
        "mha_removed": [1],
        "ffn_removed": [1],
        "parameters": {"total": 6_738_415_616, "target_rate": target, "actual_rate": actual},
        "dtype": "float16",
        "seqlen": 2048,
        "seed": 0,
        "perplexity": {text: {"dense": 5.47, "pruned": value}},
        "perplexity_standard_error": {text: {"dense": 0.1, "pruned": 0.2}},
        **distances({text: ["dense", "pruned"]}),
    }


def distances(texts, by_window=(0.1, 0.3, 0.2), agreement=0.9) -> dict:
    """The fields of a result about its distances to the dense model: the same for all texts and stages."""
    values = {
        "kl_divergence": statistics.mean(by_window),
        "kl_divergence_standard_error": 0.01,
        "kl_divergence_by_window": list(by_window),
        "top1_agreement": agreement,
        "top1_agreement_standard_error": 0.02,
    }
    return {
        name: {
            text: dict.fromkeys([stage for stage in stages if stage != "dense"], value)
            for text, stages in texts.items()
        }
        for name, value in values.items()
    }


def test_figures_are_of_known_sources_and_each_stands_once():
    keys = Counter((f.tool, f.model, f.method, f.rate, f.metric, f.text) for f in figures())
    assert len(keys) == len(figures()) > 100 and max(keys.values()) == 1
    assert {figure.source for figure in figures()} == set(SOURCES)
    assert all(figure.value > 0 for figure in figures())


def test_means_are_of_all_six_tasks():
    """ALP's paper prints the sum of the six divided by five; the note on the mean says what it prints."""
    accuracies = [f for f in figures() if (f.source, f.metric) == ("ALP", "accuracy")]
    methods = {f.method for f in accuracies}
    assert len(methods) == 7
    for method in methods:
        tasks = [f.value for f in accuracies if f.method == method and f.text != "mean"]
        (mean,) = [f for f in accuracies if f.method == method and f.text == "mean"]
        assert len(tasks) == 6 and mean.value == pytest.approx(sum(tasks) / 6, abs=0.0051)
        printed = float(re.search(r"divided by five: ([\d.]+)", mean.note)[1])
        assert printed == pytest.approx(sum(tasks) / 5, abs=0.0051)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, 24.14),
        ({"model": "/data/llama-7b"}, 24.14),
        ({"model": "meta-llama/Llama-2-7b-hf"}, 29.18),
        ({"model": "meta-llama/Llama-2-7b-hf", "prune_method": "wanda_dlp"}, 22.79),
        ({"model": "facebook/opt-6.7b", "prune_method": "ria", "alpha": None}, 107.90),
        ({"prune_method": "wanda_owl", "alpha": 0.08}, 24.46),
        ({"prune_method": "wanda_owl"}, None),
        ({"prune_method": "magnitude_alp"}, None),
        ({"model": "Enoch/llama-7b-hf-tuned"}, None),
        ({"sparsity_ratio": 0.6}, None),
        ({"sparsity_type": "4:8"}, None),
        ({"seqlen": 4096}, None),
        ({"eval_stride": 512}, None),
        ({"eval_windows": 16}, None),
        ({"nsamples": 64}, None),
        ({"alpha": 0.1}, None),
        ({"quantization": "4 bits"}, None),
        ({"grad_type": "l2_hundred_total"}, 24.14),
        ({"grad_type": "l1"}, None),
        ({"grad_nsamples": 5}, None),
        ({"dataset": "wikitext2"}, None),
        ({"dataset": "/data/c4"}, 24.14),
        ({"use_variant": True}, None),
        ({"prune_method": "wanda_owl", "alpha": 0.08, "owl_m": 7.0}, None),
        ({"prune_method": "ria", "alpha": None, "a": 0.9}, None),
        ({"prune_method": "sparsegpt", "alpha": None, "percdamp": 5.0}, None),
    ],
)
def test_a_figure_is_told_where_everything_matches(changes, expected):
    figure = find(alp_result(**changes), "perplexity", "wikitext2")
    assert (figure and figure.value) == expected


def test_a_figure_is_of_its_text():
    assert find(alp_result(), "perplexity", "/data/wikitext").value == 24.14
    assert find(alp_result(), "perplexity", "c4") is None
    assert find(alp_result(), "perplexity", "wikitext2", is_dense=True).value == 5.68


@pytest.mark.parametrize(
    "method, target, actual, text, expected",
    [
        ("shortgpt", 0.22, 0.2102, "wikitext2", 18.45),
        ("blockpruner", 0.22, 0.2203, "wikitext2", 11.51),
        ("sleb", 0.2, 0.2102, "c4", 12.32),
        ("sleb", 0.2, 0.2102, "wikitext2", None),
        ("shortgpt", 0.25, 0.2402, "wikitext2", None),
        ("ppllms", 0.22, 0.2102, "wikitext2", None),
    ],
)
def test_depth_is_matched_by_the_share_aimed_at_or_removed(method, target, actual, text, expected):
    figure = find(depth_result(method, target, actual, 20.0, text), "perplexity", text)
    assert (figure and figure.value) == expected


def test_tables_show_the_figure_and_the_difference():
    tasks = tasks_of(ZERO_SHOT_TASKS, dense=70.0, pruned=60.0)
    found = entries([alp_result(), alp_result(prune_method="wanda", alpha=None, tasks=tasks)])
    table = markdown(found)
    assert "dense 5.68 [5.68, -0.00]" in table and "| wanda_alp | 24.64 [24.14, +0.50] |" in table
    assert "| wanda | 60.00 [57.92, +2.08] | 60.00 [57.76, +2.24] |" in table and "60.00 [38.52, +21.48] |" in table
    assert SOURCES["ALP"] in table and "LLaMA-1 7B, wanda, mean: the mean of the six" in table
    fewer = tasks_of(["boolq", "rte"], dense=70.0, pruned=65.0)
    table = markdown(entries([alp_result(prune_method="wanda", alpha=None, tasks=fewer)]))
    assert "| wanda | 65.00 [57.92, +7.08] | 65.00 [57.76, +7.24] | 65.00 |" in table
    (row,) = [line for line in csv_table(found).splitlines() if ",wanda_alp," in line and ",perplexity," in line]
    assert row.startswith("Enoch/llama-7b-hf,wanda_alp,70%,0.700000,0,perplexity,wikitext2,24.6400,,24.14,0.5000,")


def test_a_quantized_model_is_told_as_such():
    found = {"wikitext2": {"dense": 5.7, "pruned": 5.7, "quantized": 5.9}}
    tasks = tasks_of(["boolq"], dense=70.0, pruned=70.0, quantized=65.0)
    changes = {"quantization": "4 bits", "quantized_sparsity": 0.1, "tasks": tasks, "alpha": None}
    result = alp_result(prune_method="dense", sparsity_ratio=0.0, sparsity=0.0, perplexity=found, **changes)
    table = markdown(entries([result]))
    assert "| dense quantized | 5.90 |" in table and "| dense quantized | 65.00 | 65.00 |" in table


def test_tables_have_accuracies_of_every_stage_with_their_errors_and_flips():
    result = depth_result("sleb", 0.25, 0.2502, 9.0)
    result["tasks"] = tasks_of(["boolq", "gsm8k"], error=1.5, flips=12.5, dense=70.0, pruned=50.0, compensated=60.0)
    for stages in result["perplexity"].values():
        stages["compensated"] = 8.0
    for errors in result["perplexity_standard_error"].values():
        errors["compensated"] = 0.1
    table, rows = markdown(entries([result])), csv_table(entries([result])).splitlines()
    (_, accuracy), (_, flips) = re.findall(r"## .*(accuracy|flipped).*, 25%\n\n((?:\|.*\n)+)", table)
    assert accuracy.splitlines()[0] == "|  | boolq | gsm8k | mean |"
    assert "| dense | 70.00 ± 1.50 | 70.00 ± 1.50 | 70.00 ± 1.50 |" in accuracy
    assert "| sleb | 50.00 ± 1.50 |" in accuracy and "| sleb compensated | 60.00 ± 1.50 |" in accuracy
    assert "| sleb | 12.50 | 12.50 | 12.50 |" in flips and "dense" not in flips
    assert "±: the standard error over windows or documents." in table
    model = "/models/Llama-2-7b-hf"
    assert f"{model},dense,,0.000000,0,accuracy,gsm8k,70.0000,1.5000,,,,,," in rows
    assert f"{model},sleb,25%,0.250200,0,flips,mean,12.5000,,,,,,," in rows


def test_tables_of_depth_tell_what_went_and_what_is_published():
    table = markdown(entries([depth_result("shortgpt", 0.22, 0.2102, 20.0), depth_result("sleb", 0.25, 0.2502, 9.0)]))
    assert "dense 5.47 ± 0.10 [5.47, +0.00]" in table
    assert "| shortgpt | 20.00 ± 0.20 (21.0%) [18.45, +1.55] | - |" in table and "| sleb | - | 9.00 ± 0.20 |" in table
    assert "the share that went" in table and "arXiv:2406.10594" in table


def test_seeds_are_averaged_and_their_figure_is_held_against_the_mean():
    results = [
        alp_result(seed=seed, perplexity={"wikitext2": {"dense": 5.7, "pruned": 24.0 + seed}}) for seed in (0, 1)
    ]
    table = markdown(entries(results))
    assert "| wanda_alp | 24.50 ± 0.71 [24.14, +0.36] |" in table and "standard deviation over seeds" in table


def test_a_table_without_figures_tells_of_none():
    table = markdown(entries([alp_result(model="demo")]))
    assert "[" not in table and "published" not in table and "brackets" not in table


@pytest.mark.parametrize("name", ALP_PRESETS)
def test_presets_of_weights_are_whole_tables(name):
    args = alp_prune.parse(["--preset", name])
    assert ALP_PRESETS[name].items() <= vars(args).items()
    found = [(one["source"].name, one["method"].name, one["sparsity_ratio"]) for one in alp_prune.cells(args)]
    assert len(set(found)) == len(found) == {"alp-table2": 91, "alp-table4": 7, "demo": 75}[name]
    changed = alp_prune.parse(["--preset", name, "--model", "mine", "--nsamples", "3"])
    assert (changed.model, changed.nsamples) == (["mine"], 3) and changed.prune_method == args.prune_method


def test_the_presets_of_papers_cover_their_figures():
    """Every published figure of ALP's table, with OWL's and DLP's, belongs to a cell of the preset."""
    for preset, metric in (("alp-table2", "perplexity"), ("alp-table4", "accuracy")):
        told = set()
        args = alp_prune.parse(["--preset", preset])
        for one in alp_prune.cells(args):
            result = alp_result(
                model=one["source"].name, prune_method=one["method"].name, alpha=one["alpha"] or None, nsamples=128
            )
            result["tasks"] = tasks_of(ZERO_SHOT_TASKS, dense=50.0)
            texts = [*args.dataset] if metric == "perplexity" else [*args.tasks, "mean"]
            told |= {find(result, metric, text, is_dense=one["method"].name == "dense") for text in texts}
        wanted = {f for f in figures() if (f.tool, f.metric) == ("alp_prune", metric)}
        assert told - {None} == wanted


@pytest.mark.parametrize("name", DEPTH_PRESETS)
def test_presets_of_depth_are_whole_tables(name):
    args = ppllms.parse(["--preset", name])
    assert DEPTH_PRESETS[name].items() <= vars(args).items()
    assert len(ppllms.cells(args)) == {"ppllms-25": 2 * 6 * 3, "demo": 6 * 3}[name]
    assert ppllms.parse(["--preset", name, "--prune_rate", "0.4"]).prune_rate == [0.4]


def test_a_table_says_how_far_a_divergence_is_above_the_lowest_of_its_column():
    """By hand: the windows of wanda are 0.1, 0.1 and 0.4 above those of wanda_alp; their standard error is 0.1."""
    results = [
        alp_result() | distances({"wikitext2": ["pruned"]}, (0.1, 0.3, 0.2)),
        alp_result(prune_method="wanda") | distances({"wikitext2": ["pruned"]}, (0.2, 0.4, 0.6), 0.5),
    ]
    found = entries(results)
    table = markdown(found)
    assert "KL divergence to the dense model on wikitext2, in nats a token\n" in table
    assert "| wanda_alp | 0.200 ± 0.010 |" in table and "| wanda | 0.400 ± 0.010 [+0.200 ± 0.100] |" in table
    assert "| wanda_alp | 90.0 ± 2.0 |" in table and "| wanda | 50.0 ± 2.0 |" in table
    assert "llama-7b-hf. Usable: wanda_alp 70%. Broken: wanda 70%." in table
    (row,) = [line for line in csv_table(found).splitlines() if ",wanda," in line and ",kl_divergence," in line]
    assert ",0.400000," in row and row.endswith(",0.200000,0.100000")


def test_models_that_were_measured_on_other_windows_are_not_paired():
    """Memory decides on how many windows a distance is measured, and a grid may go on where there is less of it."""
    results = [
        alp_result() | distances({"wikitext2": ["pruned"]}, (0.1, 0.3, 0.2)),
        alp_result(prune_method="wanda") | distances({"wikitext2": ["pruned"]}, (0.2, 0.4)),
    ]
    found = entries(results)
    assert "| wanda | 0.300 ± 0.010 |" in markdown(found) and "brackets" not in markdown(found)
    assert len(csv_table(found).splitlines()) == 1 + len(found)
