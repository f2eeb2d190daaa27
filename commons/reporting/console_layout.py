"""How a run looks on the console: header, step lines and the table at the end, as lines of text.

Only the layout: nothing here writes, and nothing asks for a terminal. Every line fits into 80 columns where
the names do; what a wide window has room for beyond that comes in as further columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.text import Text

from commons.reporting.header import RunHeader
from commons.reporting.record import StepRecord

HEADS_EVERY_ROWS = 25  # the column heads come again, so that they never scroll far out of sight
LABEL_WIDTH = 9
SHAPE = ("layers", "hidden", "heads")
OVERFLOW = "overflow"
ALARMS = {"nan": "bold red", "inf": "bold red", "-inf": "bold red", OVERFLOW: "bold yellow"}


# --- Numbers as text ------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """About `digits` significant digits, thousands in commas; "-" for what is not known."""
    if value is None:
        return "-"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        return f"{value:.0e}"
    most_decimals = digits if magnitude < 0 else digits - 1  # 0.0213 rather than 0.02130
    return f"{value:,.{max(0, min(digits - 1 - magnitude, most_decimals))}f}"


def whole(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 or not math.isfinite(value) else number(value, 3)


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def short_count(value: int | None) -> str | None:
    """About three digits and the power of ten as a letter: 1.23M; None for what is not known."""
    if value is None:
        return None
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{number(value / size, 3)}{letter}"
    return str(value)


def duration(seconds: float | None) -> str | None:
    """Minutes and seconds, with hours and days where there are any; None for what is not known."""
    if seconds is None:
        return None
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def joined(parts: Sequence[str]) -> str:
    return " · ".join(part for part in parts if part)


# --- Header ---------------------------------------------------------------------------------------


def header_lines(header: RunHeader, run_dir: str) -> list[Text]:
    """The header block, with an empty line before and after it."""
    rows = [
        ("model", joined([header.model, *(f"{getattr(header, name):,} {name}" for name in SHAPE)])),
        ("", _parameters(header)),
        ("plan", joined([header.plan, f"placement {header.placement}" if header.placement else ""])),
        ("ranks", f"{header.world_size} = dp {header.dp} × tp {header.tp} × pp {header.pp}"),
        *(("", place) for place in header.places),
        ("batch", _batch(header)),
        *([("data", _data(header))] if header.data else []),
        ("compute", _compute(header)),
        ("device", _device(header)),
        ("run", run_dir),
        *(("note", note) for note in header.notes),
    ]
    lines = [
        Text.assemble((label.ljust(LABEL_WIDTH), "cyan"), (text, "bold" if label == "model" else ""))
        for label, text in rows
    ]
    return [Text(), *lines, Text()]


def _parameters(header: RunHeader) -> str:
    exact, padded = header.parameters, header.padded_parameters
    extra = "" if padded == exact else f" ({padded:,} with the vocabulary padded)"
    return f"{exact:,} parameters{extra}"


def _batch(header: RunHeader) -> str:
    return joined(
        [
            f"{header.micro_batch_size} per rank",
            f"{header.grad_accum} accumulated" if header.grad_accum > 1 else "",
            f"{header.global_batch_size} in all",
            f"sequence {header.seq_len:,}",
            f"{header.global_batch_size * header.seq_len:,} tokens",
        ]
    )


def _data(header: RunHeader) -> str:
    epochs = "" if header.epochs is None else f"{number(header.epochs, 3)} epochs planned"
    return joined([header.data, epochs])


def _compute(header: RunHeader) -> str:
    return joined(
        [
            header.precision,
            f"attention {header.attention}",
            f"activation checkpointing {header.activation_checkpointing}",
            "captured graph" if header.cuda_graph else "",
            "copies between ranks" if header.peer_copies else "",
        ]
    )


def _device(header: RunHeader) -> str:
    peak = header.peak_tflops_per_device
    several = header.world_size > 1 and header.device == "cuda"  # CPU ranks share one processor
    name = f"{header.world_size} × {header.device_name}" if several else header.device_name
    return joined([name, f"peak {number(peak)} TFLOPS" if peak else ""])


# --- Step lines -----------------------------------------------------------------------------------


def _phases(record: StepRecord) -> str | None:
    parts = (record.forward_seconds, record.backward_seconds, record.optimizer_seconds)
    if all(part is None for part in parts):
        return None
    return "/".join("-" if part is None else number(part * 1e3, 3 if part < 0.01 else 1) for part in parts)


def _at_rank(mib: float | None, rank: int | None) -> str | None:
    if mib is None:
        return None
    return f"{mib:,.0f}" + ("" if rank is None else f"@{rank}")


class Column(NamedTuple):
    """A column of the step lines. `cell` returns None where a record has no such figure."""

    title: str
    width: int
    importance: int  # the least important go first when the window is narrow
    cell: Callable[[StepRecord], str | None]
    style: str = ""


COLUMNS = (
    Column("loss", 7, 9, lambda r: f"{r.loss:.4f}", "bold"),
    Column("step ms", 7, 9, lambda r: milliseconds(r.step_seconds)),
    Column("fwd/bwd/opt", 11, 4, _phases),
    Column("tokens/s", 8, 8, lambda r: whole(r.tokens_per_second)),
    Column("TFLOPS", 6, 9, lambda r: number(r.model_tflops_per_device), "green"),
    Column("hw TFLOPS", 9, 1, lambda r: number(r.hardware_tflops_per_device)),
    Column("MFU", 5, 5, lambda r: None if r.mfu is None else percent(r.mfu), "green"),
    Column("peak MiB", 8, 7, lambda r: _at_rank(r.device_memory_peak_mib, r.device_memory_peak_rank)),
    Column("host MiB", 8, 3, lambda r: _at_rank(r.host_memory_mib, r.host_memory_peak_rank)),
    Column("lr", 8, 2, lambda r: f"{r.lr:.2e}"),
    Column("grad norm", 9, 6, lambda r: None if r.grad_norm is None else number(r.grad_norm)),
)
# Of a long training: how far it is.
TOKENS_SEEN = Column("seen", 5, 6, lambda r: short_count(r.tokens_seen))
TIME_LEFT = Column("ETA", 8, 8, lambda _: None)
ALL_COLUMNS = (*COLUMNS, TOKENS_SEEN, TIME_LEFT)


class StepLines:
    """Lays out the step lines: which columns there are, their heads, a line per record.

    Columns are chosen once and stay, until a figure that was unknown comes up or the window's width changes.

    Args:
        progress: whether lines say how many tokens were seen and how long it will take.
    """

    def __init__(self, total_steps: int, warmup_step: int = 0, ranks: int = 1, progress: bool = False) -> None:
        self._total_steps, self._warmup_step, self._ranks = total_steps, warmup_step, ranks
        self._all_columns = ALL_COLUMNS if progress else COLUMNS
        self._step_width = max(4, 2 * len(str(total_steps)) + 1)
        self._known: set[str] = set()
        self._columns: tuple[Column, ...] = ()
        self._width = self._gap = self._rows = self._skipped_steps = 0

    def lines(self, record: StepRecord, width: int, seconds_left: float | None = None) -> list[Text]:
        """The line of this record in at most `width` columns, before it the heads where they are due, and behind it
        what was evaluated after the step.
        """
        cells = self._cells(record)
        if TIME_LEFT in self._all_columns:
            cells[TIME_LEFT.title] = duration(seconds_left) or "-"  # a column from the first line on
        known = {title for title, cell in cells.items() if cell is not None}
        changed = width != self._width or not known <= self._known
        if changed:
            self._known |= known
            self._width = width
            self._choose_columns()
        heads = [self._heads()] if changed or self._rows % HEADS_EVERY_ROWS == 0 else []
        self._rows += 1
        return [*heads, self._row(record, cells), *self._evaluation(record)]

    def _evaluation(self, record: StepRecord) -> list[Text]:
        if record.eval_loss is None:
            return []
        loss = f"{record.eval_loss:.4f}".rjust(COLUMNS[0].width)
        rest = f"perplexity {number(record.eval_perplexity)}, held-out data, {number(record.eval_seconds, 3)} s"
        line = Text("eval".rjust(self._step_width), style="magenta")
        return [line.append(" " * self._gap + loss, style="bold").append("  " + rest)]

    def _cells(self, record: StepRecord) -> dict[str, str | None]:
        cells = {column.title: column.cell(record) for column in self._all_columns}
        if self._ranks == 1:  # "on rank 0" says nothing where there is no other
            cells = {title: cell and cell.partition("@")[0] for title, cell in cells.items()}
        if record.skipped_steps > self._skipped_steps:
            # No update was made, and the gradients have no norm: one column says both.
            cells["grad norm"] = OVERFLOW
        self._skipped_steps = record.skipped_steps
        return cells

    def _choose_columns(self) -> None:
        chosen = [column for column in self._all_columns if column.title in self._known]
        importance = {column: column.importance for column in chosen}
        if "peak MiB" not in self._known:  # without a device the host's memory is the memory, not an extra
            importance = {column: 7 if column.title == "host MiB" else importance[column] for column in chosen}
        while len(chosen) > 1 and self._width_of(chosen, gap=1) > self._width:
            chosen.remove(min(chosen, key=importance.__getitem__))
        self._columns = tuple(chosen)
        self._gap = 2 if self._width_of(chosen, gap=2) <= self._width else 1

    def _width_of(self, columns: Sequence[Column], gap: int) -> int:
        return self._step_width + sum(gap + max(column.width, len(column.title)) for column in columns)

    def _heads(self) -> Text:
        titles = [column.title.rjust(max(column.width, len(column.title))) for column in self._columns]
        return Text((" " * self._gap).join(["step".rjust(self._step_width), *titles]), style="cyan")

    def _row(self, record: StepRecord, cells: Mapping[str, str | None]) -> Text:
        warming_up = record.step <= self._warmup_step
        step = f"{record.step}/{self._total_steps}".rjust(self._step_width)
        line = Text(step, style="dim" if warming_up else "")
        for column in self._columns:
            text = cells[column.title] or "-"
            style = ALARMS.get(text, "" if warming_up else column.style)
            line.append(" " * self._gap)
            line.append(text.rjust(max(column.width, len(column.title))), style=style)
        return line


# --- The table at the end -------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the table at the end: a figure of StepRecord by its name in the summary."""

    title: str
    key: str
    show: Callable[[float | None], str]


