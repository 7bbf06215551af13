"""Plots of a run as SVG that stands inside a page and takes the page's colours, light or dark.

Matplotlib draws with placeholder colours; each becomes a CSS variable: ``var(--ink)``,
``var(--muted)``, ``var(--grid)`` and ``var(--c0)`` … for series, which the page defines.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

NUM_COLOURS = 6
"""Series colours a page defines; later series repeat them with dashes."""

MAX_POINTS = 200
"""Points of a line; of more values, means of neighbours are drawn."""

AXES = {
    "gradients": "gradients",
    "updates": "updates",
    "seconds": "time (s)",
}
"""What metrics are drawn against: key in a record, label."""

_INK, _MUTED, _GRID = "#fe0100", "#fe0101", "#fe0102"
PLACEHOLDERS = {_INK: "var(--ink)", _MUTED: "var(--muted)", _GRID: "var(--grid)"} | {
    f"#fe00{i:02x}": f"var(--c{i})" for i in range(NUM_COLOURS)
}

STYLE: Any = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "paramserver",  # the same record gives the same page
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "text.color": _INK,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}

STEPS = [1, 2, 2.5, 5, 10]
"""Ticks are multiples of these, so that they are easy to read."""

WIDTH = 10.6
"""Inches; text keeps its size on a page about 760 points wide."""


Columns = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a plot."""

    label: str
    colour: int
    """Number of the series' colour."""
    columns: Columns
    """The axes and ``key``, a value for each point; NaN leaves a gap."""
    key: str

    def points(self, axis: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return what is drawn along ``axis``, for long columns the means of neighbours."""
        x, y = self.columns[axis], self.columns[self.key]
        starts = np.arange(0, len(x), -(-len(x) // MAX_POINTS) or 1)
        sizes = np.diff([*starts, len(x)])
        return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def progress(name: str, rows: Mapping[str, Sequence[Series]]) -> str:
    """Draw each row's series against gradients, updates and seconds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.5 + 2.15 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), len(AXES), sharey="row", sharex="col", squeeze=False)
        for panels, (title, row) in zip(grid, rows.items(), strict=True):
            for panel, axis in zip(panels, AXES, strict=True):
                for series in row:
                    x, y = series.points(axis)
                    few = {"marker": "o", "markersize": 3.0} if len(x) <= 30 else {}
                    panel.plot(x, y, **line(series.colour), **few)
                _tidy(panel)
            spans = _decades([y for series in row for y in series.points("updates")[1]])
            if spans > 1.3:  # a loss that fell 20-fold ends on the floor of a linear axis
                panels[0].set_yscale("log")
                panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 3) if spans < 4 else (1,)))
                panels[0].yaxis.set_major_formatter(FuncFormatter(short))
                panels[0].yaxis.set_minor_locator(NullLocator())
            panels[0].set_title(f"{title} (logarithmic)" if spans > 1.3 else title)
        for panel, label in zip(grid[-1], AXES.values(), strict=True):
            panel.set_xlabel(label)
        return svg(figure, name, f"{', '.join(rows)} against gradients, updates and seconds")


def histogram(name: str, counts: Sequence[tuple[int, Mapping[int, int]]]) -> str:
    """Draw the share of pushes at each staleness, for ``(colour, pushes by staleness)`` each."""
    largest = max((max(c, default=0) for _, c in counts), default=0)
    width = max(1, math.ceil((largest + 1) / 60))
    edges = np.arange(0, largest + 1 + width, width) - 0.5
    with mpl.rc_context(STYLE):
        figure, panel = _single(2.6)
        for colour, pushes in counts:
            weights = np.array(list(pushes.values())) / max(sum(pushes.values()), 1) * 100
            share, _ = np.histogram(list(pushes), bins=edges, weights=weights)
            if len(counts) == 1:
                centres = (edges[:-1] + edges[1:]) / 2
                panel.bar(centres, share, 0.82 * width, color=line(colour)["color"])
            else:
                panel.stairs(share, edges, baseline=None, **line(colour))
        bars = f", in steps of {width}" if width > 1 else ""
        panel.set_xlabel(f"staleness (updates between read and apply{bars})")
        panel.set_title("share of pushes (%)")
        panel.set_ylim(bottom=0)
        _tidy(panel, whole_x=True)
        return svg(figure, name, "histogram of staleness")


