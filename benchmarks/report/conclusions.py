"""What the numbers say, in words: each sentence with its numbers, and the cells that they come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.report.cells import UNCHECKED, Cell, by
from benchmarks.report.difference import CONFIDENCE, Difference, compare
from benchmarks.report.reading import Found, Run


@dataclass(frozen=True)
class Link:
    """A piece of a sentence that leads to a cell's runs."""

    text: str
    cell: Cell


Sentence = tuple["str | Link", ...]


def plain(sentence: Sentence) -> str:
    return "".join(part if isinstance(part, str) else part.text for part in sentence)


def conclude(cells: Sequence[Cell], found: Found) -> list[Sentence]:
    """The conclusions, those that decide something first."""
    timed = [cell for cell in cells if cell.timed]
    places = by(timed, lambda cell: (cell.devices, cell.model, cell.first.source))
    sentences = [sentence for (devices, model, _), group in places.items() for sentence in _best(devices, model, group)]
    return [*sentences, *_scaling(timed), *_parity(timed), *_not_run(cells, found)]


def _best(devices: str, model: str, cells: list[Cell]) -> Iterator[Sentence]:
    """Which configuration is fastest on these devices, and which takes least memory."""
    ranked = sorted((cell for cell in cells if cell.speed), key=lambda cell: -(cell.speed or 0))
    if len(ranked) < 2:
        return
    first, second = ranked[:2]
    difference = compare(second.values("tokens_per_second"), first.values("tokens_per_second"))
    yield (
        f"On {devices}, {model} trains fastest with ", Link(first.label, first), f": {speed_words(first)}. ",
        f"{_lead(difference)} ", Link(second.label, second), f" ({speed_words(second)}).",
    )  # fmt: skip
    known = sorted((cell for cell in ranked if cell.memory_mib), key=lambda cell: cell.memory_mib or 0)
    if known:
        least = known[0]
        yield (
            f"On {devices}, {model} needs least memory with ", Link(least.label, least),
            f": {least.memory_mib or 0:,.0f} MiB, {speed_words(least)}.",
        )  # fmt: skip


def _lead(difference: Difference) -> str:
    percent = 100 * (difference.ratio - 1)
    if not difference.is_judged:
        return f"That is {percent:.1f} % more than the next, by too few runs to know their noise:"
    if not difference.is_different:
        return f"The next is not told apart from it ({percent:.1f} %, within the noise of the runs):"
    return f"That is {percent:.1f} % ({interval(difference)}) more than the next:"


def interval(difference: Difference) -> str:
    """ "1.2 to 2.9 % at 99 %"."""
    low, high = (100 * ((edge or 1.0) - 1) for edge in (difference.low, difference.high))
    return f"{low:+.1f} to {high:+.1f} % at {CONFIDENCE:.0%}"


def speed_words(cell: Cell) -> str:
    """Speed in the units that people compare, and beside it what is known of its parity."""
    rate, step = cell.median("model_tflops_per_device"), cell.median("step_seconds")
    parts = [f"{cell.speed:,.0f} tokens/s" if cell.speed else "", f"{rate:.4g} TFLOPS per device" if rate else ""]
    parts += [f"{1e3 * step:.4g} ms a step" if step else "", f"parity {cell.parity}"]
    return ", ".join(part for part in parts if part)


