"""The CPU's model name from /proc/cpuinfo, as x86 and Arm write it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from commons.lifecycle.cpu_name import cpu_name


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "processor\t: 0\nmodel\t\t: 85\nmodel name\t: A 7\nprocessor\t: 1\nmodel name\t: B\n",
            "A 7",
        ),
        ("processor\t: 0\nBogoMIPS\t: 48.00\n\nHardware\t: BCM2711\nModel\t\t: Raspberry Pi 4\n", "BCM2711"),
        ("processor\t: 0\nmodel name\t: \nprocessor\t: 1\n", None),
        ("processor\t: 0\nBogoMIPS\t: 48.00\n", None),
    ],
)
def test_cpu_name(tmp_path: Path, text: str, name: str | None) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_name(tmp_path / "cpuinfo") == (name or platform.processor() or platform.machine())


def test_cpu_name_without_the_file(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "none") == (platform.processor() or platform.machine())
