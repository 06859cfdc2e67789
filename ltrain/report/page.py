"""The report as one HTML page that needs nothing but itself, light or dark as the reader's browser is."""

from __future__ import annotations

from html import escape

from ltrain.report.tables import Table
from ltrain.report.theme import DARK, LIGHT, Theme

_CSS = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 3rem) 3rem; max-width: 88rem; color: var(--ink);
  background: var(--page); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; }
.muted { color: var(--muted); }
section, figure { background: var(--surface); border: 1px solid var(--grid); border-radius: 8px; margin: 0;
  padding: 1rem 1.2rem; min-width: 0; }
.grid { display: grid; gap: 1rem; margin: 1rem 0; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); }
.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem .25rem 0; text-align: right; border-bottom: 1px solid var(--grid);
  vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 600; }
td { overflow-wrap: break-word; }
svg { display: block; width: 100%; height: auto; }
@media print { section, figure { break-inside: avoid; } }
"""


def _variables(theme: Theme, page: str) -> str:
    roles = {**theme.roles(), "page": page}
    return "{ " + " ".join(f"--{role}: {colour};" for role, colour in roles.items()) + " }"


def page(title: str, subtitle: str, tables: list[Table], charts: list[tuple[str, str]]) -> str:
    """The page's text; `charts` are (title, svg element)."""
    style = (
        f":root {{ color-scheme: light dark; }}\n:root {_variables(LIGHT, '#f5f6f8')}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {_variables(DARK, '#0e1116')} }}{_CSS}"
    )
    figures = "\n".join(
        f'<figure role="img" aria-label="{escape(name)}"><h2>{escape(name)}</h2>{svg}</figure>'
        for name, svg in charts
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="muted">{escape(subtitle)}</p>\n'
        f'<div class="grid">\n{"".join(map(_table, tables))}</div>\n'
        f'<div class="grid">\n{figures}\n</div>\n</body>\n</html>\n'
    )


def _table(table: Table) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in table.heads)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows
    )
    notes = "".join(f'<p class="muted">{escape(note)}</p>' for note in table.notes)
    wide = ' class="wide"' if len(table.heads) > 2 and not table.heads[0] else ""
    return (
        f'<section{wide}><h2>{escape(table.title)}</h2><div class="scroll"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>{notes}</section>\n"
    )