def scaling_groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The same configuration on different numbers of GPUs, by what it is called: the same batch per rank (weak), or the
    same batch in all (strong).
    """
    kinds = {"weak": _batch_per_rank, "strong": _global_batch}
    groups: dict[str, list[Cell]] = {}
    for kind, batch in kinds.items():
        known = [cell for cell in cells if cell.speed and batch(cell)]  # old result files do not say the batch
        for key, group in by(known, partial(_scaling_key, batch=batch)).items():
            by_count = {cell.gpus: cell for cell in reversed(group)}
            if len(by_count) > 1:
                where = "per rank" if kind == "weak" else "in all"
                name = f"{key[2]}, {key[3]}, batch {key[-1]} {where} ({kind})"
                name = name if name not in groups else f"{name}, {group[0].label}, {group[0].card}"
                groups[name] = [by_count[count] for count in sorted(by_count)]
    return groups


def _batch_per_rank(cell: Cell) -> int:
    return int(cell.setting("batch_size", 0))


def _global_batch(cell: Cell) -> int:
    degree = int(cell.setting("tp_degree", 1)) * int(cell.setting("pp_degree", 1))
    return int(cell.setting("batch_size", 0)) * max(1, cell.gpus // degree)


_ALIKE = (
    "tp_degree", "pp_degree", "seq_len", "precision", "placement", "activation_checkpointing", "shard_param_frac",
    "offload_optim_frac", "offload_param_frac",
)  # fmt: skip


def _scaling_key(cell: Cell, batch: Callable[[Cell], int]) -> tuple[Any, ...]:
    alike = tuple(str(cell.setting(name)) for name in _ALIKE)
    return (cell.first.source, cell.card, cell.plan, cell.model, cell.first.commit, alike, batch(cell))


def _scaling(cells: Sequence[Cell]) -> Iterator[Sentence]:
    for name, group in scaling_groups(cells).items():
        first, last = group[0], group[-1]
        kept = (last.speed or 0) / last.gpus / ((first.speed or 1) / first.gpus)
        yield (
            f"{name}: {last.gpus} devices keep {100 * kept:.1f} % of the speed per device of {first.gpus}: ",
            Link(f"{last.speed:,.0f}", last), " after ", Link(f"{first.speed:,.0f} tokens/s", first),
            f"; parity {last.parity} and {first.parity}.",
        )  # fmt: skip


def _parity(cells: Sequence[Cell]) -> Iterator[Sentence]:
    checked = [cell for cell in cells if cell.parity != UNCHECKED]
    wrong = [cell for cell in checked if cell.parity != "holds"]
    if not checked:
        yield ('No run was compared with the fp32 reference: a sweep does it with extra = ["parity"].',)
        return
    yield (
        f"Parity with the fp32 reference holds in {len(checked) - len(wrong)} of {len(checked)} that were compared.",
    )
    for cell in wrong:
        yield (f"Parity {cell.parity}: ", Link(cell.label, cell), ".")


def _not_run(cells: Sequence[Cell], found: Found) -> Iterator[Sentence]:
    for state in ("out of memory", "failed", "timed out", "did not end"):
        for cell in cells:
            run = next((run for run in cell.runs if run.state == state), None)
            if run is not None:
                yield (f"{state.capitalize()}: ", Link(cell.label, cell), f"{_because(run)}.")
    if found.skipped:
        yield (f"{len(found.skipped)} configurations were skipped; the reasons are below.",)


def _because(run: Run) -> str:
    why = " ".join(str(run.summary.get("ended_because") or "").split())
    return f": {why[:200]}" if why else ""


# ---- before and after


@dataclass(frozen=True)
class Change:
    """A configuration before and after."""

    before: Cell
    after: Cell
    step: Difference

    @property
    def verdict(self) -> str:
        if not self.step.is_judged:
            return "too few runs to tell"
        if not self.step.is_different:
            return "no difference"
        return "slower" if self.step.ratio > 1 else "faster"


def changes(before: Sequence[Cell], after: Sequence[Cell]) -> list[Change]:
    """The configurations that both have, on the same card."""
    there = {(cell.label, cell.gpus, cell.card): cell for cell in before if cell.values("step_seconds")}
    pairs = [(there.get((cell.label, cell.gpus, cell.card)), cell) for cell in after if cell.values("step_seconds")]
    return [
        Change(old, new, compare(old.values("step_seconds"), new.values("step_seconds"))) for old, new in pairs if old
    ]


def change_sentences(found: Sequence[Change]) -> Iterator[Sentence]:
    different = [change for change in found if change.step.is_different]
    yield (f"Before and after: {len(different)} of {len(found)} configurations differ by more than their noise.",)
    for change in different:
        percent = 100 * abs(change.step.ratio - 1)
        steps = [1e3 * (cell.median("step_seconds") or 0) for cell in (change.before, change.after)]
        yield (
            Link(change.after.label, change.after),
            f" is {change.verdict} by {percent:.1f} % ({interval(change.step)}): ",
            Link(f"{steps[0]:.4g}", change.before), " ms a step before, ", Link(f"{steps[1]:.4g}", change.after),
            f" after; parity {change.before.parity} and {change.after.parity}.",
        )  # fmt: skip
