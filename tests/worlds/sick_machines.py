"""What the doctor's tests share: troubles of faked machines, and ways to ask the doctor."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi

from commons.doctor import CHECKS, Finding, Machine, diagnose
from commons.doctor.diagnosis import TOPICS
from commons.doctor.machine import CudaDevice, Libcuda
from commons.doctor.processes import Completed, run_process
from commons.doctor.report import SCHEMA_VERSION

REPOSITORY = Path(__file__).resolve().parents[2]

DOCTOR = REPOSITORY / "commons" / "doctor"

H100 = CudaDevice("NVIDIA H100 80GB HBM3", (9, 0))

LINUX_LIBCUDA = "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.15"

INSIDE_WSL = "/usr/lib/x86_64-linux-gnu/libcuda.so.535.183.01"

WSL_LIBCUDA = "/usr/lib/wsl/lib/libcuda.so.1"


def found(machine: Machine, *topics: str) -> dict[str, Finding]:
    return {finding.id: finding for finding in diagnose(machine, topics or TOPICS)}


def troubles(machine: Machine, *topics: str) -> dict[str, Finding]:
    return {name: finding for name, finding in found(machine, *topics).items() if finding.level != "ok"}


def only(machine: Machine, *topics: str) -> Finding:
    """The one finding that is not ok, which must be complete."""
    trouble = troubles(machine, *topics)
    assert len(trouble) == 1, list(trouble)
    finding = next(iter(trouble.values()))
    assert all((finding.title, finding.seen, finding.why, finding.cure)), finding
    assert not re.match(r"#|exit\b|kubectl explain", finding.cure), f"no command that helps: {finding.cure}"
    return finding


def shadow(machine: FakeMachine) -> FakeMachine:
    """A Linux driver's libcuda inside WSL stands before the one from Windows; it finds no device."""
    machine.write(INSIDE_WSL)
    machine.libcuda = Libcuda(True, (INSIDE_WSL,), (12, 2), 100)
    return machine.with_torch("2.6.0", "12.4")


SMI_FAILURES = {
    "version-mismatch": "Failed to initialize NVML: Driver/library version mismatch\nNVML library: 550",
    "not-loaded": "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make",
    "nvml-unknown": "Failed to initialize NVML: Unknown Error",
    "fails": "Segmentation fault",
}


def broken_driver(machine: FakeMachine, text: str, code: int = 9) -> FakeMachine:
    machine.install("/usr/bin/nvidia-smi", FakeSmi(failure=Completed(code, text)))
    machine.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 100)
    return machine.with_torch("2.6.0", "12.4")


def limited(machine: FakeMachine, limit_bytes: int, kills: int = 0) -> FakeMachine:
    machine.write("/proc/self/cgroup", "0::/\n")
    machine.write("/sys/fs/cgroup/cgroup.controllers", "memory")
    machine.write("/sys/fs/cgroup/memory.max", f"{limit_bytes}\n")
    machine.write("/sys/fs/cgroup/memory.current", "0\n")
    machine.write("/sys/fs/cgroup/memory.events", f"oom_kill {kills}\n")
    return machine


def check_schema(answer: dict[str, Any]) -> None:
    assert list(answer) == ["schema", "schema_version", "exit_code", "counts", "findings"]
    assert (answer["schema"], answer["schema_version"]) == ("gemini-doctor", SCHEMA_VERSION)
    assert SCHEMA_VERSION == 1, "a new version: say in report.py what changed, then change this test"
    assert list(answer["counts"]) == ["ok", "warning", "error"]
    assert sum(answer["counts"].values()) == len(answer["findings"])
    names = {check.name: check.topic for check in CHECKS}
    for finding in answer["findings"]:
        assert list(finding) == ["id", "level", "title", "seen", "why", "cure", "topic"]
        assert all(isinstance(value, str) for value in finding.values())
        assert finding["topic"] == names[finding["id"].split(".")[0]]
        assert re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)?", finding["id"])
        assert ("." in finding["id"]) == (finding["level"] != "ok")
        assert finding["title"]
        if finding["level"] != "ok":
            assert all((finding["seen"], finding["why"], finding["cure"]))
    levels = [finding["level"] for finding in answer["findings"]]
    assert answer["exit_code"] == int("error" in levels)
    assert answer["counts"] == {level: levels.count(level) for level in answer["counts"]}


HAS_TORCH = Machine().torch_files.version is not None

needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="needs torch")


def run_doctor(*arguments: str, python: Sequence[str] = (sys.executable,), **environment: str) -> Completed:
    return run_process(
        [*python, "-m", "commons.doctor", *arguments],
        {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        150,
    )
