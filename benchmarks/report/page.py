"""The page: one HTML file that asks no network for anything. Every number leads to its runs; every picture has a table.

plotly.js is packed into it (gzip in base64, which browsers since 2023 unpack by themselves): 2 MB instead of 5.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.cells import Cell
from benchmarks.report.conclusions import Link, Sentence, plain
from benchmarks.report.figures import Figure
from benchmarks.report.reading import Found, Run

HERE = Path(__file__).resolve().parent
# what can be filtered by: the name in the page -> its heading and what a cell says
FILTERS = {
    "plan": ("Plan", lambda cell: cell.plan),
    "model": ("Size", lambda cell: cell.model),
    "gpus": ("Devices", lambda cell: str(cell.gpus)),
    "card": ("Card", lambda cell: cell.card),
    "source": ("Folder", lambda cell: cell.first.source),
}
WITHOUT_PLOTLY = "The pictures need plotly: pip install -r requirements-report.txt. Their numbers are in the tables."


def read_plotly() -> str | None:
    """plotly.js, from the Python package; None where that is not installed."""
    package = importlib.util.find_spec("plotly")
    for folder in (package and package.submodule_search_locations) or ():
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def page(
    cells: Sequence[Cell], found: Found, sentences: Sequence[Sentence], figures: Sequence[Figure], plotly: str | None
) -> str:
    """The whole page; ``plotly``: plotly.js, None: without pictures."""
    title = f"Training GPT-2: {len(cells)} configurations, {sum(len(cell.timed) for cell in cells)} measured runs"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _problems(found.problems + ([] if plotly else [WITHOUT_PLOTLY])),
        _navigation(figures, found),
        '<main id="main">',
        _section("conclusions", "Conclusions", _conclusions(sentences)),
        _filters(cells),
        _section("table", "All configurations", _overview(cells)),
        *(_figure(figure, plotly is not None) for figure in figures),
        _section("skipped", "Not run", _skipped(found)) if found.skipped else "",
        _section("runs", "Runs", "".join(_cell_runs(cell) for cell in cells)),
        "</main>",
    ]
    return _document(title, "\n".join(part for part in parts if part), cells, figures, plotly)


def _document(title: str, body: str, cells: Sequence[Cell], figures: Sequence[Figure], plotly: str | None) -> str:
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode() if plotly else ""
    data = [{"id": figure.id, "traces": figure.traces, "layout": figure.layout} for figure in figures]
    facts = {cell.number: {name: say(cell) for name, (_, say) in FILTERS.items()} for cell in cells}
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{(HERE / "page.css").read_text()}</style>
</head>
<body>
<a class="skip" href="#main">To the content</a>
{body}
<script type="application/json" id="figures">{_json(data)}</script>
<script type="application/json" id="cells">{_json(facts)}</script>
<script type="text/plain" id="plotly">{packed}</script>
<script>
{(HERE / "page.js").read_text()}</script>
</body>
</html>
"""