SUMMARY_ROWS = (
    Row("step ms", "step_seconds", milliseconds),
    Row("forward ms", "forward_seconds", milliseconds),
    Row("backward ms", "backward_seconds", milliseconds),
    Row("optimizer ms", "optimizer_seconds", milliseconds),
    Row("tokens/s, all devices", "tokens_per_second", whole),
    Row("model TFLOPS per device", "model_tflops_per_device", number),
    Row("hardware TFLOPS per device", "hardware_tflops_per_device", number),
    Row("MFU", "mfu", percent),
)
STATISTICS = ("median", "p10", "p90")
STATISTIC_WIDTH = 11
FIGURE_WIDTH = max(len(row.title) for row in SUMMARY_ROWS)


def summary_lines(summary: Mapping[str, Any]) -> list[Text]:
    """The table of what was measured and, below it, figures of the whole run; what is not known is left out.

    Args:
        summary: what commons.reporting.summary.summarize() returns.
    """
    heads = "".join(name.rjust(STATISTIC_WIDTH) for name in STATISTICS)
    lines = [Text(_measured_steps(summary).ljust(FIGURE_WIDTH) + heads, style="cyan")]
    for row in SUMMARY_ROWS:
        statistics = summary.get(row.key) or {}
        if statistics.get("median") is not None:
            median, *others = (row.show(statistics[name]).rjust(STATISTIC_WIDTH) for name in STATISTICS)
            lines.append(Text.assemble(row.title.ljust(FIGURE_WIDTH), (median, "bold"), *others))
    figures = [
        ("loss", _loss(summary), "bold"),
        ("held-out loss", _held_out(summary), "bold"),
        ("tokens seen", f"{summary['tokens_seen']:,}" if summary.get("evaluations") else "", ""),
        ("peak device memory", _peak_memory(summary, "device"), ""),
        ("peak host memory", _peak_memory(summary, "host"), ""),
        ("skipped for overflow", _steps_if_any(summary, "skipped_steps"), ALARMS[OVERFLOW]),
        ("loss not finite", _steps_if_any(summary, "nonfinite_loss_steps"), ALARMS["nan"]),
    ]
    lines += [Text.assemble(title.ljust(FIGURE_WIDTH), "    ", (text, style)) for title, text, style in figures if text]
    return [Text(), *lines, Text()]


