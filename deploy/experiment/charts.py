"""Plots of an experiment: lines with their spread, beside what theory says, as SVG and as PNG.

Both are drawn by the same code: for a page with placeholders for its colours, see `deploy.plots`,
and as a picture that stands alone, with a legend and on white.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import ArrayLike

from deploy import plots, printed

_WIDE = 500
"""Largest by least value of a logarithmic axis from which on powers of ten alone are marked."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a panel; ``low`` and ``high`` are its spread."""

    label: str
    colour: int
    x: ArrayLike
    y: ArrayLike
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    is_theory: bool = False
    """Drawn thin, in the colour of what is measured, whose values are then drawn as points."""
    is_points: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One coordinate system."""

    title: str
    x_label: str
    lines: Sequence[Line]
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Panels in rows; ``name`` is a file's, the caption says what holds for all of them."""

    name: str
    title: str
    caption: str
    rows: Sequence[Sequence[Panel]]

    @property
    def legend(self) -> list[tuple[str, int]]:
        """Labels and colours, each once."""
        lines = (line for row in self.rows for panel in row for line in panel.lines)
        return list(dict.fromkeys((x.label, x.colour) for x in lines if not x.is_theory))

    def svg(self) -> str:
        """Draw it for a page, which gives it colours, a caption and a legend."""
        with mpl.rc_context(plots.STYLE):
            return plots.svg(self._draw({}), self.name, self.title)

    def save(self, path: Path) -> None:
        """Draw it as a picture; raises OSError if that cannot be written."""
        with printed.printing():
            figure = self._draw(printed.COLOURS)
            printed.entitle(figure, self.title, self.caption)
            entries = [
                mpl.lines.Line2D([], [], **_look(colour, printed.COLOURS), label=label)
                for label, colour in self.legend
            ]
            longest = max((len(label) for label, _ in self.legend), default=1)
            columns = max(1, min(4, 130 // (longest + 6)))
            figure.legend(
                handles=entries, loc="outside lower left", ncols=columns, frameon=False, fontsize=9
            )
            figure.savefig(path, dpi=130)

    def _draw(self, colours: Mapping[str, str]) -> Figure:
        most = max(map(len, self.rows))
        height = 0.6 + (2.5 if most > 1 else 3.4) * len(self.rows)
        figure = Figure(figsize=(plots.WIDTH, height), layout="constrained")
        for row, panels in enumerate(self.rows):
            for column, panel in enumerate(panels):
                axes = figure.add_subplot(len(self.rows), most, row * most + column + 1)
                _fill(axes, panel, colours)
        return figure


def _fill(axes: Axes, panel: Panel, colours: Mapping[str, str]) -> None:
    for line in panel.lines:
        look = _look(line.colour, colours)
        if line.low is not None and line.high is not None:
            axes.fill_between(
                line.x, line.low, line.high, color=look["color"], alpha=0.18, linewidth=0
            )
        if line.is_points:
            look |= {"linestyle": "none", "marker": "o", "markersize": 3.6}
        elif line.is_theory:
            look["linewidth"] = 0.9
        elif np.size(line.x) == 1:  # a line of one point would not be seen
            look |= {"marker": "o", "markersize": 3.6}
        axes.plot(line.x, line.y, **look)
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.margins(x=0.015)
    has_points = any(np.size(line.x) for line in panel.lines)
    for axis, is_log in ((axes.xaxis, panel.log_x), (axes.yaxis, panel.log_y)):
        if is_log and has_points:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            low, high = axis.get_view_interval()
            is_wide = high > _WIDE * low
            axis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
            axis.set_minor_locator(NullLocator())
        else:
            axis.set_major_locator(MaxNLocator(5, steps=plots.STEPS))
        axis.set_major_formatter(FuncFormatter(plots.short))


def _look(colour: int, colours: Mapping[str, str]) -> dict[str, Any]:
    look = plots.line(colour)
    return {**look, "color": colours.get(look["color"], look["color"])}
