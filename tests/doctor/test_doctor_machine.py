"""Machine: this one, and what it makes of files and programs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from worlds.fake_machine import FakeMachine

from commons.doctor import Machine, driver


@pytest.mark.parametrize(
    ("kernel", "environment", "wsl"),
    [
        ("5.15.146.1-microsoft-standard-WSL2", {}, 2),
        ("4.19.128-microsoft-standard", {}, 2),
        ("4.4.0-19041-Microsoft", {}, 1),
        ("4.4.0", {}, 0),  # gVisor
        ("6.8.0-custom", {"WSL_DISTRO_NAME": "Ubuntu"}, 2),
        ("6.8.0-45-generic", {}, 0),
    ],
)
def test_wsl_by_kernel(tmp_path: Path, kernel: str, environment: dict[str, str], wsl: int) -> None:
    machine = FakeMachine(tmp_path).with_environment(**environment)
    machine.write("/proc/sys/kernel/osrelease", f"{kernel}\n")
    machine.write("/dev/dxg")
    assert machine.wsl == wsl


def test_programs_are_found_outside_path_and_must_be_executable(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path).with_environment(PATH="/opt/bin:/usr/bin")
    machine.write("/opt/bin/nvidia-smi")
    assert machine.which("nvidia-smi") is None
    machine.write("/usr/lib/wsl/lib/nvidia-smi", executable=True)
    assert machine.which("nvidia-smi") == "/usr/lib/wsl/lib/nvidia-smi"


def test_visible_devices_do_not_blind_the_probe() -> None:
    """cuInit itself finds no device where the variable hides them: libcuda is asked without it."""
    asked: list[Mapping[str, str]] = []

    class Recorder(Machine):
        def probe(self, *arguments: str, timeout_seconds: float, environment: Any = None) -> dict[str, Any]:
            asked.append(environment)
            return {"error": "x"}

    assert not Recorder(environment={"CUDA_VISIBLE_DEVICES": "", "A": "b"}).libcuda.loaded
    assert asked == [{"A": "b"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "__version__ = '2.6.0+cu124'\ncuda: Optional[str] = '12.4'\nhip: Optional[str] = None",
            ("2.6.0+cu124", "12.4"),
        ),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None", ("2.13.0+cpu", None)),
        ("from typing import Optional\n__version__ = '2.5.1'\ncuda = '12.1'", ("2.5.1", "12.1")),
        (None, ("unknown", None)),
    ],
)
def test_torch_is_read_without_importing_it(tmp_path: Path, text: str | None, expected: tuple) -> None:
    from commons.doctor.machine import read_torch_version

    if text is not None:
        (tmp_path / "version.py").write_text(text)
    facts = read_torch_version(tmp_path)
    assert (facts.version, facts.cuda) == expected


def test_container_and_driver_helpers_agree_with_this_machine() -> None:
    """Reading the real machine breaks nothing."""
    machine = Machine()
    assert machine.wsl in (0, 1, 2)
    assert isinstance(driver.nvidia_hardware(machine), list)
    assert machine.disk("/no/such/place") is None
    assert machine.interfaces
