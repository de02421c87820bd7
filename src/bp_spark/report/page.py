"""Parts of a page, and the page as one HTML file that needs no other file.

A policy in the page forbids that it fetches anything or runs a script. Charts take the colours of the reader's light or dark
screen, and light ones on paper.
"""

from __future__ import annotations

import hashlib
import html
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bp_spark.core import disk

INK, FAINT, GRID = "#1c2430", "#6b7480", "#dde1e6"
SERIES = ("#1b66b0", "#c4571a", "#2a8a5a", "#8a4fb0", "#a8323e", "#6f6a2c", "#3a8fa3", "#b04f8a")
_DARK = {
    INK: "#e6eaf0",
    FAINT: "#9aa4b1",
    GRID: "#353d48",
    **dict(
        zip(
            SERIES,
            ("#6db3f2", "#f0975a", "#62c795", "#c39ae0", "#f0808a", "#c9c27a", "#7cc9da", "#e79ac7"),
            strict=True,
        )
    ),
}
"""Colour of a chart -> its colour on a dark screen."""
_NAMES = {colour: f"--c{number}" for number, colour in enumerate(_DARK)}
_ROW_HEADS = 1
"""Columns of a table that head its rows."""
_WIDE = 2.5
"""Ratio of width to height above which a chart has a row to itself."""


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


@dataclass(frozen=True)
class Chart:
    """A drawn figure.

    Attributes:
        svg: For a page: as wide as the room, in the colours of the page.
        png: For a file or a notebook, which shows it by itself.
    """

    svg: str = field(repr=False)
    png: bytes = field(repr=False)

    def _repr_png_(self) -> bytes:
        return self.png


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own; a folded one shows its body at a click on the heading."""

    title: str
    body: Sequence[Markup]
    folded: bool = False


def page(title: str, lead: Sequence[Markup], sections: Sequence[Section]) -> str:
    """Return an HTML document.

    Args:
        title: Title and first heading.
        lead: Parts between the title and the list of sections.
        sections: The sections.
    """
    anchors = [_anchor(section.title) for section in sections]
    links = "".join(
        f'<a href="#{anchor}">{html.escape(section.title)}</a>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    body = "".join(
        f'<section id="{anchor}">{_section(section)}</section>'
        for anchor, section in zip(anchors, sections, strict=True)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1>{''.join(lead)}</header>"
        f'<nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def write(path: Path, document: str) -> Path:
    """Write a page, and its folder if it is missing; return the path.

    Raises:
        PlatformError: the disk is full.
    """
    with disk.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document, encoding="utf-8")
    return path


def escaped(text: object) -> Markup:
    """Return anything as text of a page; markup stays as it is."""
    return text if isinstance(text, Markup) else Markup(html.escape(str(text)))


def paragraph(*parts: object) -> Markup:
    """Return a paragraph of text and markup."""
    return Markup(f"<p>{''.join(escaped(part) for part in parts)}</p>")


def note(*parts: object) -> Markup:
    """Return a paragraph in small print."""
    return Markup(f'<p class="note">{"".join(escaped(part) for part in parts)}</p>')


def subheading(text: str) -> Markup:
    """Return a heading inside a section."""
    return Markup(f"<h3>{html.escape(text)}</h3>")


def badge(text: str, mood: str) -> Markup:
    """Return a word in a coloured frame; ``mood`` is good, warn or bad."""
    return Markup(f'<span class="badge {mood}">{html.escape(text)}</span>')


def facts(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Return a list of names and values, one pair a line."""
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{escaped(value)}</dd>" for name, value in pairs)
    return Markup(f"<dl>{rows}</dl>")


def tiles(pairs: Sequence[tuple[str, object, object]]) -> Markup:
    """Return the few figures that are read first, as (name, figure, comparison)."""
    cells = (
        f"<span>{html.escape(name)}</span><strong>{escaped(value)}</strong><small>{escaped(more)}</small>"
        for name, value, more in pairs
    )
    return Markup(f'<div class="tiles">{"".join(f"<div class=tile>{cell}</div>" for cell in cells)}</div>')


def _section(section: Section) -> str:
    heading, body = f"<h2>{html.escape(section.title)}</h2>", "".join(section.body)
    return f"<details><summary>{heading}</summary>{body}</details>" if section.folded else heading + body