def _json(value: object) -> str:
    """For a script element, which markup inside of a text could end."""
    return json.dumps(value, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c")


def _section(anchor: str, heading: str, content: str) -> str:
    return f'<section id="{anchor}"><h2>{escape(heading)}</h2>\n{content}</section>'


def _navigation(figures: Sequence[Figure], found: Found) -> str:
    places = [("conclusions", "Conclusions"), ("table", "All configurations")]
    places += [(figure.id, figure.title) for figure in figures]
    places += [("skipped", "Not run")] if found.skipped else []
    items = "".join(f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in [*places, ("runs", "Runs")])
    return f'<nav aria-label="Contents"><ul>{items}</ul></nav>'


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    head = '<section class="problems" aria-label="What is missing"><p>Missing or to be minded:</p>'
    return f"{head}<ul>{items}</ul></section>"


def _conclusions(sentences: Sequence[Sentence]) -> str:
    items = "".join(f"<li>{''.join(_piece(piece) for piece in sentence)}</li>" for sentence in sentences)
    return f'<ul class="conclusions">{items}</ul>'


def _piece(piece: str | Link) -> str:
    return escape(piece) if isinstance(piece, str) else _link(piece.cell, piece.text)


def _link(cell: Cell, text: str) -> str:
    return f'<a href="#cell-{cell.number}">{escape(text)}</a>'


def _filters(cells: Sequence[Cell]) -> str:
    """A box per value, of what differs between the cells."""
    parts = []
    for name, (heading, say) in FILTERS.items():
        values = list(dict.fromkeys(say(cell) for cell in cells))
        if len(values) > 1:
            boxes = "".join(
                f'<label><input type="checkbox" name="{name}" value="{escape(value)}" checked> {escape(value)}</label>'
                for value in values
            )
            parts.append(f"<fieldset><legend>{heading}</legend>{boxes}</fieldset>")
    if not parts:
        return ""
    return f'<form class="filters" aria-label="Show only" onsubmit="return false"><h2>Show</h2>{"".join(parts)}</form>'


def _overview(cells: Sequence[Cell]) -> str:
    note = "<p>Medians over runs of the medians over steps; in brackets the range of the runs. Heads sort.</p>"
    return note + _table("All configurations", tables.HEADS, [tables.row(cell) for cell in cells], cells, sortable=True)


def _table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], cells: Sequence[Cell], *, sortable: bool = False
) -> str:
    """A table whose rows lead to the runs of ``cells``; it scrolls by itself where it is too wide."""
    titles = (f'<button type="button">{escape(head)}</button>' if sortable else escape(head) for head in heads)
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    body = "\n".join(
        f'<tr data-cell="{cell.number}"><td>{_link(cell, row[0])}</td>'
        + "".join(f"<td>{escape(text)}</td>" for text in row[1:])
        + "</tr>"
        for row, cell in zip(rows, cells, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}, table">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _figure(figure: Figure, drawn: bool) -> str:
    said = escape(f"{figure.title}. {figure.caption} The numbers are in the table that follows.")
    chart = f'<div class="chart" role="img" aria-label="{said}"></div>' if drawn else ""
    table = _table(figure.title, figure.heads, figure.rows, figure.cells)
    opened = "" if drawn else " open"
    return (
        f'<section id="{figure.id}"><h2>{escape(figure.title)}</h2>\n<figure>{chart}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
        f"<details{opened}><summary>The numbers of this picture</summary>{table}</details></section>"
    )


def _skipped(found: Found) -> str:
    rows = "".join(f"<tr><td>{escape(skip.label)}</td><td>{escape(skip.why)}</td></tr>" for skip in found.skipped)
    head = '<tr><th scope="col">configuration</th><th scope="col">reason</th></tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Not run, table">'
        f"<table><thead>{head}</thead><tbody>{rows}</tbody></table></div>"
    )


def _cell_runs(cell: Cell) -> str:
    runs = "".join(_run(run) for run in cell.runs)
    words = f"{escape(cell.label)} <span class='soft'>({escape(cell.devices)}, {len(cell.runs)} runs)</span>"
    return (
        f'<section class="run" id="cell-{cell.number}"><details><summary>{words}</summary>{runs}</details></section>\n'
    )


def _run(run: Run) -> str:
    versions = run.environment.get("versions") or {}
    facts = {
        "run": f"{run.source}/{run.place}",
        "ended": run.state + ("" if run.timed else " (its speed does not count)"),
        "step": _step(run),
        "parity": str(run.parity.get("verdict") or "not checked"),
        "card": f"{run.gpus} × {run.card}",
        "commit": run.commit + (" with uncommitted changes" if run.environment.get("uncommitted_changes") else ""),
        "command": run.command,
        "started": str(run.environment.get("started_at") or run.environment.get("started") or "unknown"),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version),
    }
    return f"<dl>{''.join(_fact(name, text) for name, text in facts.items() if text)}</dl>"


def _step(run: Run) -> str:
    step = run.median("step_seconds")
    return "" if step is None else f"{1e3 * step:.4g} ms, median of {run.summary.get('steps_measured', 'its')} steps"


def _fact(name: str, text: str) -> str:
    shown = f"<code>{escape(text)}</code>" if name in ("run", "command") else escape(text)
    return f"<dt>{name}</dt><dd>{shown}</dd>"


def conclusions_markdown(sentences: Iterable[Sentence]) -> str:
    return "".join(f"- {plain(sentence)}\n" for sentence in sentences)
