"""The pictures of README.md and docs/, as SVG files: made from the table of plans, the rooms and the result files.

    python -m benchmarks.images         writes docs/images/*.svg
    python -m benchmarks.images --out DIR

Plain SVG instead of a drawing library: the same input gives the same bytes on every machine, a change shows in a diff,
and the documentation needs no package. The background is transparent; every colour is legible on a white page and on a
dark one, because a page's theme does not reach the media queries of an image in every browser.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from commons.config.schema import FRACTIONS, PLACEMENTS
from commons.plans.registry import MODEL_STATES, PLANS, Plan

REPOSITORY = Path(__file__).resolve().parent.parent
IMAGES = REPOSITORY / "docs" / "images"
RESULTS = REPOSITORY / "benchmarks" / "results"

# tests/test_images.py: text has at least 4:1 of contrast on both pages, fills at least 3:1
PAGES = {"light": "#ffffff", "dark": "#0d1117"}
INK = "#757d86"
STATE_COLOURS = dict(zip(MODEL_STATES, ("#3a86d8", "#d0782a", "#2f9c6a"), strict=True))
PLAN_COLOURS = {
    "CAI_Gemini": "#3a86d8",
    "Pytorch_DDP": "#2f9c6a",
    "Pytorch_ZeRO": "#d0782a",
    "Pytorch_FSDP": "#8d6fd1",
}
FONT = "font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\""
MONOSPACE = "font-family=\"ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace\""


def text(
    x: float, y: float, words: str, *, size: int = 13, bold: bool = False, code: bool = False, at: str = ""
) -> str:
    """A line of text; ``at``: "middle" or "end" of it is at ``x``, otherwise its start."""
    weight = ' font-weight="600"' if bold else ""
    anchor = f' text-anchor="{at}"' if at else ""
    font = f" {MONOSPACE}" if code else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}"{weight}{anchor}{font} fill="{INK}">{escape(words)}</text>'


def rect(x: float, y: float, width: float, height: float, style: str, radius: float = 2) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" {style}/>'


def line(x1: float, y1: float, x2: float, y2: float, style: str = "") -> str:
    return f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" stroke="{INK}" fill="none" {style}/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return line(x1, y1, x2, y2, 'stroke-width="1.5" marker-end="url(#head)"')


def svg(width: int, height: int, title: str, parts: Iterable[str]) -> str:
    """A whole picture; ``title`` is what a screen reader says."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        f' role="img" {FONT}>'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
    )
    return "\n".join([head, f"<title>{escape(title)}</title>", marker, *parts, "</svg>", ""])


# ---- what two ranks hold


@dataclass(frozen=True)
class Holding:
    """A row of the picture of plans.

    Attributes:
        sharded: the model states of which each of two ranks holds its own half; of the others it holds all.
        host: fraction of each model state that is on the host between uses.
    """

    plan: str
    flags: str
    sharded: Sequence[str]
    host: dict[str, float]


def holdings(plan: Plan) -> list[Holding]:
    """What two ranks hold by default, and under the settings that the plan is taken for."""
    rows = [Holding(plan.name, "", plan.sharded, {})]
    if plan.placement:
        _, optimizer, parameters = (PLACEMENTS["cpu"][FRACTIONS.index(name)] for name in FRACTIONS)
        # Gemini's gradients take the place of the parameters' chunks
        host = dict(zip(MODEL_STATES, (parameters, parameters, optimizer), strict=True))
        rows.append(Holding("", "--placement cpu", plan.sharded, host))
    if plan.pipeline:
        rows.append(Holding("", "--tp_degree 2 or --pp_degree 2", MODEL_STATES, {}))
    return rows


def plans_picture() -> str:
    rows = [row for plan in PLANS.values() for row in holdings(plan)]
    left, bar, gap, row_height, top = 236, 280, 44, 50, 78
    parts = []
    for number, (state, colour) in enumerate(STATE_COLOURS.items()):
        x = left - 48 + number * 126
        parts += [rect(x, 10, 22, 10, f'fill="{colour}"'), text(x + 28, 20, state)]
    x = left - 48 + 3 * 126 + 34
    parts += [rect(x + 1, 10, 22, 10, _on_host(INK)), text(x + 30, 20, "on the host between uses")]
    parts += [text(left + rank * (bar + gap), top - 22, f"rank {rank}", bold=True) for rank in (0, 1)]
    for number, row in enumerate(rows):
        y = top + number * row_height
        if row.plan:
            parts.append(line(8, y - 10, left + 2 * bar + gap, y - 10, 'stroke-opacity="0.35"'))
        if row.plan:
            parts.append(text(8, y + 20, row.plan, bold=True))
        parts.append(text(8, y + 20, row.flags, size=12, code=True) if row.flags else "")
        for rank in (0, 1):
            x = left + rank * (bar + gap)
            for index, state in enumerate(MODEL_STATES):
                parts += _share(x, y + 12 * index, bar, row, state, rank)
    height = top + len(rows) * row_height
    title = "What each of two ranks holds under each plan: parameters, gradients and optimizer states"
    return svg(left + 2 * bar + gap + 12, height, title, filter(None, parts))


