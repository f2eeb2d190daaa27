"""Cells that need not be tried: refused settings, what cannot fit, and what is larger than a cell that did not fit."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.sweep.cell import Cell, Machine


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
    return None
