"""The tables of a grid: `table.md` for reading, `table.csv` for processing. Does not import torch.

They hold no timings, so two runs of the same grid give equal tables; speeds are in the plots.
"""

import csv
import io
import statistics
from collections.abc import Iterable, Sequence

from lib.config.sources import labels
from lib.errors import first_line
from lib.reporting.entries import DISTANCES, Entry, entries
from lib.reporting.published import SOURCES
from lib.reporting.verdict import LEGEND, VERDICTS, verdict

_TITLES = {  # of the tables of a text, by metric
    "perplexity": "perplexity on {}",
    "kl_divergence": "KL divergence to the dense model on {}, in nats a token",
    "top1_agreement": "top-1 agreement with the dense model on {}, in percent",
}
_WORTH_TELLING = 0.005  # the tables show the removed share where it is off its target by this much


def check_result(result: dict) -> None:
    """Raises `ValueError` for what no run gives, which has no table."""
    try:
        found = entries([result])
        markdown(found)
        csv_table(found)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"no result of a run: {first_line(error)}") from error


# table.csv ------------------------------------------------------------------------------------------------------------

_COLUMNS = (
    *("model", "method", "setting", "share", "seed", "metric", "text", "value", "standard_error"),
    *("published", "difference", "source", "note", "above_lowest", "above_lowest_standard_error"),
)


def csv_table(found: Sequence[Entry]) -> str:
    """One row per entry."""
    out = io.StringIO()
    above = _above_lowest(found)
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for entry in found:
        figure = entry.figure
        digits = 6 if entry.metric in DISTANCES else 4
        error = "" if entry.standard_error is None else f"{entry.standard_error:.{digits}f}"
        row = [entry.model, entry.method, entry.setting, f"{entry.share:.6f}", entry.seed, entry.metric, entry.text]
        row += [f"{entry.value:.{digits}f}", error]
        if figure:
            row += [figure.value, f"{entry.value - figure.value:.4f}", SOURCES[figure.source], figure.note]
        row += [""] * (len(_COLUMNS) - 2 - len(row))
        row += ["" if number is None else f"{number:.6f}" for number in above.get(entry, (None, None))]
        writer.writerow(row)
    return out.getvalue()


# table.md -------------------------------------------------------------------------------------------------------------


def markdown(found: Sequence[Entry]) -> str:
    """Perplexity tables per text, tables of accuracies and flips per model, with published figures beside ours."""
    parts, models = [], labels(entry.model for entry in found)
    for text, label in labels(entry.text for entry in found if entry.metric == "perplexity").items():
        for metric, what in _TITLES.items():
            of_text = [entry for entry in found if (entry.metric, entry.text) == (metric, text)]
            parts += _text_tables(of_text, models, what.format(label))
    for model, name in models.items():
        for metric, title in _OF_TASKS.items():
            of_model = [entry for entry in found if (entry.metric, entry.model) == (metric, model)]
            parts += _task_tables(of_model, f"## {name}: {title}")
    return "\n\n".join([*parts, *_verdicts(found, models), *_legend(found)]) + "\n"


def _verdicts(found: Sequence[Entry], names: dict[str, str]) -> list[str]:
    """A line for each model: which of its cells are usable, damaged and broken on the worst text and seed."""
    worst: dict[tuple[str, str], dict[str, float]] = {}
    for entry in found:
        if entry.metric in DISTANCES:
            of_cell = worst.setdefault((entry.model, f"{entry.method} {entry.setting}"), {})
            choose = max if entry.metric == "kl_divergence" else min
            of_cell[entry.metric] = choose(of_cell.get(entry.metric, entry.value), entry.value)
    lines = []
    for model in _distinct(model for model, _ in worst):
        words = {cell: verdict(**values) for (of_model, cell), values in worst.items() if of_model == model}
        told = {word: ", ".join(cell for cell, own in words.items() if own == word) for word in VERDICTS}
        of_words = [f"{word.capitalize()}: {cells}." for word, cells in told.items() if cells]
        lines.append(" ".join([f"{names[model]}.", *of_words]))
    return ["## Verdicts", *lines, LEGEND] if lines else []


def _text_tables(found: Sequence[Entry], names: dict[str, str], what: str) -> list[str]:
    """The tables of one metric on one text: one per model, with a column per setting.

    Several models under a single setting share one table, with a column per model.
    """
    settings = _distinct(entry.setting for entry in found if not entry.is_dense)
    models = _distinct(entry.model for entry in found)
    if len(settings) <= 1 and len(models) > 1:
        columns = {names[model]: [entry for entry in found if entry.model == model] for model in models}
        return [f"## {what[0].upper()}{what[1:]}{f', {settings[0]}' if settings else ''}", _pivot(columns)]
    parts = []
    for model in models:
        of_model = [entry for entry in found if entry.model == model]
        heading = f"## {names[model]}: {what}{_dense_value(of_model)}"
        columns = {s: [entry for entry in of_model if entry.setting == s and not entry.is_dense] for s in settings}
        parts += [heading, *([_pivot(columns)] if settings else [])]
    return parts


def _dense_value(found: Sequence[Entry]) -> str:
    """The dense model's value, for a heading; empty where there is none."""
    dense = next((entry for entry in found if entry.is_dense), None)
    if dense is None:
        return ""
    error = "" if dense.standard_error is None else f" ± {dense.standard_error:.2f}"
    return f", dense {dense.value:.2f}{error}{_beside(dense)}"


_OF_TASKS = {
    "accuracy": "accuracy in percent",
    "flips": "answers that flipped between right and wrong, in percent",
}