def worker_histograms(name: str, pushes: Columns, workers: Sequence[int]) -> str:
    """Draw the share of each worker's pushes at each staleness, a small panel a worker.

    Args:
        name: Starts the ids in the plot.
        pushes: ``worker`` and ``staleness`` of applied pushes.
        workers: Those to be shown, each with a push or more.
    """
    largest = int(pushes["staleness"].max())
    width = max(1, math.ceil((largest + 1) / 24))
    edges = np.arange(0, largest + 1 + width, width) - 0.5
    num_columns = min(4, len(workers))
    num_rows = math.ceil(len(workers) / num_columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.55 + 1.25 * num_rows), layout="constrained")
        grid = figure.subplots(num_rows, num_columns, sharex=True, sharey=True, squeeze=False)
        for panel, worker in zip(grid.flat, workers, strict=False):
            own = pushes["staleness"][pushes["worker"] == worker]
            share = np.histogram(own, bins=edges)[0] / len(own) * 100
            panel.bar((edges[:-1] + edges[1:]) / 2, share, 0.82 * width, color=line(0)["color"])
            panel.set_title(f"worker {worker}: mean {own.mean():.3g}, {len(own):,} pushes")
            panel.set_ylim(bottom=0)
            _tidy(panel, whole_x=True)
        for panel in grid.flat[len(workers) :]:
            panel.set_visible(False)
        bars = f", in steps of {width}" if width > 1 else ""
        figure.supxlabel(f"staleness{bars}; share of pushes (%)", color=_MUTED, fontsize=9.5)
        return svg(figure, name, "histogram of staleness of each worker")


def by_staleness(name: str, pushes: Columns, keys: Sequence[str]) -> str:
    """Draw measures of pushes against their staleness: the median, and nine tenths of them.

    Args:
        name: Starts the ids in the plot.
        pushes: ``staleness`` and ``keys`` of applied pushes; NaN is left out.
        keys: One or more measures, a panel each.
    """
    largest = int(pushes["staleness"].max())
    width = max(1, math.ceil((largest + 1) / 60))
    bins = pushes["staleness"] // width
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        for panel, key in zip(figure.subplots(1, len(keys), squeeze=False).flat, keys, strict=True):
            there = ~np.isnan(pushes[key])
            values = {b: pushes[key][there & (bins == b)] for b in np.unique(bins[there])}
            x = [(b + 0.5) * width - 0.5 for b in values]
            spread = [np.quantile(v, (0.05, 0.5, 0.95)) for v in values.values()]
            low, middle, high = np.array(spread).reshape(-1, 3).T
            panel.fill_between(x, low, high, color=line(0)["color"], alpha=0.2, linewidth=0)
            panel.plot(x, middle, marker="o", markersize=3.0, **line(0))
            panel.set_title(key)
            panel.set_xlabel("staleness")
            if key != "cosine":
                panel.set_ylim(bottom=0)
            _tidy(panel, whole_x=True)
        return svg(figure, name, f"{', '.join(keys)} against staleness")


