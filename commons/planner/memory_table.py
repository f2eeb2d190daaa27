"""A forecast as a table: every kind of memory at rest and at the peak, with bars, on device and host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commons.planner.gpus import GIB

if TYPE_CHECKING:
    from rich.table import Table

    from commons.planner.memory import Forecast

BAR_WIDTH = 24


def memory_table(plan: Forecast, device_free: float | None, host_free: float | None) -> Table:
    """Of one device, and of one machine's host for all of its ranks.

    Args:
        device_free, host_free: bytes that there are for it; None where that is not known, or where the device's memory
            is the host's.
    """
    from rich import box
    from rich.table import Table

    table = Table(
        "memory",
        box=box.SIMPLE,
        title=f"One device, at rest and in {plan.peak_phase}, where it takes most; then one host",
    )
    for heading in ("at rest, GiB", "at the peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    whole = max(plan.device_peak, 1)
    for kind, peak in plan.device_at_peak.items():
        rest = plan.device_at_rest[kind]
        if peak or rest:
            table.add_row(kind, _gib(rest), _gib(peak), _bar(max(peak, rest), whole))
    table.add_row("device", _gib(plan.device_rest), _gib(plan.device_peak), _of(device_free), style="bold")
    table.add_section()
    ranks, host = plan.ranks_per_host, plan.host_bytes
    for kind, size in plan.host.items():
        if size:
            table.add_row(f"host: {kind}", _gib(size * ranks), _gib(size * ranks), _bar(size, host))
    table.add_row(f"host of {ranks} rank(s)", _gib(host * ranks), _gib(host * ranks), _of(host_free), style="bold")
    if plan.pinned:
        table.add_row("  of it pinned", _gib(plan.pinned * ranks), _gib(plan.pinned * ranks), "")
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}" if size >= GIB / 100 or not size else f"{size / GIB:.4f}"


def _of(free: float | None) -> str:
    return "" if free is None else f"of {_gib(free)} GiB"


def _bar(size: float, whole: float) -> str:
    return "█" * max(1, round(BAR_WIDTH * size / whole)) if size else ""
