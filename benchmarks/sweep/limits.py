"""Cells that need not be tried: refused settings, what cannot fit, and what is larger than a cell that did not fit."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.sweep.cell import Cell, Machine
from commons.doctor import machine as doctor
from commons.planner.gpu_probe import rooms_in_a_child
from commons.planner.room import Room, host_room


def reason_to_skip(cell: Cell, machine: Machine, out_of_memory: Iterable[Cell] = ()) -> str | None:
    """Why ``cell`` is not run, None where it is.

    Args:
        out_of_memory: cells that ran out of memory on this machine.
    """
    refusal = cell.refusal(machine)
    if refusal:
        return f"refused: {refusal}"
    forecast = forecast_problem(cell, machine)
    if forecast:
        return f"forecast: {forecast}"
    for smaller in out_of_memory:
        if cell.id != smaller.id and cell.is_at_least(smaller, machine):
            return f"larger: {smaller.label} ran out of memory already"
    return None


def forecast_problem(cell: Cell, machine: Machine) -> str | None:
    """Why the planner says that ``cell`` cannot fit here; None where it fits, or nobody knows."""
    from commons.planner.fit import shortages
    from commons.planner.memory import forecast

    room, found = machine.room, []
    if room is None:
        return None
    for rough in (True, False):  # a guess that is high and quick settles most cells
        plan = forecast(cell.resolved(machine), cell.gpus, cell.gpus, room.gpu, rough=rough)
        found = shortages(plan, room)
        if not found:
            return None
    return "; ".join(map(str, found))


def free_room(device_type: str, ranks: int) -> Room | None:
    """What a rank finds free on this machine before the sweep; of several GPUs, on the one that has least. None where
    the GPUs cannot be asked.
    """
    host, limit = host_room(doctor.Machine())
    if device_type == "cpu":
        return Room(None, None, host, limit, None, None)
    try:
        gpu, free = min(rooms_in_a_child(ranks), key=lambda found: found[1])
    except RuntimeError:
        return None
    return Room(gpu, free, host, limit, None, None)


def forecast_kinds(cell: Cell, machine: Machine) -> dict[str, float]:
    """MiB on a device at the peak of a step, by kind."""
    from commons.planner.memory import forecast

    gpu = machine.room.gpu if machine.room else None
    plan = forecast(cell.resolved(machine), cell.gpus, cell.gpus, gpu)
    return {kind: size / 2**20 for kind, size in plan.device_at_peak.items() if size}
