"""A self-contained HTML page of text, tables and pictures, with styles for small screens, print and dark mode."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fed.report.figure import DARK, LIGHT, Panel, sheet

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #595959; --line: #ddd; --paper: #fff; --band: #f6f7f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --soft: #a8a8a8; --line: #34373d; --paper: #16181c; --band: #1e2126; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p, li { max-width: 46rem; }
pre { overflow-x: auto; padding: 0.6rem 0.8rem; background: var(--band); border-radius: 0.4rem; font-size: 0.85rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.8rem 0.35rem 0; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 400; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: 0.85rem; }
@media print { body { max-width: none; } figure { break-inside: avoid; } }
""".strip()


@dataclass(frozen=True)
class Section:
    """A section of a page: heading, paragraphs, list items, tables (heading first), panels to draw, and code."""

    heading: str
    paragraphs: Sequence[str] = ()
    items: Sequence[str] = ()
    tables: Sequence[Sequence[tuple[str, ...]]] = ()
    panels: Sequence[Panel] = ()
    code: str = ""


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a complete HTML document that refers to no other file; all text is escaped."""
    body = "\n".join(map(_section, sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n"
        f"<body>\n<h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n{body}\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    if section.items:
        parts.append("<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in section.items) + "\n</ul>")
    parts += map(_table, section.tables)
    if section.panels:
        parts.append('<div class="figures">\n' + "\n".join(map(_figure, section.panels)) + "\n</div>")
    if section.code:
        parts.append(f"<pre><code>{escape(section.code)}</code></pre>")
    return "<section>\n" + "\n".join(parts) + "\n</section>"


def _table(lines: Sequence[tuple[str, ...]]) -> str:
    """Return a table that scrolls horizontally on narrow screens."""
    first, *rest = lines
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in first)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rest
    )
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _figure(panel: Panel) -> str:
    """Return a panel drawn twice, in light and dark colours, of which the browser shows the one for its mode."""
    pictures = (sheet([panel], theme, size=(5.6, 4.6)) for theme in (LIGHT, DARK))
    light, dark = (f"data:image/png;base64,{base64.b64encode(picture).decode()}" for picture in pictures)
    caption = escape(panel.caption, quote=True)
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{caption}"></picture>\n<figcaption>{caption}</figcaption></figure>'
    )
