"""benchmarks.links, as far as no two GPUs are needed."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.links import CASES, table


def test_two_gpus_are_asked_for():
    command = [sys.executable, "-m", "benchmarks.links"]
    run = subprocess.run(command, env={"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert run.stderr.endswith("two GPUs are needed, and 0 can be seen\n")


def test_the_table_compares_with_no_copies():
    def repeats(*times: float) -> list[dict]:
        return [{"product_us": [us, us + 1], "clock_mhz": [1400.0, 1300.0], "power_w": []} for us in times]

    rows = table({CASES[0].label: repeats(400, 402), CASES[1].label: repeats(410, 412, 414)}).splitlines()
    assert rows[2:] == [
        "| no copies | 401.5 (400.0–403.0) | 1.000 | 1350 | nan |",
        "| 4 KiB every 6 ms | 412.5 (410.0–415.0) | 1.027 | 1350 | nan |",
    ]
