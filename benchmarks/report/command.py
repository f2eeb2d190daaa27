"""The command: reads folders, writes report.html, report.md, report.csv and records.json."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.cells import Cell, group
from benchmarks.report.conclusions import Change, Sentence, change_sentences, changes, conclude, plain
from benchmarks.report.figures import figures
from benchmarks.report.page import WITHOUT_PLOTLY, conclusions_markdown, page, read_plotly
from benchmarks.report.reading import Found, read

DESCRIPTION = """Makes a page of runs and sweeps, a Markdown table, a CSV, and records for benchmarks/results.

    python -m benchmarks.report my_sweep                           my_sweep/report.html, .md, .csv, records.json
    python -m benchmarks.report after --before before --out both   is it faster, given the noise of the runs?

Folders of sweeps, of runs (gemini_logs) and result files of benchmarks/results can be mixed.
Exit code: 0; 1 when something is missing or to be minded, of which there is a line, and the rest is made; 2 when
nothing could be made."""
NOTHING = 2


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.report", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders or result files")
    parser.add_argument("--before", nargs="+", type=Path, default=[], metavar="DIR", help="what to compare with")
    parser.add_argument("--out", type=Path, help="folder to write to (default: the first DIR, beside a file)")
    arguments = parser.parse_args(list(argv))
    found = read([*arguments.folders, *(path for path in arguments.before if path not in arguments.folders)])
    cells = group(found.runs)
    if not cells:
        _tell([*found.problems, "nothing to report"])
        return NOTHING
    first = arguments.folders[0]
    out = arguments.out or (first if first.is_dir() else first.parent)
    command = shlex.join(["python", "-m", "benchmarks.report", *argv])
    before = {str(path) for path in arguments.before}
    try:
        written = _write(out, cells, found, before, command)
    except OSError as error:
        _tell([f"--out {out}: {error.strerror}: choose a folder that can be written to"])
        return NOTHING
    print("\n".join(map(str, written)))
    _tell(found.problems)
    return 1 if found.problems else 0


def _write(out: Path, cells: Sequence[Cell], found: Found, before: set[str], command: str) -> list[Path]:
    """The four files. What is missing is added to ``found.problems``."""
    compared = compare_folders(cells, before, found)
    sentences: list[Sentence] = [*(change_sentences(compared) if before else ()), *conclude(cells, found)]
    plotly = read_plotly()
    text = page(cells, found, sentences, figures(cells, compared), plotly)
    if plotly is None:
        found.problems.append(WITHOUT_PLOTLY)
    files = {
        "report.html": text,
        "report.md": f"`{command}`\n\n{conclusions_markdown(sentences)}\n{tables.markdown(cells, found)}",
        "report.csv": tables.as_csv(cells),
        "records.json": json.dumps(tables.records(cells, command), indent=1, sort_keys=True) + "\n",
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (out / name).write_text(content, encoding="utf-8")
    for sentence in sentences:
        print(f"- {plain(sentence)}")
    return [out / name for name in files]


def compare_folders(cells: Sequence[Cell], before: set[str], found: Found) -> list[Change]:
    """The changes from the folders ``before`` to the others; what cannot be compared becomes a problem."""
    if not before:
        return []
    old, new = ([cell for cell in cells if (cell.first.source in before) is wanted] for wanted in (True, False))
    compared = changes(old, new)
    if not compared:
        found.problems.append("before and after have no configuration in common on the same card: nothing to compare")
    elif all(not change.step.is_judged for change in compared):
        found.problems.append("before and after have fewer than 3 runs each: their noise is not known (--repeats 5)")
    return compared


def _tell(problems: Sequence[str]) -> None:
    for problem in problems:
        print(f"benchmarks.report: {problem}", file=sys.stderr)
