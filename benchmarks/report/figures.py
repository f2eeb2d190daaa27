"""The pictures, in plotly's form: traces and layout as plain dicts, and the table behind each.

A trace's ``meta.cells`` says which cell each of its points is (one number: all of them), so that the page's filters can
leave points out and a click leads to the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report.cells import Cell
from benchmarks.report.conclusions import Change, interval, scaling_groups
from benchmarks.trace import KINDS
from commons.reporting.summary import quantile

# Legible on a light page and on a dark one; tests/benchmarks/test_report.py measures the contrast.
INK = "#757d86"
PLAN_STYLES = {
    "CAI_Gemini": ("#3a86d8", "circle"),
    "CAI_Hybrid": ("#a58209", "hexagon"),
    "CAI_ZeRO1": ("#cc5a94", "triangle-up"),
    "CAI_ZeRO2": ("#b0613f", "triangle-down"),
    "Pytorch_DDP": ("#2f9c6a", "square"),
    "Pytorch_ZeRO": ("#d0782a", "diamond"),
    "Pytorch_FSDP": ("#8d6fd1", "cross"),
}
OTHER_STYLE = ("#757d86", "x")
PHASES = (("forward", "#3a86d8"), ("backward", "#d0782a"), ("optimizer", "#2f9c6a"), ("other", "#757d86"))
WORK_COLOURS = ("#cc5a94", "#a58209", "#8d6fd1", "#3a86d8", "#2f9c6a", "#b0613f", "#757d86", "#d0782a")
KIND_COLOURS = ("#3a86d8", "#d0782a", "#2f9c6a", "#8d6fd1", "#a58209", "#cc5a94", "#757d86")
DASHES = ("solid", "dot", "dash", "longdash", "dashdot")
CURVE_POINTS = 200


@dataclass(frozen=True)
class Figure:
    """A picture with what it says for those who do not see it.

    Attributes:
        id: its anchor.
        title, caption: a heading, and a sentence on how it is read.
        traces, layout: plotly's.
        heads, rows: the table behind it; the first cell of a row is the configuration.
        cells: the cell of each row, for the link to its runs.
    """

    id: str
    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    cells: list[Cell]


def figures(cells: Sequence[Cell], found_changes: Sequence[Change]) -> list[Figure]:
    """All pictures that the cells have numbers for."""
    timed = [cell for cell in cells if cell.timed]
    drawn = [
        _changes(found_changes), _speed_and_memory(timed), _scaling(timed), _phases(timed), _work(cells),
        _memory(cells), _spread(timed), _losses(timed),
    ]  # fmt: skip
    return [figure for figure in drawn if figure.rows]


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title},
        "gridcolor": "rgba(117,125,134,0.25)",
        "zeroline": False,
        "automargin": True,
        **more,
    }


def _layout(x: str, y: str, rows: int = 0, **more: Any) -> dict[str, Any]:
    """On the page's own ground; ``rows``: horizontal bars, which need room each."""
    height = max(320, 120 + 26 * rows) if rows else 420
    return {
        "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)", "font": {"color": INK, "size": 13},
        "height": height, "margin": {"l": 60, "r": 16, "t": 16, "b": 50}, "hovermode": "closest",
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0},
        "xaxis": _axis(x, rangemode="tozero"), "yaxis": _axis(y, rangemode="tozero"), **more,
    }  # fmt: skip


def _bars_layout(x: str, labels: int) -> dict[str, Any]:
    layout = _layout(x, "", labels, barmode="stack")
    layout["yaxis"] = _axis("", autorange="reversed", type="category")
    layout["legend"] = {**layout["legend"], "traceorder": "normal"}
    return layout


def _style(cell: Cell) -> tuple[str, str]:
    return PLAN_STYLES.get(cell.plan, OTHER_STYLE)


