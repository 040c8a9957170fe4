"""Plots of a run's results. Matplotlib is optional, and no fault of it ends a run.

Each function returns None when it drew, else why there is no plot.
"""

import importlib.util
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec

from lib.errors import describe_failure, first_line
from lib.storage.atomic import atomic_file
from lib.storage.output_folder import PLOT_MARK

_BLUE, _YELLOW, _GREEN, _RED = "#4477aa", "#ddaa33", "#228833", "#bb5566"
_COLOURS = (_BLUE, _RED, _GREEN, _YELLOW, "#aa3377", "#66ccee")
_STROKES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_NO_MATPLOTLIB = "no plot: matplotlib is not installed (pip install matplotlib)"
Given = ParamSpec("Given")


class Point(NamedTuple):
    """A cell of a grid: the share that it removed, or its sparsity, its perplexity and the standard error of that.

    `speed`: so many times as fast as the dense model.
    """

    share: float
    value: float
    error: float | None = None
    speed: float | None = None


def _told(draw: Callable[Given, None]) -> Callable[Given, str | None]:
    """A function that draws, as one that returns why it could not."""

    @wraps(draw)
    def attempt(*args: Given.args, **options: Given.kwargs) -> str | None:
        try:
            if not has_matplotlib():
                return _NO_MATPLOTLIB
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of glyphs that the font lacks, values that have no logarithm
                draw(*args, **options)
        except (Exception, SystemExit) as error:  # a broken installation can raise anything
            return f"no plot: {describe_failure(error) or first_line(error)}"
        return None

    return attempt


@_told
def plot_removals(
    path: Path, bi_scores: Sequence[float], mha_removed: Sequence[int], ffn_removed: Sequence[int], title: str
) -> None:
    """Block Influence by layer, coloured by what was removed."""
    kinds: dict[str, tuple[str, Callable[[int], bool]]] = {
        "kept": (_BLUE, lambda layer: layer not in mha_removed and layer not in ffn_removed),
        "FFN removed": (_YELLOW, lambda layer: layer in ffn_removed and layer not in mha_removed),
        "attention removed": (_GREEN, lambda layer: layer in mha_removed and layer not in ffn_removed),
        "removed whole": (_RED, lambda layer: layer in mha_removed and layer in ffn_removed),
    }
    with _figure(path, len(bi_scores), 1, title) as (axes,):
        for label, (colour, is_kind) in kinds.items():
            layers = [layer for layer in range(len(bi_scores)) if is_kind(layer)]
            if layers:
                axes.bar(layers, [bi_scores[layer] for layer in layers], color=colour, label=label)
        axes.set(ylabel="Block Influence", yscale="log")
        axes.legend(frameon=False)


@_told
def plot_sensitivity(path: Path, importance: Sequence[float], title: str) -> None:
    """ALP's importance by layer."""
    with _figure(path, len(importance), 1, title) as (axes,):
        _importance_bars(axes, importance)


@_told
def plot_sparsity(
    path: Path, sparsity: Sequence[float], importance: Sequence[float] | None, target: float, title: str
) -> None:
    """Measured sparsity by layer, below the importance that set it, if any."""
    with _figure(path, len(sparsity), 2 if importance else 1, title) as rows:
        if importance:
            _importance_bars(rows[0], importance)
        rows[-1].bar(range(len(sparsity)), sparsity, color=_YELLOW)
        rows[-1].axhline(target, color=_RED, linewidth=1, label=f"target {target:g}")
        rows[-1].set(ylabel="sparsity", ylim=(0, 1))
        rows[-1].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)


