"""A grid: runs of many settings. A model is loaded once for all its cells, and finished cells are not run again."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from lib.config.snapshot import Snapshot
from lib.config.sources import labels, short_name
from lib.errors import InputError, InputsChanged, RunError, is_out_of_memory, one_line
from lib.evaluation.distance import FIELDS
from lib.files import canonical
from lib.models.loading import load_config
from lib.reporting.console import Report
from lib.reporting.entries import Entry, entries
from lib.reporting.plots import Point, plot_grid
from lib.reporting.tables import check_result, csv_table, markdown
from lib.runs.single import Run, run_cell
from lib.runtime.device import resolve_device
from lib.runtime.distributed import join
from lib.runtime.memory import release_memory
from lib.runtime.setup import set_up
from lib.storage import output_folder
from lib.storage.atomic import atomic_file
from lib.storage.output_folder import CSV, GRID_PLOT, TABLE
from lib.storage.results_jsonl import ResultsFile
from lib.version import code_version

Result = TypeVar("Result")
Cells = dict[str, Any]  # settings of runs, by their keys as text


def run_grid(kind: type[Run], cells: Sequence[Any], folder: Path, overwrite: bool = False) -> None:
    """Runs all cells that are not in the folder yet; writes tables and plots of all finished cells.

    With `overwrite` the first finished cell replaces what is there. Raises `InputError` before anything is run, and
    `RunError` at the end when cells failed: the others are done first. The first of several processes writes, and a
    failure in one process ends the run, since the others cannot know of it.
    """
    set_up()
    _GridRun(kind, cells, folder, overwrite).run()


class _GridRun:
    """One call of `run_grid`: what its steps share."""

    def __init__(self, kind: type[Run], cells: Sequence[Any], folder: Path, overwrite: bool):
        self.kind, self.folder, self.overwrite = kind, folder, overwrite
        self.ranks = join(resolve_device(cells[0].source.device))
        self.results, self.report = ResultsFile(folder, overwrite, self.ranks.is_first), Report(self.ranks.is_first)
        self.cells: Cells = {}
        inputs = [one for cell in cells for one in cell.inputs]
        code_version()
        snapshot = Snapshot.take(inputs, self.ranks.agree, self.report.print)
        for cell in (replace(cell, snapshot=snapshot) for cell in cells):
            self.cells.setdefault(canonical(cell.key), cell)
        for result in (found for key in self.cells if (found := self.results.find(key)) is not None):
            try:
                check_result(result)
            except ValueError as error:
                raise InputError(f"{self.results.path}: {error}; move it away, or name another --output_dir") from error

    def run(self) -> None:
        """Runs the missing cells, model by model. Raises as `run_grid` does."""
        report = self.report
        # Decided by the first process, so that all processes agree.
        left = self.ranks.agree(lambda: [key for key in self.cells if self.results.find(key) is None])
        missing = {key: self.cells[key] for key in left}
        models = [dict(pairs) for _, pairs in groupby(missing.items(), key=lambda pair: pair[1].source.name)]
        for of_model in models:
            cells = list(of_model.values())
            self.kind.check_config(cells, load_config(cells[0].source))
        if report.is_first:
            output_folder.claim(self.folder, "grid")
        report.open(self.folder)
        again = "the same command without --overwrite" if self.overwrite else "the same command"
        count = len(self.cells)
        done = f", {count - len(missing)} of them done before" if len(missing) < count else ""
        report.print(f"Grid        {count} cells{done}; finished ones are kept in {self.results.path}")
        if stale := self._count_of_other_code(missing):
            report.print(f"            {stale} finished cells there are of other code, and are run again")
        failed: list[Exception] = []
        try:
            for of_model in models:
                failed += self._run_model(of_model)
                if failed and self.ranks.are_several:
                    break
                release_memory()
        except (KeyboardInterrupt, InputsChanged) as error:
            kept = sum(self.results.find(key) is not None for key in self.cells)
            why = "stopped" if isinstance(error, KeyboardInterrupt) else str(error)
            raise RunError(f"{why}; {kept} of {count} cells are kept, and {again} goes on") from error
        if self.ranks.is_first and any(self.results.find(key) for key in self.cells):
            self._write_plots(self._write_tables())
        if failed:
            if len(failed) == len(missing) and isinstance(failed[0], InputError):
                raise failed[0]
            raise RunError(f"{len(failed)} of {count} cells failed ({failed[0]}); {again} tries them again")

    def _count_of_other_code(self, missing: Cells) -> int:
        """How many of the missing cells are finished but for the code that computed them."""
        return len({_but_for_code(key) for key in missing} & {_but_for_code(key) for key in self.results.keys})

    def _run_model(self, missing: Cells) -> list[Exception]:
        """Runs the missing cells of one model; returns the errors of those that failed."""
        name, report = next(iter(missing.values())).source.name, self.report
        report.print(f"Model       {name}: {len(missing)} cells")
        report.seconds = {}
        workspace = self._attempt(name, partial(self.kind.load, report, list(missing.values()), self.ranks))
        if isinstance(workspace, Exception):
            return [workspace] * len(missing)
        failed: list[Exception] = []
        shared = dict(report.seconds)
        for number, (key, cell) in enumerate(missing.items(), 1):
            report.seconds = dict(shared)
            what = f"  {number}/{len(missing)} {cell.label}"
            keep = partial(self.results.add, key)
            result = self._attempt(what.strip(), partial(run_cell, self.kind, report, cell, workspace, keep))
            if isinstance(result, Exception):
                failed.append(result)
                if self.ranks.are_several:
                    break
                continue
            measured = result["perplexity"].items()
            found = ", ".join(f"{short_name(text)} {list(stages.values())[-1]:.2f}" for text, stages in measured)
            if mean := result.get("tasks", {}).get("mean"):
                found += f", accuracy {list(mean.values())[-1]['accuracy']:.2f}"
            seconds = sum(report.seconds.values()) - sum(shared.values())
            report.print(f"{what}: {found} ({seconds:.0f} s)")
            if self.ranks.is_first:
                self._write_tables()
        return failed

    def _attempt(self, what: str, function: Callable[[], Result]) -> Result | Exception:
        """The result of a function, or its error when the grid can continue; what it prints goes to the log only.

        Raises errors that do not come from the model, the text or too little memory.
        """
        try:
            with self.report.quietly():
                self.report.print()
                self.report.print(what)
                return function()
        except InputsChanged:
            raise
        except Exception as error:
            is_ours = isinstance(error, InputError | RunError)
            if not is_ours and not is_out_of_memory(error):
                raise
            kind = InputError if isinstance(error, InputError) else RunError
            found = kind(one_line(str(error)) if is_ours else "out of memory")
        release_memory()  # the traceback, which holds tensors, is gone by now
        self.report.print(f"  failed: {what}: {found}")
        return found

    def _write_tables(self) -> list[Entry]:
        """Writes the tables of all finished cells, in the order of the cells and under their present names."""
        results = [_named(result, cell) for key, cell in self.cells.items() if (result := self.results.find(key))]
        found = entries(results)
        for name, content in ((TABLE, markdown(found)), (CSV, csv_table(found))):
            with atomic_file(self.folder / name) as draft:
                draft.write_text(content, encoding="utf-8")
        return found

    def _write_plots(self, found: Sequence[Entry]) -> None:
        """Draws a plot of all methods for each model and text; prints the tables and which files were written."""
        report, folder = self.report, self.folder
        report.print()
        report.print(markdown(found))
        report.print("Written")
        for name in (TABLE, CSV):
            report.print(f"  table   {folder / name}")
        measured = [entry for entry in found if entry.metric == "perplexity"]
        models, texts = labels(entry.model for entry in measured), labels(entry.text for entry in measured)
        for model, text in dict.fromkeys((entry.model, entry.text) for entry in measured):
            here = [entry for entry in measured if (entry.model, entry.text) == (model, text)]
            names = f"{models[model]}-{texts[text]}" if model != text else models[model]
            path = folder / GRID_PLOT.format(re.sub(r"[^A-Za-z0-9_.-]", "-", names)[-150:])
            dense = next(entry.value for entry in here if entry.is_dense)
            title = f"{models[model]}: perplexity on {texts[text]}"
            lines = _lines([entry for entry in here if not entry.is_dense])
            size = here[-1].dense_bytes
            if lines and (problem := plot_grid(path, lines, dense, self.kind.x_axis, title, size)):
                report.print(f"  plots   {problem}")
                return
            if lines:
                report.print(f"  plot    {path}")


def _but_for_code(key: str) -> str:
    return canonical({name: value for name, value in json.loads(key).items() if name != "code"})


def _named(result: dict, cell: Any) -> dict:
    """A result with model and texts as the cell names them now: a path can be written in many ways."""
    texts = {field: dict(zip(cell.texts, result[field].values(), strict=True)) for field in FIELDS}
    return {**result, "model": cell.source.name, **texts}


def _lines(found: Sequence[Entry]) -> dict[str, list[Point]]:
    """{method: its points}: each is the mean over seeds; N:M patterns are lines of their own."""
    by_point: dict[tuple[str, str], list[Entry]] = {}
    for entry in found:
        name = f"{entry.method} {entry.setting}" if ":" in entry.setting else entry.method
        by_point.setdefault((name, entry.setting), []).append(entry)
    lines: dict[str, list[Point]] = {}
    for (name, _), of_point in by_point.items():
        errors = [entry.standard_error for entry in of_point if entry.standard_error is not None]
        speeds = [entry.speed for entry in of_point if entry.speed is not None]
        share, value = mean(entry.share for entry in of_point), mean(entry.value for entry in of_point)
        point = Point(share, value, mean(errors) if errors else None, mean(speeds) if speeds else None)
        lines.setdefault(name, []).append(point)
    return lines