def _share(x: float, y: float, width: float, row: Holding, state: str, rank: int) -> list[str]:
    """One bar: the outline is the whole model, the filled part what this rank holds of it."""
    share = 0.5 if state in row.sharded else 1.0
    begin, colour = x + (width * share * rank if share < 1 else 0), STATE_COLOURS[state]
    track = rect(x, y, width, 8, f'fill="{colour}" fill-opacity="0.16"')
    on_host = row.host.get(state, 0.0)
    held = width * share
    parts = [track]
    if on_host < 1:
        parts.append(rect(begin, y, held * (1 - on_host), 8, f'fill="{colour}"'))
    if on_host > 0:
        parts.append(rect(begin + held * (1 - on_host) + 0.75, y + 0.75, held * on_host - 1.5, 6.5, _on_host(colour)))
    return parts


def _on_host(colour: str) -> str:
    return f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="4 2.5"'


# ---- measured speed


@dataclass(frozen=True)
class Measured:
    """A case of a result file.

    Attributes:
        plan, note: what the bar is called.
        case: its label in the file.
    """

    plan: str
    note: str
    case: str


@dataclass(frozen=True)
class Panel:
    """Cases that were measured in turn on one machine; ``results``: the file, below benchmarks/results."""

    title: str
    results: str
    cases: tuple[Measured, ...]


PANELS = (
    Panel(
        "gpt2_medium",
        "2026-11-27-h100/speed.json",
        (
            Measured("CAI_Gemini", "1 GPU", "CAI_Gemini, gpt2_medium × 1"),
            Measured("Pytorch_DDP", "2 GPUs", "Pytorch_DDP, gpt2_medium × 2"),
            Measured("Pytorch_ZeRO", "2 GPUs", "Pytorch_ZeRO, gpt2_medium × 2"),
            Measured("Pytorch_FSDP", "2 GPUs", "Pytorch_FSDP, gpt2_medium × 2"),
        ),
    ),
    Panel(
        "gpt2_xl",
        "2026-11-27-h100/speed.json",
        (
            Measured("CAI_Gemini", "1 GPU", "CAI_Gemini, gpt2_xl × 1"),
            Measured("CAI_Gemini", "2 GPUs", "CAI_Gemini, gpt2_xl × 2"),
            Measured("Pytorch_FSDP", "2 GPUs", "Pytorch_FSDP, gpt2_xl × 2"),
        ),
    ),
    Panel(
        "gpt2_xl, another host",
        "2026-11-26-h100-replicated/overlap.json",
        (
            Measured("CAI_Gemini", "1 GPU, the first", "CAI_Gemini, gpt2_xl × 1"),
            Measured("CAI_Gemini", "1 GPU, the last", "CAI_Gemini, last GPU, gpt2_xl × 1"),
            Measured("CAI_Gemini", "2 GPUs, parameters sharded", "CAI_Gemini, prefetch 2, gpt2_xl × 2"),
            Measured("CAI_Gemini", "2 GPUs, --shard_param_frac 0", "CAI_Gemini, replicated, gpt2_xl × 2"),
        ),
    ),
)


def medians(results: str, case: str, quantity: str) -> list[float]:
    """The medians of every run of a case, as the file has them."""
    cases = json.loads((RESULTS / results).read_text())["cases"]
    runs = next(entry["runs"] for entry in cases if entry["label"] == case)
    return [run[quantity]["median"] for run in runs]


def speed_picture() -> str:
    left, bar, row_height = 304, 440, 24
    scale = bar / 600  # pixels per TFLOPS
    parts, y = [text(left, 18, "model TFLOPS per GPU; line: range of the runs", size=12)], 40
    top = y - 8
    for panel in PANELS:
        parts.append(text(8, y + 14, panel.title, bold=True))
        y += row_height
        for case in panel.cases:
            values = medians(panel.results, case.case, "model_tflops_per_device")
            middle, low, high = statistics.median(values), min(values), max(values)
            colour = PLAN_COLOURS[case.plan]
            parts += [
                text(8, y + 14, case.plan, size=12),
                text(112, y + 14, case.note, size=12),
                rect(left, y + 2, middle * scale, 16, f'fill="{colour}"'),
                line(left + low * scale, y + 10, left + high * scale, y + 10, 'stroke-width="2"'),
                text(left + high * scale + 8, y + 14, f"{middle:.0f}", size=12, bold=True),
            ]
            y += row_height
        y += 10
    axis = [line(left, top, left, y - 10, 'stroke-opacity="0.6"')]
    title = "Measured speed on one and two NVIDIA H100 GPUs, bf16, batch 16 per GPU, sequence 1024"
    return svg(left + bar + 60, y, title, [*axis, *parts])


# ---- the way through the rooms


@dataclass(frozen=True)
class Stop:
    """A place on the way of a run.

    Attributes:
        room: a folder below commons/, or a file at the top.
        symbol: what is defined there; a picture that names something which is gone is not drawn.
        caption: what happens there, at most two lines.
    """

    room: str
    symbol: str
    caption: tuple[str, ...]


