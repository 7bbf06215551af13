"""Pieces of a page that needs no network: light or dark as the reader has it, and fit to print.

Every text is escaped here; only what `deploy.plots` drew goes in as it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence

from deploy.plots import NUM_COLOURS

_LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1b1f24",
    "muted": "#5b6570",
    "grid": "#dde1e6",
}
_DARK = {
    "paper": "#14171a",
    "panel": "#1d2125",
    "ink": "#e8eaed",
    "muted": "#a0a8b1",
    "grid": "#343a41",
}
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the ones that are too
# faint on white; for the dark page the same hues, lighter.
_SERIES_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#b5609a", "#c98a00", "#3aa0dd")
_SERIES_DARK = ("#4ba3e3", "#f0833a", "#2fc497", "#dd94c4", "#e9b94a", "#8fd0f7")

_CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.5rem 3rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; font-variant-numeric: tabular-nums; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .2rem; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .7rem; padding-top: .9rem;
  border-top: 1px solid var(--grid); }
.sub, .note, figcaption { color: var(--muted); }
.sub { margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.note { margin: .6rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .8rem;
  margin: 0 0 1.4rem; }
.tile { background: var(--panel); border-radius: .5rem; padding: .7rem .9rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; font-weight: 600; }
.tile span { display: block; color: var(--muted); font-size: .87rem; }
figure { margin: 1.1rem 0 1.5rem; break-inside: avoid; overflow-x: auto; }
figcaption { margin: 0 0 .35rem; }
figcaption b { color: var(--ink); font-weight: 600; }
figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
figure text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.3rem; margin: .2rem 0 .5rem; padding: 0;
  list-style: none; }
.legend svg { display: inline; width: 1.7rem; min-width: 0; height: .7rem; margin-right: .4rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.6rem .3rem 0;
  border-bottom: 1px solid var(--grid); }
td { overflow-wrap: break-word; }
.wide { width: 100%; }
.wide td { min-width: 8rem; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; white-space: nowrap; color: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr));
  column-gap: 2.5rem; margin: 0; }
.facts div { display: grid; grid-template-columns: 9.5rem 1fr; gap: .8rem; padding: .3rem 0;
  border-bottom: 1px solid var(--grid); break-inside: avoid; }
.facts dt { color: var(--muted); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
@media print { body { padding: 0; max-width: none; font-size: 11px; } h2 { break-after: avoid; }
  figure svg { min-width: 0; } figure, .scroll { overflow: visible; } }
"""


def colour(variable: str) -> str:
    """Return what ``var(--ink)`` and the like stand for on the light page."""
    light = {**_LIGHT, **{f"c{i}": colour for i, colour in enumerate(_SERIES_LIGHT)}}
    return light[variable.removeprefix("var(--").removesuffix(")")]


def page(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """Return a whole page; ``parts`` are what the functions below return."""
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {_root(_DARK, _SERIES_DARK)} }}"
    head = f"{_root(_LIGHT, _SERIES_LIGHT)}\n{dark}{_CSS}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{head}</style>\n</head>\n<body>\n"
        f'<h1>{_text(title)}</h1>\n<p class="sub">{_text(subtitle)}</p>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def section(title: str, parts: Iterable[str]) -> str:
    """Return parts under a heading; nothing if there are none."""
    body = "\n".join(parts)
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>" if body else ""


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
    """Return the few numbers that matter most: ``(name, value, detail)`` each."""
    boxes = (
        f'<div class="tile"><span>{_text(name)}</span><b>{_text(value)}</b>'
        f"<span>{_text(detail)}</span></div>"
        for name, value, detail in figures
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def facts(values: Mapping[str, str]) -> str:
    """Return names and values, in as many columns as there is room for."""
    rows = (
        f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
        for name, value in values.items()
    )
    return f'<dl class="facts">{"".join(rows)}</dl>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, wide: bool = False) -> str:
    """Return a table; the first cell of each row is its name."""
    heads = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    kind = ' class="wide"' if wide else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def figure(svg: str, title: str, caption: str = "", legend: Sequence[tuple[str, int]] = ()) -> str:
    """Return a plot with what it shows; ``legend`` holds the names and colours of its series."""
    said = f"<b>{_text(title)}.</b> {_text(caption)}"
    names = "".join(f"<li>{_swatch(colour)}{_text(name)}</li>" for name, colour in legend)
    listed = f'<ul class="legend">{names}</ul>' if names else ""
    return f"<figure><figcaption>{said}</figcaption>{listed}{svg}</figure>"


def note(text: str) -> str:
    """Return a sentence on what is not shown, and why."""
    return f'<p class="note">{_text(text)}</p>'


def _swatch(colour: int) -> str:
    dashes = ' stroke-dasharray="5 3"' if colour >= NUM_COLOURS else ""
    return (
        '<svg viewBox="0 0 24 10" aria-hidden="true"><path d="M1 5H23" fill="none" '
        f'stroke="var(--c{colour % NUM_COLOURS})" stroke-width="3"{dashes}/></svg>'
    )


def _root(colours: Mapping[str, str], series: Sequence[str]) -> str:
    named = {**colours, **{f"c{i}": colour for i, colour in enumerate(series)}}
    return ":root { " + " ".join(f"--{name}: {value};" for name, value in named.items()) + " }"


def _text(text: str) -> str:
    """Escape, and let ``adam:lr=0.1,betas=0.9/0.999`` break between keys."""
    return re.sub(r",(?=[a-z])", ",<wbr>", html.escape(text))
