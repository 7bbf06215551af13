"""Pictures that stand alone: on white, in the colours of the light page, titled."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from deploy import page, plots

COLOURS: Mapping[str, str] = {
    placeholder: page.colour(variable) for placeholder, variable in plots.PLACEHOLDERS.items()
}
"""For each of `deploy.plots`' placeholders."""


@contextmanager
def printing() -> Iterator[None]:
    """Draw figures for print for the time of the block."""
    style: Any = {
        key: COLOURS.get(value, value) if isinstance(value, str) else value
        for key, value in plots.STYLE.items()
    }
    with mpl.rc_context({**style, "figure.facecolor": "white", "savefig.facecolor": "white"}):
        yield


def entitle(figure: Figure, title: str, caption: str) -> None:
    """Write ``title`` and ``caption`` above ``figure``."""
    said = textwrap.fill(caption, 150)
    figure.suptitle(f"{title}\n{said}", x=0.01, ha="left", fontsize=9.5)
