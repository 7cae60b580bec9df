"""Building blocks of the page: style sheet, numbers, tables, cards, plots."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from megatron_groupmates.report import plots

CSS = """
:root {
  color-scheme: light dark;
  --ink: #1f2933; --soft: #5b6775; --line: #d9dee5; --page: #f6f7f9; --card: #ffffff; --accent: #2f6fdb;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #dfe5ec; --soft: #96a2b0; --line: #313a45; --page: #14181d; --card: #1b2129; --accent: #7aa7f0; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 980px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; }
h2 { font-size: 1.12rem; margin: 0 0 6px; }
p { margin: 0 0 10px; }
.soft { color: var(--soft); font-size: 0.92rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 18px;
}
section.lead { border-left: 4px solid var(--accent); }
p.loud { border-left: 4px solid #c8553d; padding-left: 10px; font-weight: 600; }
section.lead ul { margin: 0; padding-left: 1.1em; }
figure { margin: 8px 0 0; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; margin: 0 auto; color: var(--ink); font-family: inherit; }
.scroll { overflow-x: auto; }
table {
  border-collapse: collapse; width: 100%; margin-top: 8px;
  font-variant-numeric: tabular-nums; font-size: 0.93rem;
}
th, td { padding: 5px 9px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child, td.text, th.text { text-align: left; }
tr:last-child td { border-bottom: none; }
ul.answers { margin: 0 0 10px; padding-left: 1.1em; }
details { margin-top: 10px; }
summary { cursor: pointer; font-weight: 600; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 4px 24px; }
.sides > div { min-width: 0; }
h3 { font-size: 0.98rem; margin: 10px 0 4px; }
article { border-top: 1px solid var(--line); padding: 8px 0; }
article p { margin: 0 0 4px; }
article pre {
  margin: 0; max-height: 12.5em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 12.5px/1.45 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
"""


def number(value: float | None, form: str = ",.3f", absent: str = "-") -> str:
    """A number for a table cell."""
    return absent if value is None else format(value, form)


def count(value: float | None) -> str:
    """A large count with a unit: 1.25M, 3.4T."""
    if value is None:
        return "-"
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """An HTML table; its first ``text_columns`` columns are text, the others are numbers. Cells are escaped."""

    def line(cells: Sequence[str], tag: str) -> str:
        tags = [f'<{tag} class="text">' if column < text_columns else f"<{tag}>" for column in range(len(cells))]
        return "".join(f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(tags, cells, strict=True))

    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    body = "".join(f"<tr>{line(row, 'td')}</tr>\n" for row in rows)
    return f'<div class="scroll"><table>{head}\n<tbody>{body}</tbody></table></div>'


def section(title: str, explanation: str, content: str) -> str:
    """One card of the page."""
    heading = f'<h2>{html.escape(title)}</h2>\n<p class="soft">{html.escape(explanation)}</p>'
    return f"<section>{heading}\n{content}</section>\n"


def drawn(summary: dict[str, Any], title: str, plot: Callable[[dict[str, Any]], Figure | None]) -> str | None:
    """A plot as an HTML figure; None where there is nothing to draw."""
    with plots.style(title):
        figure = plot(summary)
        return None if figure is None else f"<figure>{plots.svg(figure, html.escape(title))}</figure>"


def plot_section(
    summary: dict[str, Any], title: str, explanation: str, absent: str, plot: Callable[[dict[str, Any]], Figure | None]
) -> str:
    """A section that is one plot."""
    figure = drawn(summary, title, plot)
    return section(title, explanation, figure) if figure else section(title, f"Left out: {absent}.", "")