def table(
    caption: str,
    headings: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    words: Collection[int] = (0,),
    sentences: Collection[int] = (),
) -> Markup:
    """Return a table whose first column heads the rows.

    Args:
        caption: Caption, which screen readers announce as the table's name.
        headings: Headings of the columns.
        rows: Cells of each row, text or markup.
        words: Positions of columns of words, which are aligned left; numbers are aligned right.
        sentences: Positions of columns of sentences, which may be broken into lines.
    """
    kinds = ("sentences" if n in sentences else "words" if n in words else "" for n in range(len(headings)))
    left = [f' class="{kind}"' if kind else "" for kind in kinds]
    head = "".join(f'<th scope="col"{left[n]}>{html.escape(text)}</th>' for n, text in enumerate(headings))
    lines = []
    for row in rows:
        cells = [
            f'<th scope="row"{left[n]}>{escaped(value)}</th>'
            if n < _ROW_HEADS
            else f"<td{left[n]}>{escaped(value)}</td>"
            for n, value in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    # not a <caption>: that would scroll away with a table that is wider than the screen
    name = html.escape(caption)
    return Markup(
        f'<p class="caption" aria-hidden="true">{name}</p><div class="scroll" tabindex="0"><table aria-label="{name}">'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(chart: Chart, title: str, caption: str = "") -> Markup:
    """Return a chart with title and caption, which screen readers announce too."""
    label_text = f"{title}. {caption}" if caption else title
    more = f" <span>{html.escape(caption)}</span>" if caption else ""
    svg = chart.svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label_text)}" ', 1)
    _, _, width, height = (float(number) for number in re.findall(r'viewBox="([^"]*)"', svg)[0].split())
    wide = ' class="wide"' if width > _WIDE * height else ""
    return Markup(f"<figure{wide}><figcaption><b>{html.escape(title)}</b>{more}</figcaption>{svg}</figure>")


def figures(drawn: Sequence[Markup]) -> Markup:
    """Return figures, beside each other where there is room."""
    return Markup(f'<div class="figures">{"".join(drawn)}</div>')


# --- charts ------------------------------------------------------------------------------------------------------------


def canvas(panels: int = 1, *, width: float = 5.5, height: float = 3.9) -> tuple[Figure, list[Axes]]:
    """Return an empty figure of panels beside each other, ``width`` by ``height`` inches each."""
    # without pyplot there is no global state, and no display is needed
    drawn = Figure(figsize=(width * panels, height), layout="constrained")
    FigureCanvasAgg(drawn)
    all_axes = [drawn.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axes in all_axes:
        axes.set_prop_cycle(color=SERIES)
        axes.set_axisbelow(True)
        axes.set_facecolor("none")
        axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=10)
        for side, spine in axes.spines.items():
            spine.set_color(FAINT)
            spine.set_visible(side in ("left", "bottom"))
    return drawn, all_axes


def label(axes: Axes, x: str, y: str) -> None:
    """Set the names of the axes, and a grid."""
    axes.set_xlabel(x, color=INK, fontsize=11)
    axes.set_ylabel(y, color=INK, fontsize=11)
    axes.grid(color=GRID)


def legend(axes: Axes, **where: Any) -> None:
    """Show the names of the series."""
    axes.legend(fontsize=10, frameon=False, labelcolor=INK, **where)