def staleness_over_time(name: str, pushes: Columns, workers: Sequence[int]) -> str:
    """Draw the mean staleness of each worker over time.

    More workers than there are colours are drawn as the mean of all and the range of their means.

    Args:
        name: Starts the ids in the plot.
        pushes: ``seconds``, ``worker`` and ``staleness`` of applied pushes, one or more.
        workers: Those among ``pushes``.
    """
    seconds, worker, staleness = (pushes[key] for key in ("seconds", "worker", "staleness"))
    num_bins = int(np.clip(len(seconds) / (8 * len(workers)), 4, 60))
    edges = np.linspace(0, max(seconds.max(), 1e-9), num_bins + 1)
    centres = (edges[:-1] + edges[1:]) / 2
    bins = np.clip(np.searchsorted(edges, seconds, side="right") - 1, 0, num_bins - 1)

    def mean(mask: NDArray[Any]) -> NDArray[Any]:
        count = np.bincount(bins[mask], minlength=num_bins)
        total = np.bincount(bins[mask], staleness[mask], minlength=num_bins)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    means = {w: mean(worker == w) for w in workers}
    with mpl.rc_context(STYLE):
        figure, panel = _single(2.6)
        if len(workers) <= NUM_COLOURS:
            for colour, values in enumerate(means.values()):
                there = ~np.isnan(values)
                panel.plot(centres[there], values[there], **line(colour))
        else:
            table = np.ma.masked_invalid(np.stack(list(means.values())))
            low, high = table.min(axis=0), table.max(axis=0)
            colour = line(0)["color"]
            panel.fill_between(centres, low, high, color=colour, alpha=0.2, linewidth=0)
            panel.plot(centres, mean(np.ones(len(seconds), bool)), **line(0))
        panel.set_xlabel(AXES["seconds"])
        panel.set_title("mean staleness (updates)")
        panel.set_ylim(bottom=0)
        _tidy(panel)
        return svg(figure, name, "staleness of each worker over time")


def throughput(name: str, rates: Sequence[tuple[int, Columns, str]]) -> str:
    """Draw how fast a count grew, for ``(colour, columns, key of the count)`` each."""
    with mpl.rc_context(STYLE):
        figure, panel = _single(2.4)
        for colour, columns, key in rates:
            seconds = np.concatenate([[0.0], columns["seconds"]])
            counts = np.concatenate([[0.0], columns[key]])
            if seconds[-1] > 0:
                edges = np.linspace(0, seconds[-1], min(60, max(2, len(seconds) // 4)) + 1)
                grown = np.diff(np.interp(edges, seconds, counts)) / np.diff(edges)
                panel.stairs(grown, edges, baseline=None, **line(colour))
        panel.set_xlabel(AXES["seconds"])
        panel.set_title("per second")
        panel.set_ylim(bottom=0)
        _tidy(panel)
        return svg(figure, name, "throughput over time")


def waits(name: str, seconds: Mapping[str, float]) -> str:
    """Draw a bar for each cause of waiting, in the order given."""
    with mpl.rc_context(STYLE):
        figure, panel = _single(0.75 + 0.27 * len(seconds))
        places = np.arange(len(seconds))
        panel.barh(places, list(seconds.values()), 0.66, color=line(1)["color"])
        panel.set_yticks(places, list(seconds), color=_INK)
        panel.set_ylim(len(seconds) - 0.5, -0.5)
        panel.set_xlabel("time waited (s)")
        panel.grid(visible=False, axis="y")
        panel.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        return svg(figure, name, "seconds waited, by who waited for whom")


def line(colour: int) -> dict[str, Any]:
    """Return the look of a series: its placeholder colour, and dashes once colours repeat."""
    dashes = (0, (3, 1.5)) if colour >= NUM_COLOURS else "solid"
    return {"color": f"#fe00{colour % NUM_COLOURS:02x}", "linestyle": dashes}


def _single(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _tidy(panel: Axes, *, whole_x: bool = False) -> None:
    panel.grid(visible=False, axis="x")
    panel.margins(x=0.015)
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=whole_x, steps=STEPS))
    panel.xaxis.set_major_formatter(FuncFormatter(short))
    panel.yaxis.set_major_locator(MaxNLocator(4, steps=STEPS))
    panel.yaxis.set_major_formatter(FuncFormatter(short))


def short(value: float, _position: int | None = None) -> str:
    """Write 12000 as 12k, and leave out digits that say nothing."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.4g}{unit}"
    return f"{value:.4g}"


def _decades(values: Sequence[float]) -> float:
    """Return over how many powers of ten values spread; 0 if one is not above 0."""
    finite = [v for v in values if math.isfinite(v)]
    return math.log10(max(finite) / min(finite)) if finite and min(finite) > 0 else 0.0


def svg(figure: Figure, name: str, label: str) -> str:
    """Return the figure as an element whose ids start with ``name``."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#fe0[0-9a-f]{3}\b", lambda found: PLACEHOLDERS[found[0]], text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