def _number(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _names(cells: Sequence[Cell]) -> dict[int, str]:
    """A name for each cell that no other has, for axes of names."""
    labels = [cell.label for cell in cells]
    return {
        cell.number: cell.label if labels.count(cell.label) == 1 else f"{cell.label} [{cell.number}]" for cell in cells
    }


def _hover(cell: Cell) -> str:
    return f"{cell.label}<br>{cell.devices}<br>commit {cell.first.commit}, parity {cell.parity}"


# ---- speed against memory


def _speed_and_memory(cells: Sequence[Cell]) -> Figure:
    known = [cell for cell in cells if cell.speed and cell.memory_mib]
    traces = []
    for plan in dict.fromkeys(cell.plan for cell in known):
        mine = [cell for cell in known if cell.plan == plan]
        colour, symbol = _style(mine[0])
        traces.append({
            "type": "scatter", "mode": "markers", "name": plan,
            "x": [cell.memory_mib for cell in mine], "y": [(cell.speed or 0) / cell.gpus for cell in mine],
            "text": [_hover(cell) for cell in mine], "meta": {"cells": [cell.number for cell in mine]},
            "hovertemplate": "%{text}<br>%{x:,.0f} MiB, %{y:,.0f} tokens/s per device<extra></extra>",
            "marker": {"color": colour, "symbol": symbol, "size": 11},
        })  # fmt: skip
    for card in dict.fromkeys(cell.card for cell in known):
        for model in dict.fromkeys(cell.model for cell in known if cell.card == card):
            front = best_choices([cell for cell in known if (cell.card, cell.model) == (card, model)])
            if len(front) > 1:
                traces.append(_front(front, f"best choices, {model}, {card}"))
    layout = _layout("peak memory of a device, MiB", "tokens/s per device")
    shapes, notes = _limits(known)
    layout |= {"shapes": shapes, "annotations": notes}
    rows = [
        (cell.label, _number(cell.memory_mib, 0), _number((cell.speed or 0) / cell.gpus, 0), cell.parity, cell.devices)
        for cell in known
    ]
    return Figure(
        "speed-memory", "Speed against memory",
        "Up is faster, left needs less. The line joins the best choices of a size: nothing is faster with less memory.",
        traces, layout, ("configuration", "peak memory, MiB", "tokens/s per device", "parity", "devices"), rows, known,
    )  # fmt: skip


def best_choices(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no other beats in both speed per device and memory, by memory."""
    front: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.memory_mib or 0, -(cell.speed or 0) / cell.gpus)):
        if not front or (cell.speed or 0) / cell.gpus > (front[-1].speed or 0) / front[-1].gpus:
            front.append(cell)
    return front


def _front(front: Sequence[Cell], name: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "name": name, "hoverinfo": "skip", "line": {"color": INK, "shape": "hv"},
        "x": [cell.memory_mib for cell in front], "y": [(cell.speed or 0) / cell.gpus for cell in front],
        "meta": {"whole": True},
    }  # fmt: skip


def _limits(cells: Sequence[Cell]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A line where a device's memory ends, of those whose size is on record."""
    limits: dict[str, float] = {}
    for cell in cells:
        sizes = cell.first.environment.get("gpu_memory_mib") or []
        if sizes:
            limits[cell.card] = min(float(size) for size in sizes)
    line = {"color": "#d0782a", "dash": "dash", "width": 1.5}
    shapes = [
        {"type": "line", "x0": mib, "x1": mib, "yref": "paper", "y0": 0, "y1": 1, "line": line}
        for mib in limits.values()
    ]
    notes = [
        {"x": mib, "yref": "paper", "y": 0.02, "text": f"memory of {card}", "showarrow": False, "xanchor": "right"}
        for card, mib in limits.items()
    ]
    return shapes, notes


# ---- scaling


def _scaling(cells: Sequence[Cell]) -> Figure:
    traces, rows, shown = [], [], []
    for number, (name, group) in enumerate(scaling_groups(cells).items()):
        colour, symbol = _style(group[0])
        counts, first = [cell.gpus for cell in group], group[0]
        base = (first.speed or 0) / first.gpus
        line = {"color": colour, "dash": DASHES[number % len(DASHES)]}
        traces.append({
            "type": "scatter", "mode": "lines+markers", "name": name, "x": counts, "y": [cell.speed for cell in group],
            "text": [_hover(cell) for cell in group], "meta": {"cells": [cell.number for cell in group]},
            "hovertemplate": "%{text}<br>%{x} devices: %{y:,.0f} tokens/s<extra></extra>",
            "line": line, "marker": {"symbol": symbol, "size": 9},
        })  # fmt: skip
        traces.append({
            "type": "scatter", "mode": "lines", "name": f"ideal: {name}", "x": counts, "y": [base * n for n in counts],
            "hoverinfo": "skip", "line": {"color": colour, "width": 1, "dash": "dot"}, "showlegend": False,
            "meta": {"whole": True},
        })  # fmt: skip
        for cell in group:
            kept = 100 * (cell.speed or 0) / cell.gpus / base
            rows.append((cell.label, name, str(cell.gpus), _number(cell.speed, 0), f"{kept:.1f} %", cell.parity))
            shown.append(cell)
    return Figure(
        "scaling", "Scaling",
        "Tokens per second of all devices; the thin dotted line is what the smallest number would give without a loss.",
        traces, _layout("devices", "tokens/s, all devices"),
        ("configuration", "series", "devices", "tokens/s", "of the ideal", "parity"), rows, shown,
    )  # fmt: skip


# ---- where a step's time goes


def _phases(cells: Sequence[Cell]) -> Figure:
    known = [cell for cell in cells if cell.median("step_seconds") and cell.median("forward_seconds") is not None]
    names = _names(known)
    parts = {cell.number: phases(cell) for cell in known}
    traces = [
        _bar(name, colour, [parts[cell.number][name] for cell in known], known, names, "ms") for name, colour in PHASES
    ]
    rows = [(cell.label, *(_number(parts[cell.number][name]) for name, _ in PHASES), cell.parity) for cell in known]
    return Figure(
        "phases", "Phases of a step",
        "Medians over the measured steps; communication that overlaps a pass is inside of it.",
        traces, _bars_layout("ms of a step", len(known)),
        ("configuration", *(f"{name}, ms" for name, _ in PHASES), "parity"), rows, known,
    )  # fmt: skip


def phases(cell: Cell) -> dict[str, float]:
    """Milliseconds of a median step by phase; "other" is what is left of it."""
    known = {name: 1e3 * (cell.median(f"{name}_seconds") or 0.0) for name in ("forward", "backward", "optimizer")}
    return {**known, "other": max(0.0, 1e3 * (cell.median("step_seconds") or 0.0) - sum(known.values()))}


def _bar(
    name: str, colour: str, values: list[Any], cells: Sequence[Cell], names: dict[int, str], unit: str
) -> dict[str, Any]:
    return {
        "type": "bar", "orientation": "h", "name": name, "x": values, "y": [names[cell.number] for cell in cells],
        "marker": {"color": colour}, "meta": {"cells": [cell.number for cell in cells]},
        "text": [_hover(cell) for cell in cells], "textposition": "none",
        "hovertemplate": f"%{{text}}<br>{name}: %{{x:,.1f}} {unit}<extra></extra>",
    }  # fmt: skip


HIDDEN, EXPOSED, IDLE = "communication and copies hidden", "communication and copies exposed", "idle"
COMPUTING = tuple(kind for kind, _ in KINDS if kind not in ("communication", "copies between host and device"))
WORK = (*COMPUTING, EXPOSED, IDLE)


def _work(cells: Sequence[Cell]) -> Figure:
    """What the device did in a traced step."""
    traced = [
        (cell, next(run.work for run in cell.runs if run.work)) for cell in cells if any(r.work for r in cell.runs)
    ]
    known = [cell for cell, _ in traced]
    names = _names(known)
    parts = {cell.number: work_parts(dict(work)) for cell, work in traced}
    kinds = [kind for kind in WORK if any(parts[cell.number].get(kind) for cell in known)]
    traces = [
        _bar(kind, WORK_COLOURS[WORK.index(kind) % len(WORK_COLOURS)], [parts[c.number].get(kind, 0.0) for c in known],
             known, names, "ms")
        for kind in kinds
    ]  # fmt: skip
    shown = [*kinds, HIDDEN]
    rows = [(c.label, *(_number(parts[c.number].get(kind, 0.0), 2) for kind in shown), c.parity) for c in known]
    return Figure(
        "work", "Where the time of a step goes",
        "A traced step on rank 0: kernels by kind, then communication and copies that they did not hide, and idle.",
        traces, _bars_layout("ms of the device", len(known)),
        ("configuration", *(f"{kind}, ms" for kind in shown), "parity"), rows, known,
    )  # fmt: skip


def work_parts(work: dict[str, float]) -> dict[str, float]:
    """The rows of benchmarks.trace as parts of a step, and what of communication and copies ran beside computation."""
    parts = {kind: work[kind] for kind in COMPUTING if kind in work}
    beside = sum(work.get(kind, 0.0) for kind in ("communication", "copies between host and device"))
    exposed = work.get("not hidden by computation", 0.0)
    return {**parts, EXPOSED: exposed, IDLE: work.get("idle", 0.0), HIDDEN: max(0.0, beside - exposed)}


# ---- memory, spread, losses


def _memory(cells: Sequence[Cell]) -> Figure:
    """The peak, and beside it the planner's forecast by kind where the run has one."""
    known = [cell for cell in cells if cell.memory_mib]
    names = _names(known)
    forecasts = {cell.number: _forecast(cell) for cell in known}
    kinds = list(dict.fromkeys(kind for forecast in forecasts.values() for kind in forecast))
    traces = [
        _bar(f"forecast: {kind}", KIND_COLOURS[number % len(KIND_COLOURS)],
             [forecasts[cell.number].get(kind, 0.0) for cell in known], known, names, "MiB")
        for number, kind in enumerate(kinds)
    ]  # fmt: skip
    measured = {
        "type": "scatter", "mode": "markers", "name": "measured peak", "x": [cell.memory_mib for cell in known],
        "y": [names[cell.number] for cell in known], "text": [_hover(cell) for cell in known],
        "marker": {"color": INK, "symbol": "diamond", "size": 11}, "meta": {"cells": [cell.number for cell in known]},
        "hovertemplate": "%{text}<br>measured: %{x:,.0f} MiB<extra></extra>",
    }  # fmt: skip
    rows = [
        (cell.label, _number(cell.memory_mib, 0), *(_number(forecasts[cell.number].get(kind), 0) for kind in kinds),
         cell.devices)
        for cell in known
    ]  # fmt: skip
    heads = ("configuration", "measured peak, MiB", *(f"forecast: {kind}, MiB" for kind in kinds), "devices")
    return Figure(
        "memory", "Memory",
        "The most that tensors held on a device (on a CPU: the process), over the forecast by kind where there is one.",
        [*traces, measured], _bars_layout("MiB", len(known)), heads, rows, known,
    )  # fmt: skip


def _forecast(cell: Cell) -> dict[str, float]:
    kinds = next((run.forecast.get("kinds_mib") for run in cell.runs if run.forecast), None) or {}
    return {str(kind): float(mib) for kind, mib in kinds.items()}


def _spread(cells: Sequence[Cell]) -> Figure:
    """Of the step times of all runs together, after their warm-up."""
    times = {cell.number: step_times(cell) for cell in cells}
    known = [cell for cell in cells if len(times[cell.number]) > 1]
    names = _names(known)
    traces, rows = [], []
    for cell in known:
        p0, p10, p50, p90, p100 = (quantile(times[cell.number], share) for share in (0, 0.1, 0.5, 0.9, 1))
        q1, q3 = (quantile(times[cell.number], share) for share in (0.25, 0.75))
        traces.append({
            "type": "box", "orientation": "h", "name": names[cell.number], "y": [names[cell.number]], "q1": [q1],
            "median": [p50], "q3": [q3], "lowerfence": [p10], "upperfence": [p90], "showlegend": False,
            "marker": {"color": _style(cell)[0]}, "meta": {"cells": cell.number},
        })  # fmt: skip
        figures = (_number(value, 2) for value in (p0, p10, p50, p90, p100))
        rows.append((cell.label, str(len(times[cell.number])), *figures, cell.parity))
    layout = _bars_layout("ms of a step", len(known))
    return Figure(
        "spread", "Spread of step times",
        "Boxes from the first to the third quartile, whiskers from p10 to p90, all runs.",
        traces, layout, ("configuration", "steps", "least, ms", "p10", "median", "p90", "most", "parity"), rows, known,
    )  # fmt: skip


def step_times(cell: Cell) -> list[float]:
    """Milliseconds of every measured step of the timed runs, sorted."""
    return sorted(
        1e3 * float(step["step_seconds"])
        for run in cell.timed
        for step in run.steps
        if step.get("step_seconds") is not None and step.get("step", 0) > (run.summary.get("warmup_step") or 0)
    )


def _losses(cells: Sequence[Cell]) -> Figure:
    """The first run of each cell."""
    traces, rows, known = [], [], []
    for cell in cells:
        points = [(s["step"], s["loss"]) for s in cell.first.steps if s.get("step") and s.get("loss") is not None]
        if not points:
            continue
        known.append(cell)
        every = -(-len(points) // CURVE_POINTS)
        drawn = [*points[::every], *([points[-1]] if (len(points) - 1) % every else [])]
        traces.append({
            "type": "scatter", "mode": "lines", "name": cell.label, "x": [step for step, _ in drawn],
            "y": [round(loss, 5) for _, loss in drawn], "meta": {"cells": cell.number},
            "line": {"color": _style(cell)[0], "dash": DASHES[len(traces) % len(DASHES)]},
        })  # fmt: skip
        rows.append((cell.label, f"{points[0][1]:.4f}", f"{points[-1][1]:.4f}", str(points[-1][0]), cell.parity))
    layout = _layout("step", "loss, nats per token")
    layout["yaxis"] = _axis("loss, nats per token")
    return Figure(
        "loss", "Loss",
        "The first run of each configuration. With the same data and seed, curves lie on top of each other.",
        traces, layout, ("configuration", "first", "last", "steps", "parity"), rows, known,
    )  # fmt: skip


# ---- before and after


def _changes(found: Sequence[Change]) -> Figure:
    cells = [change.after for change in found]
    names = _names(cells)
    percents = [100 * (change.step.ratio - 1) for change in found]
    edges = [
        [100 * ((change.step.ratio if edge is None else edge) - 1) for edge in (change.step.low, change.step.high)]
        for change in found
    ]
    traces = [{
        "type": "scatter", "mode": "markers", "name": "step time after, against before", "x": percents,
        "y": [names[cell.number] for cell in cells], "text": [change.verdict for change in found],
        "error_x": {
            "type": "data", "symmetric": False, "color": INK,
            "array": [high - middle for (_, high), middle in zip(edges, percents, strict=True)],
            "arrayminus": [middle - low for (low, _), middle in zip(edges, percents, strict=True)],
        },
        "marker": {"color": [_style(cell)[0] for cell in cells], "size": 10},
        "meta": {"cells": [cell.number for cell in cells]},
        "hovertemplate": "%{y}: %{x:+.2f} %: %{text}<extra></extra>",
    }]  # fmt: skip
    layout = _bars_layout("change of step time, %", len(cells))
    layout["xaxis"] = _axis("change of step time, %", zeroline=True, zerolinecolor=INK)
    rows = [
        (change.after.label, _number(1e3 * (change.before.median("step_seconds") or 0), 3),
         _number(1e3 * (change.after.median("step_seconds") or 0), 3), f"{percent:+.2f} %",
         interval(change.step) if change.step.is_judged else "–", change.verdict,
         f"{change.before.parity}, {change.after.parity}")
        for change, percent in zip(found, percents, strict=True)
    ]  # fmt: skip
    return Figure(
        "changes", "Before and after",
        "The change of the step time with its interval at 99 %, from the noise of the runs; right of zero is slower.",
        traces, layout, ("configuration", "before, ms", "after, ms", "change", "interval", "verdict", "parity"),
        rows, cells,
    )  # fmt: skip