@_told
def plot_grid(
    path: Path, lines: dict[str, list[Point]], dense: float, across: str, title: str, size: int | None = None
) -> None:
    """Perplexity against sparsity (or share removed), one line per method; of a single setting one dot per method.

    Where speeds are known, a second panel has them in place of the share. `size`, the bytes of the dense model, adds a
    scale of MiB. The colour shows the pruner; line style and marker show the allocator or pattern, so that grey tells
    them apart too. Bars are standard errors.
    """
    if all(len(points) == 1 for points in lines.values()):
        _dots(path, {name: points[0] for name, points in lines.items()}, dense, title)
        return
    has_speeds = all(point.speed for points in lines.values() for point in points)
    figure = _blank(11.0 if has_speeds else 7.5, 4.5)
    panels = figure.subplots(1, 1 + has_speeds, sharey=True, squeeze=False)[0]
    _lines(panels[0], {name: [(point.share, point) for point in points] for name, points in lines.items()}, dense)
    panels[0].xaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    panels[0].set(xlabel=across, ylabel="perplexity", yscale="log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].yaxis.set_minor_formatter("{x:g}")
    if size:
        whole = size / 2**20
        scale = panels[0].secondary_xaxis("top", (lambda share: whole * (1 - share), lambda mib: 1 - mib / whole))
        scale.set_xlabel("size of the weights, MiB")
    if has_speeds:
        by_speed = {name: [(point.speed or 0.0, point) for point in points] for name, points in lines.items()}
        _lines(panels[1], by_speed, dense)
        panels[1].set(xlabel="prefill speed, times that of the dense model")
        panels[1].xaxis.set_major_formatter("{x:g}")
    figure.suptitle(title, parse_math=False)
    panels[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small", handlelength=3)
    _save(figure, path)


def _lines(axes, lines: dict[str, list[tuple[float, Point]]], dense: float) -> None:
    """Draws perplexities against any quantity, as (quantity, point) by method, and the dense model's as a line."""
    from matplotlib.ticker import MaxNLocator

    for name, (colour, stroke, marker) in _styles(lines).items():
        quantities, points = zip(*sorted(lines[name], key=lambda pair: pair[0]), strict=True)
        axes.errorbar(
            quantities,
            [point.value for point in points],
            yerr=[point.error or 0.0 for point in points],
            linestyle=stroke,
            color=colour,
            marker=marker,
            markersize=5,
            elinewidth=0.8,
            label=name,
        )
    axes.axhline(dense, color="0.6", linewidth=1)
    axes.annotate("dense", (0, dense), xycoords=("axes fraction", "data"), color="0.4", va="bottom")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 5, 10]))
    axes.spines[["top", "right"]].set_visible(False)


def _dots(path: Path, points: dict[str, Point], dense: float, title: str) -> None:
    """Perplexities of methods in one setting, the lowest at the top, each with its share and speed."""
    figure = _blank(7.0, 1.3 + 0.35 * len(points))
    axes = figure.subplots()
    names, styles = sorted(points, key=lambda name: -points[name].value), _styles(points)
    for place, name in enumerate(names):
        point, (colour, _, marker) = points[name], styles[name]
        axes.errorbar(point.value, place, xerr=point.error or 0.0, color=colour, marker=marker, capsize=3)
    axes.axvline(dense, color="0.6", linewidth=1)
    axes.annotate("dense", (dense, 1), xycoords=("data", "axes fraction"), color="0.4", ha="center", va="bottom")
    axes.set_yticks(range(len(names)), [_label(name, points[name]) for name in names], parse_math=False)
    axes.set(xlabel="perplexity", ylim=(-0.6, len(names) - 0.4))
    axes.set_title(title, pad=16, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _label(name: str, point: Point) -> str:
    return f"{name}, {point.share:.1%}" + (f", {point.speed:.2f} times as fast" if point.speed else "")


def _styles(names: Iterable[str]) -> dict[str, tuple[str, Any, str]]:
    """{method: its colour, line style and marker}. The latter two tell allocators apart, or methods without any."""
    parts = {name: _split_method(name) for name in names}
    if len({allocator for _, allocator in parts.values()}) == 1:
        parts = {name: (pruner, pruner) for name, (pruner, _) in parts.items()}
    pruners, allocators = (list(dict.fromkeys(part[at] for part in parts.values())) for at in (0, 1))
    return {
        name: (
            _COLOURS[pruners.index(pruner) % len(_COLOURS)],
            _STROKES[allocators.index(allocator) % len(_STROKES)],
            _MARKERS[allocators.index(allocator) % len(_MARKERS)],
        )
        for name, (pruner, allocator) in parts.items()
    }


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _split_method(name: str) -> tuple[str, str]:
    """The pruner, and what follows it: wanda_alp -> (wanda, _alp)."""
    pruner = re.split("[_ ]", name, maxsplit=1)[0]
    return pruner, name[len(pruner) :]


def _importance_bars(axes, importance: Sequence[float]) -> None:
    axes.bar(range(len(importance)), importance, color=_BLUE)
    axes.set(ylabel="importance")


@contextmanager
def _figure(path: Path, layers: int, rows: int, title: str) -> Iterator[Sequence]:
    """Yields axes, one row above the other over the decoder layers; saves the figure when the block ends."""
    figure = _blank(max(5.0, 0.28 * layers + 2), 1.0 + 2.4 * rows)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    yield axes
    axes[0].set_title(title, loc="left", parse_math=False)
    axes[-1].set_xlabel("decoder layer")
    axes[-1].set_xticks(range(0, layers, max(1, layers // 20)))
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _blank(width: float, height: float):
    """An empty figure of that many inches, drawn in memory whatever the backend."""
    os.environ.pop("MPLBACKEND", None)  # a name that matplotlib does not know would fail its import
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a cache of fonts that cannot be kept
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure, path: Path) -> None:
    with atomic_file(path) as draft:
        figure.savefig(draft, format="png", dpi=150, metadata={"Software": PLOT_MARK})
