"""All numbers that results hold, one entry each: what tables and plots are made of. Does not import torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lib.reporting.published import Figure, find

DENSE_ROW = "dense"
DISTANCES = ("kl_divergence", "top1_agreement")  # metrics of the distance to the dense model


@dataclass(frozen=True)
class Entry:
    """One number of one cell: on a text a perplexity or a distance; on a task an accuracy, or its flips, in percent."""

    model: str
    method: str
    setting: str  # its column: `50%`, `2:4`, `2 MHA, 4 FFN`; empty for a dense model
    share: float  # measured share of removed parameters or of zero weights
    seed: int
    metric: str
    text: str
    value: float
    standard_error: float | None
    figure: Figure | None = None
    by_window: tuple[float, ...] = ()  # of a KL divergence
    speed: float | None = None  # of the pruned model's prefill: so many times that of the dense one
    dense_bytes: int | None = None  # size of the dense model's weights, where pruning makes it smaller

    @property
    def is_dense(self) -> bool:
        return self.method == DENSE_ROW


def entries(results: Sequence[dict]) -> list[Entry]:
    """All numbers of the results (the contents of result.json), in order; each dense model once, before its cells."""
    found: dict[tuple, Entry] = {}
    for result in results:
        for entry in (*_dense_entries(result), *_cell_entries(result)):
            found.setdefault((entry.model, entry.method, entry.setting, entry.seed, entry.metric, entry.text), entry)
    return list(found.values())


def _dense_entries(result: dict) -> Iterable[Entry]:
    for metric, text, stage, value, error in _figures(result):
        if stage == DENSE_ROW:
            figure = find(result, metric, text, is_dense=True)
            yield Entry(result["model"], DENSE_ROW, "", 0.0, 0, metric, text, value, error, figure)


def _figures(result: dict) -> Iterable[tuple[str, str, str, float, float | None]]:
    """(metric, text or task, stage, value, standard error) of all that a result measured."""
    for text, values in result["perplexity"].items():
        for stage, value in values.items():
            yield "perplexity", text, stage, value, result["perplexity_standard_error"][text][stage]
    for metric in DISTANCES:
        for text, values in result[metric].items():
            for stage, value in values.items():
                yield metric, text, stage, value, result[f"{metric}_standard_error"][text][stage]
    if tasks := result.get("tasks"):
        for task, values in tasks["accuracy"].items():
            for stage, value in values.items():
                yield "accuracy", task, stage, value, tasks["accuracy_standard_error"][task][stage]
        for stage, mean in tasks["mean"].items():
            yield "accuracy", "mean", stage, mean["accuracy"], mean["standard_error"]
        for task, values in tasks["flips"].items():
            for stage, flips in values.items():
                yield "flips", task, stage, flips["total"], None
        for stage, mean in tasks["mean"].items():
            if mean["flips"] is not None:
                yield "flips", "mean", stage, mean["flips"], None


def _cell_entries(result: dict) -> Iterable[Entry]:
    is_alp = result["tool"] == "alp_prune"
    method = result["prune_method" if is_alp else "method"]
    if is_alp:
        is_structured = result["sparsity_type"] != "unstructured"
        setting = result["sparsity_type"] if is_structured else _percent(result["sparsity_ratio"])
    else:
        target = result["parameters"]["target_rate"]
        counts = f"{len(result['mha_removed'])} MHA, {len(result['ffn_removed'])} FFN"
        setting = counts if target is None else _percent(target)
    speed, size = _speed_and_size(result)
    for metric, text, stage, value, error in _figures(result):
        if stage == DENSE_ROW or (method, stage) == (DENSE_ROW, "pruned"):
            continue
        share = result["sparsity" if stage == "pruned" else "quantized_sparsity"] if is_alp else None
        share = result["parameters"]["actual_rate"] if share is None else share
        figure = None if stage == "compensated" else find(result, metric, text)
        name, model, seed = method if stage == "pruned" else f"{method} {stage}", result["model"], result["seed"]
        windows = tuple(result["kl_divergence_by_window"][text][stage]) if metric == "kl_divergence" else ()
        yield Entry(model, name, setting, share, seed, metric, text, value, error, figure, windows, speed, size)


def _speed_and_size(result: dict) -> tuple[float | None, int | None]:
    """How many times as fast the pruned model's prefill is, and the bytes of the dense one; None where unknown."""
    if result["tool"] != "ppllms":
        return None, None
    measured = result.get("tokens_per_second")
    bytes_each = 2 if "16" in result["dtype"] else 4
    return measured and measured["pruned"] / measured["dense"], result["parameters"]["total"] * bytes_each


def _percent(share: float) -> str:
    return f"{100 * share:g}%"