def chart(drawn: Figure) -> Chart:
    """Draw a figure; the same figure gives the same bytes."""
    png, svg = io.BytesIO(), io.StringIO()
    drawn.savefig(png, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    # text stays text, so that people can read, search and enlarge it
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bp-spark"}):
        drawn.savefig(svg, format="svg", dpi=110, facecolor="none", metadata={"Date": None, "Creator": None})
    return Chart(_inline(svg.getvalue()), png.getvalue())


def _inline(svg: str) -> str:
    """Return an SVG file as part of a page: without prolog and size, with colours by name and ids of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.S).strip()
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    for colour, name in _NAMES.items():
        svg = svg.replace(f": {colour}", f": var({name},{colour})")
    used_ids = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used_ids else "", svg)
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>c{prefix}-", svg)


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _colours(shown_colours: dict[str, str]) -> str:
    return ";".join(f"{_NAMES[colour]}:{shown}" for colour, shown in shown_colours.items())


_LIGHT_PAGE = (
    "--ground:#fff;--card:#f5f7f9;--ink:#1c2430;--soft:#56606c;--line:#dde1e6;--link:#175a9e;"
    "--good:#1f6f46;--good-ground:#e2f3e9;--warn:#7d5a00;--warn-ground:#fbf0d3;--bad:#9b2430;--bad-ground:#fbe4e6;"
    + _colours({colour: colour for colour in _DARK})
)
_DARK_PAGE = (
    "--ground:#14181d;--card:#1d232a;--ink:#e6eaf0;--soft:#a7b0bc;--line:#353d48;--link:#7fbcf5;"
    "--good:#7fd6a8;--good-ground:#1b3527;--warn:#e8c468;--warn-ground:#3a3016;--bad:#f49aa3;--bad-ground:#41202a;"
    + _colours(_DARK)
)
_STYLE = (
    f":root{{{_LIGHT_PAGE}}}@media screen and (prefers-color-scheme:dark){{:root{{{_DARK_PAGE}}}}}"
    "*{box-sizing:border-box}html{-webkit-text-size-adjust:100%}"
    "body{font:16px/1.5 system-ui,'Segoe UI',Roboto,'Helvetica Neue','DejaVu Sans',sans-serif;max-width:76rem;margin:0 auto;"
    "padding:1.5rem 1rem 3rem;color:var(--ink);background:var(--ground)}"
    "h1{font-size:1.7rem;line-height:1.25;margin:0 0 .5rem}"
    "h2{font-size:1.25rem;margin:2.5rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}"
    "details{margin-top:2.5rem;padding-top:.75rem;border-top:1px solid var(--line)}summary{cursor:pointer}"
    "summary h2{display:inline;border:0;padding:0}"
    "h3{font-size:1rem;margin:1.5rem 0 .5rem}p{margin:.5rem 0;max-width:75ch}.note{color:var(--soft);font-size:.875rem}"
    "a{color:var(--link)}nav{display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;margin:1.25rem 0 0;font-size:.9375rem}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.75rem;margin:1.25rem 0}"
    ".tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.75rem .9rem;min-width:0}"
    ".tile>span,.tile>small{display:block;color:var(--soft);font-size:.875rem}"
    ".tile>strong{display:block;font-size:1.5rem;line-height:1.3;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}"
    ".badge{display:inline-block;border-radius:.3rem;padding:0 .45rem;font-size:.875em;font-weight:600;white-space:nowrap}"
    + "".join(f".{mood}{{color:var(--{mood});background:var(--{mood}-ground)}}" for mood in ("good", "warn", "bad"))
    + ".caption{font-weight:600;font-size:.9375rem;margin:1.25rem 0 .35rem}.scroll{overflow-x:auto;margin:0 0 1rem}"
    "table{border-collapse:collapse;font-size:.9375rem;font-variant-numeric:tabular-nums}"
    "th,td{border-bottom:1px solid var(--line);padding:.3rem 1rem .3rem 0;text-align:right;vertical-align:top}"
    "td,tbody th{white-space:nowrap}th{font-weight:600}thead th{color:var(--soft);vertical-align:bottom}"
    "tbody th{font-weight:400}.words,.sentences{text-align:left}"
    "table .sentences{white-space:normal;min-width:11rem;max-width:36rem}"
    ".heat{display:inline-block;min-width:3.5rem;padding:0 .35rem;border-radius:.2rem;"
    "background:color-mix(in srgb,var(--link) var(--part),transparent)}"
    "td small{color:var(--soft);white-space:nowrap}"
    "dl{display:grid;grid-template-columns:max-content 1fr;gap:.2rem 1rem;margin:.75rem 0}dt{color:var(--soft)}"
    "dd{margin:0;overflow-wrap:anywhere}"
    ".figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem 2rem;margin:1rem 0}"
    "figure{margin:0;min-width:0}figcaption{font-size:.9375rem}figcaption span{color:var(--soft)}"
    "svg{display:block;width:100%;height:auto;max-width:46rem;margin-top:.35rem}"
    ".wide{grid-column:1/-1}.wide svg{max-width:none}"
    "@media(max-width:40rem){body{padding:1rem .75rem 2rem}h1{font-size:1.4rem}dl{grid-template-columns:1fr;gap:0}"
    "dd{margin-bottom:.4rem}.tiles{grid-template-columns:repeat(auto-fit,minmax(9rem,1fr))}.tile>strong{font-size:1.25rem}}"
    "@media print{body{font-size:10pt;max-width:none;padding:0}nav{display:none}.scroll{overflow:visible}"
    "figure,tr,.tile{break-inside:avoid}h2,h3,.caption{break-after:avoid}a{color:inherit}}"
)
