"""What links that are awake cost the matrix products beside them: `python -m benchmarks.links [--out FILE]`

NVLink sleeps when nothing has gone over it for a while (`nvidia-smi nvlink -gLowPwrInfo` says how long). Awake it takes
power, and a GPU at its power limit computes slower for it. Two GPUs multiply matrices of gpt2_xl's feed-forward layer,
in turn without a copy between them, with small ones at two intervals, and with a large one now and then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.report.tables import median_and_range
from commons.reporting.environment import describe_environment

ROWS, INNER, WIDTH = 16384, 6400, 1600
AT_ONCE = 12  # products between two looks at the clock, some 6 ms of an H100
AHEAD = 8  # so many of these are queued
SETTLED = 0.4  # of a case's time is over when its products begin to count
PAUSE_SECONDS = 0.7  # between cases, so that links go to sleep
SMI = ("nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class Case:
    """Copies of ``nbytes`` from each GPU to the other, one after ``every`` times AT_ONCE products; 0: none."""

    label: str
    nbytes: int = 0
    every: int = 1


CASES = (
    Case("no copies"),
    Case("4 KiB every 6 ms", 4 << 10),
    Case("4 KiB every 60 ms", 4 << 10, 10),
    Case("31 MB every 6 ms", 31 << 20),
    Case("1.5 GiB every 320 ms", 1536 << 20, 54),
)


class Worker:
    """One GPU with its matrices, and a stream each for products and for copies from the other. Products stay off the
    default one, for which torch lets copies from another GPU wait.
    """

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        with torch.device(f"cuda:{gpu}"):
            # what is multiplied decides how much power it takes
            self._left = torch.randn(ROWS, INNER, dtype=torch.bfloat16)
            self._right = 0.02 * torch.randn(INNER, WIDTH, dtype=torch.bfloat16)
            self._out = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16)
            self.given, self.taken = (torch.zeros(max(case.nbytes for case in CASES), dtype=torch.uint8) for _ in "ab")
        torch.cuda.synchronize(gpu)
        self._products, self._copies = (torch.cuda.Stream(gpu) for _ in "ab")
        self.marks: list[Any] = []

    def multiply(self) -> None:
        with torch.cuda.stream(self._products):
            for _ in range(AT_ONCE):
                torch.mm(self._left, self._right, out=self._out)
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
        self.marks.append(mark)

    def take(self, other: Worker, nbytes: int) -> None:
        """Copy beside the next products."""
        self._copies.wait_event(self.marks[-1])
        with torch.cuda.stream(self._copies):
            self.taken[:nbytes].copy_(other.given[:nbytes], non_blocking=True)

    def product_us(self) -> float:
        torch.cuda.synchronize(self.gpu)
        marks = self.marks[int(SETTLED * len(self.marks)) :]
        return marks[0].elapsed_time(marks[-1]) * 1000 / (len(marks) - 1) / AT_ONCE


def run(case: Case, workers: list[Worker], seconds: float) -> dict[str, list[float]]:
    """By GPU: microseconds a product, and in its midst the clock of its multiprocessors in MHz and its power in W."""
    for worker in workers:
        worker.marks.clear()
    look, turn, start = None, 0, time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        for worker, other in zip(workers, reversed(workers), strict=True):
            worker.multiply()
            if case.nbytes and turn % case.every == 0:
                worker.take(other, case.nbytes)
        turn += 1
        if turn > AHEAD:
            for worker in workers:
                worker.marks[-AHEAD].synchronize()
        if look is None and now > seconds * (1 + SETTLED) / 2:
            look = subprocess.Popen((*SMI, "-i", ",".join(str(w.gpu) for w in workers)), stdout=-1, text=True)
    times = [worker.product_us() for worker in workers]
    told = look.communicate()[0].splitlines() if look is not None else []
    clocks, watts = zip(*(map(float, line.split(",")) for line in told), strict=True) if told else ((), ())
    time.sleep(PAUSE_SECONDS)
    return {"product_us": times, "clock_mhz": list(clocks), "power_w": list(watts)}


def table(results: dict[str, list[dict]]) -> str:
    """A Markdown table: medians over repeats and GPUs, and the products' range."""
    base = statistics.median(_all(results[CASES[0].label], "product_us"))
    rows = ["| copies | µs a product | to none | clock, MHz | power, W |", "| --- | ---: | ---: | ---: | ---: |"]
    for label, runs in results.items():
        times = _all(runs, "product_us")
        clock, watts = (statistics.median(_all(runs, key) or [float("nan")]) for key in ("clock_mhz", "power_w"))
        ratio = statistics.median(times) / base
        rows.append(f"| {label} | {median_and_range(times, 1, 1)} | {ratio:.3f} | {clock:.0f} | {watts:.0f} |")
    return "\n".join(rows) + "\n"


def _all(runs: list[dict], key: str) -> list[Any]:
    return [value for run in runs for value in run[key]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("links.json"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.5, help="of each case")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < 2:
        parser.error(f"two GPUs are needed, and {torch.cuda.device_count()} can be seen")
    workers = [Worker(gpu) for gpu in range(2)]
    results: dict[str, list[dict]] = {case.label: [] for case in CASES}
    for _ in range(arguments.repeats):
        for case in CASES:
            results[case.label].append(run(case, workers, arguments.seconds))
    print(table(results))
    name = torch.cuda.get_device_name()
    arguments.out.write_text(json.dumps({"cases": results, "environment": describe_environment(name)}, indent=1))


if __name__ == "__main__":
    main()
