"""Faked machines: one with an H100, one without a GPU, one with WSL 2."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu, rtx_4070
from worlds.sick_machines import H100, LINUX_LIBCUDA, WSL_LIBCUDA

from commons.doctor.machine import CudaDevice, Libcuda
from commons.doctor.processes import Completed


@pytest.fixture
def linux(tmp_path: Path) -> FakeMachine:
    """One H100, driver 550, CUDA 12.4, nothing wrong."""
    machine = FakeMachine(tmp_path)
    machine.install("/usr/bin/nvidia-smi", FakeSmi(gpu()))
    for node in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        machine.write(f"/dev/{node}")
    machine.write("/sys/bus/pci/devices/0000:41:00.0/vendor", "0x10de\n")
    machine.write("/sys/bus/pci/devices/0000:41:00.0/class", "0x030200\n")
    machine.write(LINUX_LIBCUDA)
    machine.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 0, (H100,))
    return machine.with_torch("2.6.0", "12.4")


@pytest.fixture
def no_gpu(linux: FakeMachine) -> FakeMachine:
    """Neither an NVIDIA GPU nor a driver."""
    for path in ("/usr/bin/nvidia-smi", "/dev/nvidia0", "/dev/nvidiactl", "/dev/nvidia-uvm"):
        linux.at(path).unlink()
    shutil.rmtree(linux.at("/sys/bus/pci"))
    linux.libcuda = Libcuda(False, error="libcuda.so.1: cannot open shared object file")
    return linux.with_torch("2.6.0+cpu", None)


@pytest.fixture
def wsl(tmp_path: Path) -> FakeMachine:
    """WSL 2 with an RTX 4070, driver 551.78, CUDA 12.4, the distribution's nvcc 11.5; it trains."""
    machine = FakeMachine(tmp_path)
    machine.write("/proc/sys/kernel/osrelease", "5.15.146.1-microsoft-standard-WSL2")
    machine.write("/dev/dxg")
    machine.write(WSL_LIBCUDA)
    machine.write("/usr/lib/x86_64-linux-gnu/libc.so.6")
    machine.at("/usr/lib/x86_64-linux-gnu/libcuda.so.1.1").symlink_to(machine.at(WSL_LIBCUDA))
    machine.install("/usr/lib/wsl/lib/nvidia-smi", FakeSmi(rtx_4070()))
    nvcc = "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 11.5, V11.5.119\n"
    machine.install("/usr/bin/nvcc", lambda _: Completed(0, nvcc))
    machine.libcuda = Libcuda(True, (WSL_LIBCUDA,), (12, 4), 0, (CudaDevice("NVIDIA GeForce RTX 4070", (8, 9)),))
    machine.hostname_answer = {"hostname": "box", "address": "127.0.1.1"}
    return machine.with_environment(WSL_DISTRO_NAME="Ubuntu-22.04").with_torch("2.6.0", "12.4")