WAY = (
    Stop("launch", "run_ranks", ("starts the ranks,", "watches over them")),
    Stop("cli", "read_config", ("command line to", "checked settings")),
    Stop("config", "TrainConfig", ("every setting; what", '"auto" stands for')),
    Stop("plans", "PLANS", ("wraps model and", "optimizer")),
    Stop("training", "train_steps", ("one optimizer step", "after another")),
    Stop("reporting", "StepRecord", ("one record per step:", "files and console")),
)
# What some of them lean on: the number of the stop above, and the room below it.
BELOW = (
    (0, Stop("lifecycle", "Guard", ("signals, errors, hangs;", "how a run ends"))),
    (1, Stop("doctor", "diagnose", ("what is wrong with", "this machine"))),
    (2, Stop("distributed", "Device", ("process group, places,", "copies between GPUs"))),
    (3, Stop("model", "gpt2_functions", ("GPT-2 as functions,", "compiled, captured"))),
    (4, Stop("data", "random_tokens", ("batches of tokens,", "seeded per sample"))),
)


def is_defined(room: str, symbol: str) -> bool:
    """Whether a module of the room has a function, a class or a table of this name."""
    for path in sorted((REPOSITORY / "commons" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == symbol:
                return True
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == symbol for target in targets):
                    return True
    return False


def way_picture() -> str:
    width, height, gap, top = 138, 76, 18, 34
    lower = top + height + 34
    parts = [text(8, 18, "train_gpt_demo.py: the way of one run through the rooms of commons/", bold=True)]
    for number, stop in enumerate(WAY):
        x = 8 + number * (width + gap)
        parts += _stop(x, top, width, height, stop, main=True)
        if number:
            parts.append(arrow(x - gap + 1, top + height / 2, x - 1, top + height / 2))
    for column, stop in BELOW:
        x = 8 + column * (width + gap)
        parts += [line(x + width / 2, top + height, x + width / 2, lower, 'stroke-dasharray="3 3"')]
        parts += _stop(x, lower, width, height, stop, main=False)
    x = 8 + (len(WAY) - 1) * (width + gap)
    parts.append(arrow(x + width / 2, top + height, x + width / 2, lower - 1))
    names = ("metrics.jsonl", "summary.json", "config.json", "env.json", "console.log")
    parts += [text(x + 4, lower + 13 + 15 * row, name, size=11, code=True) for row, name in enumerate(names)]
    title = "The way of a run: " + ", ".join(f"{stop.room}/ ({stop.symbol})" for stop in WAY)
    return svg(16 + len(WAY) * (width + gap) - gap, lower + height + 8, title, parts)


def _stop(x: float, y: float, width: float, height: float, stop: Stop, *, main: bool) -> list[str]:
    assert is_defined(stop.room, stop.symbol), f"commons/{stop.room} has no {stop.symbol}: say in WAY what there is"
    colour = STATE_COLOURS[MODEL_STATES[0]] if main else INK
    style = f'fill="{colour}" fill-opacity="0.1" stroke="{colour}" stroke-width="{1.5 if main else 1}"'
    return [
        rect(x, y, width, height, style, radius=6),
        text(x + 8, y + 18, f"{stop.room}/", bold=True),
        text(x + 8, y + 35, stop.symbol, size=11, code=True),
        *(text(x + 8, y + 53 + 14 * row, words, size=11) for row, words in enumerate(stop.caption)),
    ]


def floors_picture() -> str:
    """The rooms by floor, as tests/test_rooms.py enforces them."""
    floors, left, row_height, box_gap = read_floors(), 12, 44, 10
    parts = [
        text(left, 18, "A room may import every room on a floor below its own, and none beside or above.", size=12)
    ]
    for number, rooms in enumerate(floors):
        y, x = 32 + number * row_height, float(left)
        for room in rooms:
            name = f"{room}/" if (REPOSITORY / "commons" / room).is_dir() or room == "benchmarks" else f"{room}.py"
            width = 24 + 8.2 * len(name)
            style = f'fill="{INK}" fill-opacity="0.1" stroke="{INK}"'
            parts += [rect(x, y, width, 30, style, radius=6), text(x + width / 2, y + 20, name, bold=True, at="middle")]
            x += width + box_gap
    bottom = 32 + len(floors) * row_height
    parts += [arrow(520, 40, 520, bottom - 20), text(532, (32 + bottom) / 2, "imports", size=12)]
    return svg(640, bottom, "The rooms of the suite by floor; imports point down", parts)


def read_floors() -> tuple[tuple[str, ...], ...]:
    """The table FLOORS of tests/test_rooms.py, without importing the tests."""
    path = next((REPOSITORY / "tests").rglob("test_rooms.py"))
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FLOORS":
            return ast.literal_eval(node.value)
    raise ValueError(f"{path} has no table FLOORS: name it so, or read it from where it is now")


PICTURES: dict[str, Callable[[], str]] = {
    "plans.svg": plans_picture,
    "speed.svg": speed_picture,
    "way.svg": way_picture,
    "floors.svg": floors_picture,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=IMAGES, help="folder to write to")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw())
        print(folder / name)


if __name__ == "__main__":
    main()