def _task_tables(found: Sequence[Entry], title: str) -> list[str]:
    """The tables of one model and metric: one per setting, with a column per task."""
    tasks = _distinct(entry.text for entry in found)
    settings = _distinct(entry.setting for entry in found if not entry.is_dense) or ([""] if found else [])
    parts = []
    for setting in settings:
        chosen = [entry for entry in found if entry.setting == setting or entry.is_dense]
        at = f", {setting}" if setting else ""
        columns = {task: [entry for entry in chosen if entry.text == task] for task in tasks}
        parts += [f"{title}{at}", _pivot(columns)]
    return parts


def _pivot(columns: dict[str, list[Entry]]) -> str:
    """A table with one row per method; `-` marks a missing cell."""
    methods = _distinct(entry.method for column in columns.values() for entry in column)
    above = _above_lowest([entry for column in columns.values() for entry in column])
    rows = [["", *columns]]
    for method in methods:
        cells = [[entry for entry in column if entry.method == method] for column in columns.values()]
        rows.append([method, *(_cell(cell, above.get(cell[0]) if cell else None) for cell in cells)])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _cell(found: Sequence[Entry], above: tuple[float, float | None] | None = None) -> str:
    """The mean over seeds, its standard deviation, the removed share if it is off target, and the published figure.

    Beside a value of one seed is its standard error. A KL divergence also says how far it is `above` the lowest of the
    column.
    """
    if not found:
        return "-"
    unit = 100 if found[0].metric == "top1_agreement" else 1
    values = [entry.value * unit for entry in found]
    digits = {"kl_divergence": 3, "top1_agreement": 1}.get(found[0].metric, 2)
    text = f"{statistics.mean(values):.{digits}f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.{digits}f}"
    elif (error := found[0].standard_error) is not None:
        text += f" ± {error * unit:.{digits}f}"
    if any(map(_is_off, found)):
        text += f" ({statistics.mean(entry.share for entry in found):.1%})"
    if above and above[0]:
        text += f" [{above[0]:+.3f}{'' if above[1] is None else f' ± {above[1]:.3f}'}]"
    return text + _beside(found[0], statistics.mean(values))


def _above_lowest(found: Sequence[Entry]) -> dict[Entry, tuple[float, float | None]]:
    """By how much each KL divergence is above the lowest of its model, text and setting, with the standard error.

    The error is that of the paired differences over the same windows; None for one window. Seeds are averaged first.
    Columns whose models were measured on other windows, as memory allowed, have no differences.
    """
    columns: dict[tuple, dict[str, list[Entry]]] = {}
    for entry in found:
        if entry.metric == "kl_divergence":
            column = columns.setdefault((entry.model, entry.text, entry.setting), {})
            column.setdefault(entry.method, []).append(entry)
    above: dict[Entry, tuple[float, float | None]] = {}
    for column in columns.values():
        if len({len(entry.by_window) for seeds in column.values() for entry in seeds}) > 1:
            continue
        means = {
            method: [statistics.mean(values) for values in zip(*(entry.by_window for entry in seeds), strict=True)]
            for method, seeds in column.items()
        }
        lowest = min(means.values(), key=statistics.mean)
        for method, windows in means.items():
            differences = [own - other for own, other in zip(windows, lowest, strict=True)]
            count = len(differences)
            error = statistics.stdev(differences) / count**0.5 if count > 1 else None
            above |= dict.fromkeys(column[method], (statistics.mean(differences), error))
    return above


def _beside(entry: Entry, value: float | None = None) -> str:
    """The published figure, and the difference of ours from it."""
    if entry.figure is None:
        return ""
    return f" [{entry.figure.value:g}, {(entry.value if value is None else value) - entry.figure.value:+.2f}]"


def _is_off(entry: Entry) -> bool:
    """True when the removed share clearly misses its target; not for quantized models, as rounding adds zeros."""
    if entry.metric != "perplexity" or entry.method.endswith(" quantized") or not entry.setting.endswith("%"):
        return False
    return abs(entry.share - float(entry.setting.removesuffix("%")) / 100) >= _WORTH_TELLING


def _legend(found: Sequence[Entry]) -> list[str]:
    """Explains the symbols that the tables use, and names the sources of the published figures."""
    lines = []
    cells = [entry for entry in found if not entry.is_dense]
    over = {**dict.fromkeys(("perplexity", *DISTANCES), "windows"), "accuracy": "documents"}
    with_error = _distinct(over[entry.metric] for entry in found if entry.standard_error is not None)
    parts = [f"the standard error over {' or '.join(with_error)}"] if with_error else []
    if len({entry.seed for entry in cells}) > 1:
        parts = ["the standard deviation over seeds", *(f"beside what is dense {part}" for part in parts)]
    lines += [f"±: {', '.join(parts)}."] if parts else []
    if any(difference for difference, _ in _above_lowest(cells).values()):
        lines.append(
            "KL divergences in square brackets: how far above the lowest of the same model and setting, ± the standard "
            "error of that difference over the same windows."
        )
    if any(_is_off(entry) for entry in cells):
        lines.append("In brackets: the share that went, where it is not the one asked for.")
    figures = [entry.figure for entry in found if entry.figure]
    if figures:
        sources = "; ".join(SOURCES[source] for source in _distinct(figure.source for figure in figures))
        lines.append(f"[published, ours less that]: {sources}.")
        noted = _distinct(figure for figure in figures if figure.note)
        lines += [f"- {figure.model}, {figure.method}, {figure.text}: {figure.note}" for figure in noted]
    return ["\n".join(lines)] if lines else []


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))
