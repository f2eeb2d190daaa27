"""What --auto, --dry_run and --plan_for say of layouts: a table on the screen, a document for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from commons.planner.choose import Candidate, Search, plain_command, shortfall
from commons.planner.machines import GIB, Machine
from commons.planner.memory_table import memory_table
from commons.planner.step_time import PARTS
from commons.planner.trials import Trial

if TYPE_CHECKING:
    from rich.console import Console

BAR_WIDTH = 30


def document(
    given: Mapping[str, Any],
    machine: Machine,
    search: Search,
    trials: Sequence[Trial] = (),
    chosen: Candidate | None = None,
) -> dict[str, Any]:
    """All that is known of a choice, for ``--json`` and the run's auto.json. Sizes in bytes, times in seconds."""
    measured = {id(trial.candidate): trial for trial in trials}
    shown = search.fitting or ([search.nearest] if search.nearest else [])
    layouts = [_layout(layout, machine, measured.get(id(layout)), chosen) for layout in shown]
    return {
        "machine": machine.describe(),
        "assumed": list(machine.assumed),
        "given": dict(given),
        "fits": bool(search.fitting),
        "considered": search.considered,
        "too_large": search.too_large,
        "refused": search.refused,
        "search_complete": search.complete,
        "command": plain_command({**given, **chosen.settings}, machine) if chosen else None,
        "layouts": layouts,
    }


def _layout(layout: Candidate, machine: Machine, trial: Trial | None, chosen: Candidate | None) -> dict[str, Any]:
    memory = layout.memory
    return {
        "settings": dict(layout.settings),
        "chosen": layout is chosen,
        "lost_because": "" if layout is chosen or chosen is None else why_lost(layout, trial, chosen),
        "step_seconds": layout.time.seconds,
        "parts": {name: getattr(layout.time, name) for name in PARTS},
        "hidden": layout.time.hidden,
        "tokens_per_second": layout.time.tokens_per_second,
        "model_tflops_per_device": layout.time.model_tflops,
        "memory": None
        if memory is None
        else {
            "device_at_rest": dict(memory.device_at_rest),
            "device_at_peak": dict(memory.device_at_peak),
            "device_peak": memory.device_peak,
            "peak_phase": memory.peak_phase,
            "host": dict(memory.host),
            "host_of_one_machine": memory.host_bytes * memory.ranks_per_host,
            "short_of": shortfall(memory, machine),
        },
        "measured": None
        if trial is None
        else {
            "tokens_per_second": trial.tokens_per_second,
            "step_seconds": trial.step_seconds,
            "peak_device_mib": trial.peak_device_mib,
            "why_not": trial.why,
            "trial_seconds": trial.seconds,
        },
    }


def why_lost(layout: Candidate, trial: Trial | None, chosen: Candidate) -> str:
    """Why another layout was chosen, in a few words."""
    if trial is not None and trial.why:
        return trial.why
    if trial is not None and trial.tokens_per_second:
        return "slower when tried"
    share = 1 - layout.time.tokens_per_second / chosen.time.tokens_per_second
    return f"{100 * share:.1f} % slower by the model"


def show(
    console: Console,
    machine: Machine,
    search: Search,
    trials: Sequence[Trial] = (),
    chosen: Candidate | None = None,
) -> None:
    """The layouts as a table, then the parts of the chosen one's step and memory as bars."""
    from rich.table import Table

    console.print(f"Machine: {machine.describe()}", markup=False)
    for note in machine.assumed:
        console.print(f"  {note}", markup=False)
    layouts = search.fitting or ([search.nearest] if search.nearest else [])
    if layouts:
        table = Table(title="Layouts that fit, fastest first" if search.fitting else "The nearest, which does not fit")
        for name in ("", "layout", "step ms", "tokens/s", "TFLOPS", "device GiB", "host GiB", "measured", "why not"):
            table.add_column(name, justify="left" if name in ("layout", "why not") else "right")
        measured = {id(trial.candidate): trial for trial in trials}
        for number, layout in enumerate(layouts, 1):
            table.add_row(*_row(number, layout, machine, measured.get(id(layout)), chosen))
        console.print(table)
    unseen = "" if search.complete else "; time was over, so memory is a rough guess that is too high for some"
    console.print(
        f"{search.considered} layouts considered, {search.too_large} do not fit, {search.refused} cannot run{unseen}",
        markup=False,
    )
    of = chosen or (layouts[0] if layouts else None)
    if of is not None:
        show_parts(console, of, machine)


def _row(
    number: int, layout: Candidate, machine: Machine, trial: Trial | None, chosen: Candidate | None
) -> tuple[str, ...]:
    memory, time = layout.memory, layout.time
    device = host = "–"
    if memory is not None:
        device = f"{memory.device_peak / GIB:.1f}"
        host = f"{memory.host_bytes * memory.ranks_per_host / GIB:.1f}"
    speed = f"{trial.tokens_per_second:,.0f}" if trial is not None and trial.tokens_per_second else ""
    lost = "chosen" if layout is chosen else why_lost(layout, trial, chosen) if chosen is not None else ""
    if memory is not None and shortfall(memory, machine):
        lost = short_sentence(layout, machine)
    return (
        str(number),
        layout.label(),
        f"{1000 * time.seconds:,.1f}",
        f"{time.tokens_per_second:,.0f}",
        f"{time.model_tflops:.1f}",
        device,
        host,
        speed,
        lost,
    )


def short_sentence(layout: Candidate, machine: Machine) -> str:
    """What is lacking, by how much and where."""
    lacking = shortfall(layout.memory, machine)
    return " and ".join(f"{size / GIB:.1f} GiB short on the {where}" for where, size in lacking.items())


def show_parts(console: Console, layout: Candidate, machine: Machine) -> None:
    """A bar for every part of the step's time, and for every kind of memory at its peak."""
    time = layout.time
    console.print(f"\nStep of {1000 * time.seconds:,.1f} ms ({layout.label()}):", markup=False)
    for name, label in PARTS.items():
        _bar(console, label, getattr(time, name), time.seconds, f"{1000 * getattr(time, name):,.1f} ms")
    if time.hidden:
        console.print(f"  hidden beside computation: {1000 * time.hidden:,.1f} ms", markup=False)
    if layout.memory is not None:
        device = machine.gpu.memory_bytes if machine.gpu is not None else None
        console.print(memory_table(layout.memory, device, machine.host_bytes))


def _bar(console: Console, label: str, value: float, whole: float, text: str) -> None:
    if value > 0:
        length = max(1, round(BAR_WIDTH * value / whole)) if whole else 0
        console.print(f"  {label:38}{text:>14}  {'█' * length}", markup=False, highlight=False)
