"""Runs of many settings: a model is loaded once for all its cells, and a cell that is finished is not done again."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Generic, TypeVar

from lib.config.depth import DepthPruning
from lib.config.sources import labels, short_name
from lib.config.sparsity import SparsityPruning
from lib.errors import InputError, RunError, is_out_of_memory
from lib.reporting.console import Report
from lib.reporting.plots import plot_grid
from lib.reporting.tables import Entry, csv_table, entries, markdown
from lib.runtime.distributed import ALONE, Ranks
from lib.runtime.memory import free_memory
from lib.storage.atomic import whole_file
from lib.storage.results_jsonl import ResultsFile, canonical

Settings = TypeVar("Settings", DepthPruning, SparsityPruning)
Job = TypeVar("Job")
Result = TypeVar("Result")
Keep = Callable[[dict], object]
Cells = dict[str, Settings]  # by their keys as text


@dataclass(frozen=True)
class Grid(Generic[Settings, Job]):
    """A tool as a grid needs it."""

    across: str  # what the plots have below: `sparsity`, say
    check: Callable[[Sequence[Settings]], object]  # `InputError` for what is wrong with the cells of one model
    prepare: Callable[[Report, Sequence[Settings]], Job]  # loads what all cells of one model need
    run: Callable[[Report, Settings, Job, Keep], dict]  # one cell; as in result.json, which it gives to be kept


def run_grid(
    grid: Grid, cells: Sequence[Settings], folder: Path, overwrite: bool = False, ranks: Ranks = ALONE
) -> None:
    """Runs all cells that are not in the folder yet; writes tables and plots of all that are there then.

    With `overwrite` the first finished cell replaces what is there. Raises `InputError` before anything is run, and
    `RunError` at the end when cells failed: the others are done first. Of several `ranks` the first writes, and what
    fails in one of them ends the run, for the others could not know.
    """
    ledger, report = ResultsFile(folder, overwrite, ranks.is_first), Report(ranks.is_first)
    keyed: Cells = {}
    for cell in cells:
        keyed.setdefault(canonical(cell.key), cell)  # taken once: files may change while the grid runs
    left = ranks.agree(lambda: [key for key in keyed if ledger.find(key) is None])  # by what the first one has read
    missing = {key: keyed[key] for key in left}
    models = [dict(pairs) for _, pairs in groupby(missing.items(), key=lambda pair: pair[1].source.name)]
    for of_model in models:
        grid.check(list(of_model.values()))
    report.open(folder, resume=not overwrite)
    again = "the same command without --overwrite" if overwrite else "the same command"
    done = f", {len(keyed) - len(missing)} of them done before" if len(missing) < len(keyed) else ""
    report.print(f"Grid        {len(keyed)} cells{done}; finished ones are kept in {ledger.path}")
    failed: list[Exception] = []
    try:
        for of_model in models:
            failed += _run_model(grid, report, of_model, ledger, keyed, ranks)
            if failed and ranks.are_several:
                break
            free_memory()
    except KeyboardInterrupt as error:
        kept = sum(ledger.find(key) is not None for key in keyed)
        raise RunError(f"stopped; {kept} of {len(keyed)} cells are kept, and {again} goes on") from error
    if ranks.is_first:
        _write_plots(grid, report, _write_tables(report, keyed, ledger), folder)
    if failed:
        if len(failed) == len(missing) and isinstance(failed[0], InputError):
            raise failed[0]
        raise RunError(f"{len(failed)} of {len(keyed)} cells failed ({failed[0]}); {again} tries them again")


def _run_model(
    grid: Grid, report: Report, missing: Cells, ledger: ResultsFile, keyed: Cells, ranks: Ranks
) -> list[Exception]:
    """Runs the missing cells of one model; what went wrong, for each that failed."""
    name = next(iter(missing.values())).source.name
    report.print(f"Model       {name}: {len(missing)} cells")
    report.seconds = {}
    job = _tried(report, name, partial(grid.prepare, report, list(missing.values())))
    if isinstance(job, Exception):
        return [job] * len(missing)
    failed, shared = [], dict(report.seconds)
    for number, (key, cell) in enumerate(missing.items(), 1):
        report.seconds = dict(shared)
        what = f"  {number}/{len(missing)} {cell.label}"
        result = _tried(report, what.strip(), partial(grid.run, report, cell, job, partial(ledger.add, key)))
        if isinstance(result, Exception):
            failed.append(result)
            if ranks.are_several:
                break
            continue
        found = ", ".join(f"{short_name(text)} {list(p.values())[-1]:.2f}" for text, p in result["perplexity"].items())
        seconds = sum(report.seconds.values()) - sum(shared.values())
        report.print(f"{what}: {found} ({seconds:.0f} s)")
        if ranks.is_first:
            _write_tables(report, keyed, ledger)
    return failed


def _tried(report: Report, what: str, function: Callable[[], Result]) -> Result | Exception:
    """The result of a function, whose lines stand in the log only; or what went wrong, for the grid to go on.

    Raises errors that are no matter of model, text or memory.
    """
    try:
        with report.quietly():
            report.print()
            report.print(what)
            return function()
    except Exception as error:
        is_told = isinstance(error, InputError | RunError)
        if not is_told and not is_out_of_memory(error):
            raise
        kind = InputError if isinstance(error, InputError) else RunError
        found = kind(" ".join(str(error).split()) if is_told else "out of memory")
    free_memory()  # the frames of the error, and of its causes, are gone by now
    report.print(f"  failed: {what}: {found}")
    return found


def _write_tables(report: Report, keyed: Cells, ledger: ResultsFile) -> list[Entry]:
    """Writes the tables of what is finished, in the order of the cells, and under the names that they have now."""
    results = [_named(result, cell) for key, cell in keyed.items() if (result := ledger.find(key))]
    found = entries(results)
    for name, content in (("table.md", markdown(found)), ("table.csv", csv_table(found))):
        with whole_file(report.folder / name) as draft:
            draft.write_text(content, encoding="utf-8")
    return found


def _named(result: dict, cell: Settings) -> dict:
    """A result with the names of its model and texts as the cell gives them: a path may be written in many ways."""
    fields = ("perplexity", "perplexity_standard_error")
    texts = {field: dict(zip(cell.texts, result[field].values(), strict=True)) for field in fields}
    return {**result, "model": cell.source.name, **texts}


def _write_plots(grid: Grid, report: Report, found: Sequence[Entry], folder: Path) -> None:
    """A plot for each model and text, of all methods; says what was written."""
    report.print()
    report.print(markdown(found))
    report.print("Written")
    for name in ("table.md", "table.csv"):
        report.print(f"  table   {folder / name}")
    measured = [entry for entry in found if entry.metric == "perplexity"]
    models, texts = labels(entry.model for entry in measured), labels(entry.text for entry in measured)
    for model, text in dict.fromkeys((entry.model, entry.text) for entry in measured):
        here = [entry for entry in measured if (entry.model, entry.text) == (model, text)]
        names = f"{models[model]}-{texts[text]}" if model != text else models[model]
        path = folder / f"perplexity-{re.sub(r'[^A-Za-z0-9_.-]', '-', names)[-150:]}.png"
        dense = next(entry.value for entry in here if entry.is_dense)
        title = f"{models[model]}: perplexity on {texts[text]}"
        lines = _lines([entry for entry in here if not entry.is_dense])
        if lines and not plot_grid(path, lines, dense, grid.across, title):
            report.print("  plots   none: matplotlib is not installed (pip install matplotlib)")
            return
        if lines:
            report.print(f"  plot    {path}")


def _lines(found: Sequence[Entry]) -> dict[str, list[tuple[float, float]]]:
    """{method: [(share, perplexity), ...]}, each point the mean over the seeds of a setting; n:m apart."""
    by_point: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        name = f"{entry.method} {entry.setting}" if ":" in entry.setting else entry.method
        by_point.setdefault((name, entry.setting), []).append(entry)
    lines: dict[str, list[tuple[float, float]]] = {}
    for (name, _), of_point in by_point.items():
        point = (mean(entry.share for entry in of_point), mean(entry.value for entry in of_point))
        lines.setdefault(name, []).append(point)
    return lines
