"""Where the time of a traced step goes: `python -m benchmarks.trace gemini_logs/RUN/trace.json.gz ...`

Reads what `--trace_step N` wrote and prints, for each file, a Markdown table: milliseconds of the device by kind of
work, how much of communication and copies ran beside computation, and how long the device had nothing to do.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# The first pattern that a kernel's name matches says what it is.
KINDS = (
    ("communication", r"nccl|symm_mem|multimem|Memcpy PtoP|^_mean$"),
    ("copies between host and device", r"Memcpy (HtoD|DtoH)"),
    ("attention", r"fmha|flash|sdpa|attention"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|splitK|cublas"),
    ("compiled pointwise work, norms, loss and Adam", r"^triton|^_\w+$"),
    ("other copies and fills", r"[Cc]opy|cpy|Memset|[Ff]ill|CatArray|zero"),
    ("other", r""),
)
BESIDE = ("communication", "copies between host and device")  # what should hide behind computation


@dataclass(frozen=True)
class Work:
    """A piece of work on the device; times in microseconds."""

    name: str
    kind: str
    start: float
    end: float


def read_work(path: Path) -> list[Work]:
    """The device's work in a trace of torch's profiler, in order of time."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    kinds = [(kind, re.compile(pattern)) for kind, pattern in KINDS]
    work = [
        Work(
            event["name"],
            next(kind for kind, pattern in kinds if pattern.search(event["name"])),
            event["ts"],
            event["ts"] + event["dur"],
        )
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return sorted(work, key=lambda piece: piece.start)


def covered(pieces: Iterable[Work]) -> float:
    """Microseconds in which at least one of ``pieces``, sorted by start, runs."""
    total, reached = 0.0, float("-inf")
    for piece in pieces:
        total += max(0.0, piece.end - max(piece.start, reached))
        reached = max(reached, piece.end)
    return total


def breakdown(work: list[Work]) -> dict[str, float]:
    """Milliseconds by kind, of all kinds together, exposed and idle, of one step's work."""
    whole = max(piece.end for piece in work) - work[0].start
    computing = covered(piece for piece in work if piece.kind not in BESIDE)
    busy = covered(work)
    rows = {kind: covered(piece for piece in work if piece.kind == kind) for kind, _ in KINDS}
    rows |= {"not hidden by computation": busy - computing, "idle": whole - busy, "first to last piece of work": whole}
    return {name: value / 1000 for name, value in rows.items() if value}


def longest(work: list[Work], count: int) -> list[tuple[str, float, int]]:
    """The kernels that take most: name, milliseconds in all, calls."""
    totals: Counter[str] = Counter()
    calls = Counter(piece.name for piece in work)
    for piece in work:
        totals[piece.name] += piece.end - piece.start  # pyright: ignore[reportArgumentType]
    return [(name, total / 1000, calls[name]) for name, total in totals.most_common(count)]


def longest_gaps(work: list[Work], count: int) -> list[tuple[float, float, str, str]]:
    """The longest times in which the device idles: when (ms), how long (ms), after what, before what."""
    gaps, reached, last = [], work[0].start, work[0].name
    for piece in work:
        if piece.start > reached:
            gaps.append(((reached - work[0].start) / 1000, (piece.start - reached) / 1000, last, piece.name))
        if piece.end > reached:
            reached, last = piece.end, piece.name
    return sorted(gaps, key=lambda gap: -gap[1])[:count]


def report(path: Path, kernels: int) -> str:
    """The tables of one trace as Markdown."""
    work = read_work(path)
    if not work:
        return f"{path}: no work of a GPU in it (on a CPU there is nothing to overlap)"
    lines = [f"`{path}`", "", "| work | ms |", "| --- | ---: |"]
    lines += [f"| {name} | {value:.2f} |" for name, value in breakdown(work).items()]
    if kernels:
        lines += ["", "| kernel | ms | calls |", "| --- | ---: | ---: |"]
        lines += [f"| `{name[:110]}` | {total:.2f} | {calls} |" for name, total, calls in longest(work, kernels)]
        lines += ["", "| idle at, ms | for, ms | after | before |", "| ---: | ---: | --- | --- |"]
        gaps = longest_gaps(work, kernels)
        lines += [f"| {at:.2f} | {gap:.3f} | `{a[:50]}` | `{b[:50]}` |" for at, gap, a, b in gaps]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="+", type=Path)
    parser.add_argument("--kernels", type=int, default=0, help="also list so many kernels and idle times")
    arguments = parser.parse_args()
    for path in arguments.traces:
        print(report(path, arguments.kernels), end="\n\n")


if __name__ == "__main__":
    main()
