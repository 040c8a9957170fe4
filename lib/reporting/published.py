"""Published figures to compare results with; `published.csv` lists them with their sources."""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lib.config.methods import parse_method
from lib.config.sources import short_name
from lib.config.tasks import ZERO_SHOT_TASKS

SOURCES = {
    "ALP": "ALP: Adaptive Layerwise Pruning in Large Language Models, tables of results",
    "DLP": "the authors' README of DLP (arXiv:2505.23807)",
    "BlockPruner": "BlockPruner (arXiv:2406.10594), table of results",
    "SLEB": "SLEB (arXiv:2402.09025), table of results",
}
_MODELS = {  # the last parts of their hub ids
    "LLaMA-1 7B": ("llama-7b-hf", "llama-7b"),
    "LLaMA-1 13B": ("llama-13b-hf", "llama-13b"),
    "LLaMA-2 7B": ("llama-2-7b-hf", "llama-2-7b"),
    "LLaMA-2 13B": ("llama-2-13b-hf", "llama-2-13b"),
    "LLaMA-3 8B": ("meta-llama-3-8b", "llama-3-8b"),
    "OPT 6.7B": ("opt-6.7b",),
    "OPT 13B": ("opt-13b",),
}
_TEXTS = {
    "wikitext2": ("wikitext2", "wikitext", "wikitext-2-raw-v1"),
    "c4": ("c4",),
}
_SEQLEN, _NSAMPLES, _GRADIENTS = 2048, 128, 10
_NEAR = 0.005  # rates that differ by less count as the same setting


@dataclass(frozen=True)
class Figure:
    """A published figure: `value` is a perplexity on `text`, or an accuracy in percent on a task or their mean.

    `rate` is the sparsity, or the share of removed parameters.
    """

    source: str
    tool: str
    model: str
    method: str
    rate: float
    metric: str
    text: str
    value: float
    note: str


@cache
def figures() -> tuple[Figure, ...]:
    with (Path(__file__).parent / "published.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(Figure(rate=float(row.pop("rate")), value=float(row.pop("value")), **row) for row in rows)


def find(result: dict, metric: str, text: str, is_dense: bool = False) -> Figure | None:
    """The published figure for a perplexity or accuracy of a result.json, or of its dense model; None if there is none.

    Model, method, rate and text must match, and the evaluation must use all adjacent windows of 2048 tokens. ALP's
    tables also require the paper's settings: 128 calibration samples of C4, 10 for the gradients, the default
    parameters of each method, and no quantization. In the other tables, each method has its own calibration set. A mean
    accuracy must cover the six tasks of the paper.
    """
    rates = [0.0] if is_dense else _rates(result)
    is_part = result.get("eval_stride") or result.get("eval_windows")
    if result["seqlen"] != _SEQLEN or is_part or not (is_dense or _is_usual(result)):
        return None
    if (metric, text) == ("accuracy", "mean") and set(result["tasks"]["accuracy"]) != set(ZERO_SHOT_TASKS):
        return None
    method = "dense" if is_dense else _method(result)
    for figure in figures():
        if (
            (figure.tool, figure.method, figure.metric) == (result["tool"], method, metric)
            and short_name(result["model"]).lower() in _MODELS[figure.model]
            and (figure.text == text or short_name(text).lower() in _TEXTS.get(figure.text, ()))
            and any(abs(rate - figure.rate) < _NEAR for rate in rates)
        ):
            return figure
    return None


def _method(result: dict) -> str:
    return result["prune_method"] if result["tool"] == "alp_prune" else result["method"]


def _rates(result: dict) -> list[float]:
    """The rates that a result may be listed under: some papers report the target rate, others the actual one."""
    if result["tool"] == "alp_prune":
        return [result["sparsity_ratio"]]
    rates = result["parameters"]
    return [rate for rate in (rates["target_rate"], rates["actual_rate"]) if rate is not None]


def _is_usual(result: dict) -> bool:
    """True when the settings are those of ALP's paper; the other tables give no settings to compare."""
    if result["tool"] == "ppllms":
        return True
    method = parse_method(result["prune_method"])
    usual = {**method.pruning.flags, **(method.allocation.flags if method.allocation else {})}
    return (
        result["sparsity_type"] == "unstructured"
        and result["nsamples"] == _NSAMPLES
        and short_name(result["dataset"]).lower() in _TEXTS["c4"]
        and all(result[flag] in (None, value) for flag, value in usual.items())
        and result["grad_nsamples"] in (None, _GRADIENTS)
        and result["grad_type"] != "l1"
        and "quantization" not in result
    )
