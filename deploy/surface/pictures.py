"""Pictures of an error surface, with the path of training on it: a curve, contours, a landscape.

Each is drawn by the same code for a page, which gives it colours, and as a picture on white.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, MaxNLocator
from numpy.typing import NDArray

from deploy import plots, printed
from deploy.surface.look import Surface

Array = NDArray[np.float64]

_COLOURS = "viridis"
_LEVELS = 22
_WIDE = 8.0
"""Largest by least loss from which on heights are drawn as logarithms."""
_MOST = 60
"""Facets of a landscape along each side."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture; ``name`` is its file's."""

    name: str
    title: str
    caption: str
    draw: Callable[[Mapping[str, str]], Figure]
    """Draws it in the page's placeholder colours, or those that the mapping says instead."""

    def svg(self) -> str:
        """Draw it for a page."""
        with mpl.rc_context(plots.STYLE):
            return plots.svg(self.draw({}), self.name, self.title)

    def save(self, path: Path) -> None:
        """Draw it as a picture that stands alone; raises OSError if that cannot be written."""
        with printed.printing():
            figure = self.draw(printed.COLOURS)
            printed.entitle(figure, self.title, self.caption)
            figure.savefig(path, dpi=130)


def pictures(surface: Surface) -> Iterator[Picture]:
    """Return what there is to draw of ``surface``."""
    if surface.config.dims == 1:
        caption = "Points: the path of training, where it is nearest to in the line; "
        caption += "hollow, its own losses." if surface.versions else ""
        yield Picture(
            "curve", "The loss along a line", caption if surface.versions else "",
            lambda colours: _curve(surface, colours),
        )  # fmt: skip
        return
    log = "Heights are logarithms. " if _is_wide(surface.losses) else ""
    path, ends = "The run kept no trajectory, so there is no path on it", ""
    if surface.versions:
        path, ends = (
            "The line is the path of training, projected onto the plane",
            ", from square to circle",
        )
    yield Picture(
        "contour", "The loss on a plane", f"{log}{path}{ends}.", lambda colours: _contour(surface)
    )
    yield Picture(
        "landscape", "The same as a landscape", f"{log}{path}.",
        lambda colours: _landscape(surface, colours),
    )  # fmt: skip


def labels(surface: Surface) -> list[str]:
    """Return what the axes of ``surface`` are called."""
    config = surface.config
    if config.along == "principal":
        return [
            f"principal direction {i + 1} ({100 * share:.3g} % of the path)"
            for i, share in enumerate(surface.shares)
        ]
    if config.along == "random":
        return [f"random direction {i + 1}" for i in range(config.dims)]
    ends = "this run's end to the other's" if config.other else "first to last"
    return [f"{ends}, 0 to 1", "aside, in the same scale"][: config.dims]


def _is_wide(losses: Array) -> bool:
    finite = losses[np.isfinite(losses)]
    return bool(finite.size and finite.min() > 0 and finite.max() > _WIDE * finite.min())


def _heights(losses: Array, *, is_log: bool) -> Array:
    """Return what is drawn for ``losses``; what is not finite is not drawn."""
    with np.errstate(divide="ignore", invalid="ignore"):
        heights = np.log10(losses) if is_log else losses
    return np.where(np.isfinite(heights), heights, np.nan)


def _written(is_log: bool) -> FuncFormatter:
    return FuncFormatter(lambda z, _=None: plots.short(float(f"{10**z if is_log else z:.3g}")))


def _ticks(heights: Array, *, is_log: bool) -> Locator:
    """Return round losses, if what is drawn are their logarithms."""
    if not is_log:
        return MaxNLocator(6, steps=plots.STEPS)
    low, high = float(np.nanmin(heights)), float(np.nanmax(heights))
    digits = (1, 2, 5) if high - low < 3 else (1,)
    tens = range(math.floor(low), math.ceil(high))
    ticks = [power + math.log10(digit) for power in tens for digit in digits]
    return FixedLocator([tick for tick in ticks if low <= tick <= high])