def _measured_steps(summary: Mapping[str, Any]) -> str:
    measured, steps, warmup = (summary.get(key) for key in ("steps_measured", "steps", "warmup_step"))
    if not steps:
        return ""
    if not measured:
        return f"no step after {warmup} warm-up"
    return f"step {steps}" if measured == 1 else f"steps {steps - measured + 1} to {steps}"


def _loss(summary: Mapping[str, Any]) -> str:
    first, last = summary.get("first_loss"), summary.get("last_loss")
    if first is None and last is None:
        return ""
    return " -> ".join("-" if loss is None else f"{loss:.4f}" for loss in (first, last))


def _held_out(summary: Mapping[str, Any]) -> str:
    last, best = summary.get("last_eval_loss"), summary.get("best_eval_loss")
    if last is None:
        return ""
    better = f", best {best:.4f} after step {summary['best_eval_step']}" if best is not None and best < last else ""
    return f"{last:.4f}, perplexity {number(summary['last_eval_perplexity'])}{better}"


def _peak_memory(summary: Mapping[str, Any], where: str) -> str:
    mib, rank = summary.get(f"peak_{where}_memory_mib"), summary.get(f"peak_{where}_memory_rank")
    if mib is None:
        return ""
    return f"{mib:,.0f} MiB" + ("" if rank is None else f" on rank {rank}")


def _steps_if_any(summary: Mapping[str, Any], key: str) -> str:
    count = summary.get(key) or 0
    return f"{count} step" + ("" if count == 1 else "s") if count else ""