def _curve(surface: Surface, colours: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(plots.WIDTH, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    curve, path = (_colour(i, colours) for i in (0, 1))
    axes.plot(
        surface.axes[0], np.where(np.isfinite(surface.losses), surface.losses, np.nan), color=curve
    )
    if surface.versions:
        where = surface.path[:, 0]
        axes.plot(where, surface.shadow_losses, "o", color=path, markersize=4)
        axes.plot(where, surface.path_losses, "o", color=path, markersize=4, fillstyle="none")
    if _is_wide(surface.losses):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(plots.short))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    for name, (x,) in surface.marks.items():
        axes.axvline(x, color=curve, linewidth=0.8, linestyle=":")
        axes.annotate(name, (x, 1), xycoords=("data", "axes fraction"), ha="center", va="bottom")
    axes.set_xlabel(labels(surface)[0])
    axes.set_title(f"{surface.config.data} loss", pad=16)
    return figure


def _contour(surface: Surface) -> Figure:
    is_log = _is_wide(surface.losses)
    heights = _heights(surface.losses, is_log=is_log)
    figure = Figure(figsize=(plots.WIDTH, 6.4), layout="constrained")
    axes: Axes = figure.subplots()
    filled = axes.contourf(*surface.axes, heights, levels=_LEVELS, cmap=_COLOURS)
    axes.contour(*surface.axes, heights, levels=filled.levels, colors="white", linewidths=0.35)
    bar = figure.colorbar(filled, ax=axes, format=_written(is_log), pad=0.02)
    bar.locator = _ticks(heights, is_log=is_log)
    bar.update_ticks()
    bar.outline.set_visible(False)
    bar.set_label(f"{surface.config.data} loss")
    outline = [Stroke(linewidth=3.2, foreground="black"), Normal()]
    if surface.versions:
        axes.plot(
            *surface.path.T, color="white", linewidth=1.5, marker="o", markersize=2.6,
            path_effects=outline,
        )  # fmt: skip
        for row, marker in ((0, "s"), (-1, "o")):
            axes.plot(
                *surface.path[row], marker, color="white", markersize=7, markeredgecolor="black"
            )
    for name, (x, y) in surface.marks.items():
        axes.annotate(
            name, (x, y), xytext=(7, 7), textcoords="offset points", color="white",
            path_effects=[Stroke(linewidth=2.4, foreground="black"), Normal()],
        )  # fmt: skip
    axes.set_xlim(*surface.axes[0][[0, -1]])
    axes.set_ylim(*surface.axes[1][[0, -1]])
    for axis, label in zip((axes.xaxis, axes.yaxis), labels(surface), strict=True):
        axis.set_label_text(label)
        axis.set_major_locator(MaxNLocator(6, steps=plots.STEPS))
        axis.set_major_formatter(FuncFormatter(plots.short))
    axes.grid(visible=False)
    return figure


def _landscape(surface: Surface, colours: Mapping[str, str]) -> Figure:
    is_log = _is_wide(surface.losses)
    heights = _heights(surface.losses, is_log=is_log)
    figure = Figure(figsize=(plots.WIDTH, 6.6))
    axes: Any = figure.add_axes((0.0, 0.03, 1.0, 0.92), projection="3d", computed_zorder=False)
    lowest, highest = float(np.nanmin(heights)), float(np.nanmax(heights))
    axes.plot_surface(
        *np.meshgrid(*surface.axes), heights, cmap=_COLOURS, vmin=lowest, vmax=highest,
        rcount=_MOST, ccount=_MOST, linewidth=0.15, edgecolor="#00000030", zorder=1,
    )  # fmt: skip
    if surface.versions:
        low, high = ([float(axis[end]) for axis in surface.axes] for end in (0, -1))
        is_shown = ((surface.path >= low) & (surface.path <= high)).all(axis=1)
        path = _heights(surface.shadow_losses, is_log=is_log)
        where = (*surface.path[is_shown].T, path[is_shown])
        colour = _colour(1, colours)
        axes.plot(*where, color=colour, linewidth=2, marker="o", markersize=3, zorder=5)
    for axis, label in zip((axes.xaxis, axes.yaxis), labels(surface), strict=True):
        axis.set_label_text(label)
        axis.set_major_locator(MaxNLocator(5, steps=plots.STEPS))
        axis.set_major_formatter(FuncFormatter(plots.short))
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0.5, 0.5, 0.5, 0.06))
    axes.zaxis.set_major_locator(_ticks(heights, is_log=is_log))
    axes.zaxis.set_major_formatter(_written(is_log))
    axes.set_zlabel(f"{surface.config.data} loss")
    axes.view_init(elev=38, azim=-58)
    axes.set_box_aspect((1, 1, 0.62), zoom=1.0)
    return figure


def _colour(number: int, colours: Mapping[str, str]) -> str:
    placeholder: str = plots.line(number)["color"]
    return colours.get(placeholder, placeholder)
