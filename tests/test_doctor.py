"""The doctor on faked machines (a tree of files, fake nvidia-smi and libcuda answers) and on this one."""

from __future__ import annotations

import ast
import errno
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_machine import GIB, FakeMachine, FakeSmi, compile_libcuda, gpu, rtx_4070

from commons.doctor import (
    CHECKS,
    Finding,
    Machine,
    as_text,
    diagnose,
    driver,
    exit_code,
    explain_failure,
    explain_no_gpu,
    host,
    smi,
    torch_build,
    versions,
    why_no_gpu,
)
from commons.doctor.diagnosis import TOPICS, Check, run_check
from commons.doctor.machine import (
    CudaDevice,
    Disk,
    Distribution,
    Libcuda,
    TorchFiles,
    TorchImport,
)
from commons.doctor.processes import Completed, run_process
from commons.doctor.report import SCHEMA_VERSION, as_json, wants_colour

REPOSITORY = Path(__file__).resolve().parents[1]
DOCTOR = REPOSITORY / "commons" / "doctor"

H100 = CudaDevice("NVIDIA H100 80GB HBM3", (9, 0))
LINUX_LIBCUDA = "/usr/lib/x86_64-linux-gnu/libcuda.so.550.54.15"
INSIDE_WSL = "/usr/lib/x86_64-linux-gnu/libcuda.so.535.183.01"
WSL_LIBCUDA = "/usr/lib/wsl/lib/libcuda.so.1"


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


# --- machines without troubles


@pytest.mark.parametrize("kind", ["linux", "wsl"])
def test_good_machine_has_no_trouble(kind: str, request: pytest.FixtureRequest) -> None:
    machine = request.getfixturevalue(kind)
    assert troubles(machine) == {}
    assert exit_code(diagnose(machine)) == 0
    assert why_no_gpu(machine) == ("", "")
    assert explain_no_gpu(machine) == []


def test_every_check_has_something_to_say_about_a_good_machine(linux: FakeMachine) -> None:
    two = (H100, H100)
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(0), gpu(1)))
    linux.libcuda = replace(linux.libcuda, devices=two)
    quiet = {"wsl"}  # says nothing where there is no WSL 1
    assert set(found(linux.with_torch("2.6.0", "12.4"))) == {check.name for check in CHECKS} - quiet
    seen = found(linux)["torch-import"].seen
    assert seen.endswith("; GPUs that it sees: NVIDIA H100 80GB HBM3, NVIDIA H100 80GB HBM3; NCCL 2.21.5"), seen


def test_no_gpu_is_a_warning_and_training_goes_on(no_gpu: FakeMachine) -> None:
    finding = only(no_gpu)
    assert (finding.id, finding.level) == ("driver.no-gpu", "warning")
    assert "--device cpu" in finding.cure
    assert why_no_gpu(no_gpu) == ("this machine has no NVIDIA GPU", "")
    no_gpu.with_torch("2.6.0", "12.4")
    assert not {"torch-cuda", "torch-arch", "compute-mode", "libcuda", "gpu-use"} & set(found(no_gpu))


# --- the README's cases


def shadow(machine: FakeMachine) -> FakeMachine:
    """A Linux driver's libcuda inside WSL stands before the one from Windows; it finds no device."""
    machine.write(INSIDE_WSL)
    machine.libcuda = Libcuda(True, (INSIDE_WSL,), (12, 2), 100)
    return machine.with_torch("2.6.0", "12.4")


def test_case_1_the_report(wsl: FakeMachine) -> None:
    """WSL 2, RTX 4070, driver 551.78, CUDA 12.4, nvcc 11.5, 'RuntimeError: No CUDA GPUs are available'."""
    answer = Completed(0, f"libnvidia-compute-535:amd64: {INSIDE_WSL}\n")
    shadow(wsl).install("/usr/bin/dpkg", lambda _: answer)
    finding = only(wsl)
    assert (finding.id, finding.level) == ("libcuda.shadowed", "error")
    for evidence in (INSIDE_WSL, "libnvidia-compute-535", "100", "RTX 4070", "551.78"):
        assert evidence in finding.seen
    assert finding.cure.splitlines()[0].startswith("LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh")
    assert "sudo apt-get purge libnvidia-compute-535 && sudo ldconfig" in finding.cure
    assert why_no_gpu(wsl) == (
        "a Linux NVIDIA driver inside WSL hides the one from Windows",
        "LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh",
    )
    assert explain_failure("RuntimeError: No CUDA GPUs are available", wsl) == [finding]
    nvcc = found(wsl)["nvcc"]
    assert nvcc.level == "ok"
    assert "11.5" in nvcc.title
    assert "the driver's CUDA, 12.4" in nvcc.why


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("dpkg", "sudo mv /usr/lib/x86_64-linux-gnu/libcuda.so* /root/linux-driver/"),
        ("rpm", "sudo dnf remove libnvidia-compute"),
        ("nvidia-uninstall", "sudo nvidia-uninstall && sudo ldconfig"),
        ("", "sudo mv /usr/lib/x86_64-linux-gnu/libcuda.so* /root/linux-driver/"),
    ],
)
def test_case_1_other_ways_to_remove_it(wsl: FakeMachine, program: str, expected: str) -> None:
    if program:
        known = program != "dpkg"  # which says that it does not know the file
        answer = Completed(0, "libnvidia-compute\n") if known else Completed(1, "dpkg-query: no path found\n")
        shadow(wsl).install(f"/usr/bin/{program}", lambda _: answer)
    assert expected in only(shadow(wsl)).cure


def test_case_1_with_todays_torch_names_the_driver_too(wsl: FakeMachine) -> None:
    """pip's torch 2.13 is built for CUDA 13: driver 551.78 would be the next wall after the shadow."""
    shadow(wsl).with_torch("2.13.0", "13.0")
    assert [finding.id for finding in explain_no_gpu(wsl)] == [
        "libcuda.shadowed",
        "torch-cuda.newer-than-driver",
    ]


def test_the_report_to_the_end(wsl: FakeMachine) -> None:
    """The machine of the report: WSL 2, RTX 4070, driver 551.78, CUDA 12.4, nvcc 11.5 from the distribution's packages,
    and the torch that pip gives today, built for CUDA 13. Each cure in turn, and then it trains."""
    dpkg = Completed(0, f"libnvidia-compute-535:amd64: {INSIDE_WSL}\n")
    shadow(wsl).install("/usr/bin/dpkg", lambda _: dpkg)
    wsl.with_torch("2.13.0", "13.0", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120")
    both = explain_failure("RuntimeError: No CUDA GPUs are available", wsl)
    assert [finding.id for finding in both] == ["libcuda.shadowed", "torch-cuda.newer-than-driver"]
    assert "sudo apt-get purge libnvidia-compute-535 && sudo ldconfig" in both[0].cure
    nvcc = found(wsl)["nvcc"]
    assert (nvcc.level, nvcc.title) == ("ok", "nvcc 11.5 does not matter here")

    wsl.at(INSIDE_WSL).unlink()  # the first cure
    wsl.libcuda = Libcuda(True, (WSL_LIBCUDA,), (12, 4), 0, (CudaDevice("NVIDIA GeForce RTX 4070", (8, 9)),))
    wsl.with_torch("2.13.0", "13.0", "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120")
    wsl.torch = replace(wsl.torch, devices=(), error="RuntimeError: The NVIDIA driver on your system is too old")
    wsl.forget()
    (driver_too_old,) = explain_failure("RuntimeError: No CUDA GPUs are available", wsl)
    assert driver_too_old.id == "torch-cuda.newer-than-driver"
    assert driver_too_old.title == "torch was built for CUDA 13.0 and the driver runs CUDA 12.4 at most"
    assert "driver 551.78" in driver_too_old.seen
    cures = driver_too_old.cure.splitlines()
    assert cures[0] == "python -m pip uninstall -y torch && python -m pip install torch==2.10.0"
    assert cures[1].startswith(
        "# or: explorer.exe https://www.nvidia.com/drivers   # driver 580 or newer, installed on"
    )
    assert why_no_gpu(wsl)[1] == cures[0]
    assert torch_build.choose_torch(wsl, "2.13.0")[0] == "2.10.0", "install.sh would not have got there"

    wsl.with_torch("2.10.0", "12.8", "sm_70 sm_75 sm_80 sm_86 sm_90 sm_100 sm_120")  # the second
    assert troubles(wsl) == {}
    assert "minor version" in found(wsl)["torch-cuda"].seen


@pytest.mark.parametrize(
    ("cuda", "capability", "version", "reason"),
    [
        ("12.4", "8.9", "2.10.0", "driver 550.54.15 runs CUDA 12.4 at most, and torch 2.13.0 is built for CUDA 13"),
        ("13.1", "9.0", "2.13.0", ""),
        ("11.8", "8.0", "2.13.0", "every tested torch needs 12: update the driver"),
        ("12.8", "6.1", "2.7.1", "newer ones have no code for NVIDIA H100 80GB HBM3"),
    ],
)
def test_the_torch_to_install(linux: FakeMachine, cuda: str, capability: str, version: str, reason: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(compute_cap=capability), cuda=cuda))
    linux.libcuda = Libcuda(False)
    chosen, why = torch_build.choose_torch(linux, "2.13.0")
    assert chosen == version
    assert reason in why and bool(reason) == bool(why)


def test_the_torch_to_install_where_there_is_no_gpu(no_gpu: FakeMachine) -> None:
    assert torch_build.choose_torch(no_gpu, "2.13.0") == ("2.13.0", "")


def test_case_1_containers_in_wsl_have_their_libcuda_elsewhere(wsl: FakeMachine) -> None:
    wsl.write("/.dockerenv")
    mounted = "/usr/lib/x86_64-linux-gnu/libcuda.so.1.1"
    wsl.libcuda = replace(wsl.libcuda, paths=(mounted,))
    wsl.write(INSIDE_WSL)
    assert troubles(wsl) == {}
    wsl.libcuda = Libcuda(True, (mounted,), (12, 4), 100)
    assert only(wsl.with_torch("2.6.0", "12.4")).id == "libcuda.no-device"


@pytest.mark.parametrize(("cuda", "version"), [("12.4", "2.10.0"), ("13.0", "2.13.0")])
def test_case_2_cpu_build(linux: FakeMachine, cuda: str, version: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(), cuda=cuda))
    linux.libcuda = replace(linux.libcuda, version=tuple(map(int, cuda.split("."))))
    finding = only(linux.with_torch("2.13.0+cpu", None))
    assert (finding.id, finding.level) == ("torch-build.cpu-only", "error")
    assert finding.cure == f"python -m pip uninstall -y torch && python -m pip install torch=={version}"
    cause, cure = why_no_gpu(linux)
    assert cause == "torch is a CPU build" and cure.startswith("python -m pip")
    assert explain_failure("AssertionError: Torch not compiled with CUDA enabled", linux) == [finding]


def test_case_2_cpu_build_by_either_sign_of_a_gpu(linux: FakeMachine) -> None:
    linux.with_torch("2.13.0+cpu", None).libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 999)
    assert list(troubles(linux)) == ["libcuda.unknown", "torch-build.cpu-only"]
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 0, (H100,))
    linux.at("/usr/bin/nvidia-smi").unlink()
    linux.forget()
    assert only(linux).id == "torch-build.cpu-only"


def test_case_3_driver_older_than_torchs_cuda(linux: FakeMachine) -> None:
    linux.distributions += (Distribution("nvidia-nccl-cu13", "2.28", "/venv/site-packages"),)
    finding = only(linux.with_torch("2.13.0", "13.0"))
    assert (finding.id, finding.level) == ("torch-cuda.newer-than-driver", "error")
    assert "550.54.15" in finding.seen
    assert "uninstall -y torch nvidia-nccl-cu13 && python -m pip install torch==2.10.0" in finding.cure
    assert finding.cure.endswith("\n# or: sudo ubuntu-drivers install nvidia:580 && sudo reboot")
    text = "RuntimeError: The NVIDIA driver on your system is too old (found version 12040)"
    assert explain_failure(text, linux) == [finding]


def test_case_3_minor_versions_do_not_matter(linux: FakeMachine) -> None:
    assert troubles(linux.with_torch("2.10.0", "12.8")) == {}
    assert "minor version" in found(linux)["torch-cuda"].seen


def test_case_3_a_driver_for_cuda_11_needs_an_update(wsl: FakeMachine) -> None:
    wsl.libcuda = replace(wsl.libcuda, version=(11, 6))
    finding = only(wsl.with_torch("2.6.0", "12.4"))
    assert finding.id == "torch-cuda.newer-than-driver"
    assert finding.cure.startswith("explorer.exe https://www.nvidia.com/drivers   # ")
    assert "installed on Windows, never inside WSL; then in PowerShell: wsl.exe --shutdown" in finding.cure


@pytest.mark.parametrize(
    ("release", "cure"),
    [
        ("ID=ubuntu\nID_LIKE=debian", "sudo ubuntu-drivers install nvidia:580 && sudo reboot"),
        (
            'NAME="Linux Mint"\nID=linuxmint\nID_LIKE="ubuntu debian"',
            "sudo ubuntu-drivers install nvidia:580 && sudo reb",
        ),
        ("ID=debian", "sudo apt-get install nvidia-open && sudo reboot   # from NVIDIA's repository"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"', "sudo dnf install nvidia-open && sudo reboot   # from NVIDIA's"),
        ('ID="amzn"\nID_LIKE="fedora"', "sudo dnf install nvidia-open && sudo reboot   # from NVIDIA's"),
        ("ID=fedora", "sudo dnf install akmod-nvidia && sudo reboot   # from RPM Fusion"),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"', "sudo zypper install nvidia-open && sudo reboot"),
        ("ID=endeavouros\nID_LIKE=arch", "sudo pacman -Syu nvidia-open && sudo reboot"),
        ("ID=nixos", "sudo sh NVIDIA-Linux-*-580.*.run && sudo reboot   # from https://www.nvidia.com/drivers"),
        ("", "sudo sh NVIDIA-Linux-*-580.*.run && sudo reboot"),
    ],
)
def test_case_3_the_drivers_command_for_this_distribution(linux: FakeMachine, release: str, cure: str) -> None:
    """The driver runs CUDA 11: no torch that the suite is tested with runs on it."""
    linux.write("/etc/os-release", f"{release}\n")
    linux.libcuda = replace(linux.libcuda, version=(11, 6))
    finding = only(linux.with_torch("2.6.0", "12.4"))
    assert finding.id == "torch-cuda.newer-than-driver"
    assert finding.cure.startswith(cure)
    linux.write("/.dockerenv")
    assert only(linux).cure.startswith("sudo ubuntu-drivers install nvidia:580 && sudo reboot   # on the host")


@pytest.mark.parametrize(
    ("value", "finding_id", "level"),
    [
        ("", "visible-devices.hidden", "error"),
        ("-1", "visible-devices.hidden", "error"),
        ("NoDevFiles", "visible-devices.hidden", "error"),
        ("2", "visible-devices.out-of-range", "error"),
        ("0,7", "visible-devices.out-of-range", "warning"),
        ("1,-1,0", "visible-devices.hidden", "warning"),
        ("GPU-deadbeef", "visible-devices.unknown-uuid", "error"),
        ("0,0", "visible-devices.duplicate", "error"),
        ("all", "visible-devices.malformed", "error"),
        ("0 1", "visible-devices.malformed", "error"),
    ],
)
def test_case_4_visible_devices(linux: FakeMachine, value: str, finding_id: str, level: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(0), gpu(1)))
    linux.libcuda = replace(linux.libcuda, devices=(H100, H100))
    linux.with_torch("2.6.0", "12.4").with_environment(CUDA_VISIBLE_DEVICES=value)
    finding = only(linux)
    assert (finding.id, finding.level) == (finding_id, level)
    assert f'"{value}"' in finding.seen
    assert finding.seen.endswith("555555555555" if finding_id.endswith("uuid") else "GPUs here: 0 to 1")
    assert finding.cure.startswith("unset CUDA_VISIBLE_DEVICES")
    assert bool(why_no_gpu(linux)[0]) == (level == "error")


@pytest.mark.parametrize("value", ["0", "1,0", " 1 ", "GPU-0111", "GPU-11111111-2222-3333-4444-555555555555"])
def test_case_4_good_values(linux: FakeMachine, value: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(0), gpu(1)))
    linux.libcuda = replace(linux.libcuda, devices=(H100, H100))
    assert troubles(linux.with_torch("2.6.0", "12.4").with_environment(CUDA_VISIBLE_DEVICES=value)) == {}


def test_case_4_slurm_and_no_gpu(linux: FakeMachine, no_gpu: FakeMachine) -> None:
    machine = no_gpu.with_environment(CUDA_VISIBLE_DEVICES="")
    assert found(machine)["visible-devices"].title == 'CUDA_VISIBLE_DEVICES="", no GPU to hide'
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu()))
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 0, (H100,))
    linux.with_environment(CUDA_VISIBLE_DEVICES="", SLURM_JOB_ID="7")
    assert troubles(linux)["visible-devices.hidden"].cure.startswith("salloc")
    linux.with_environment(CUDA_VISIBLE_DEVICES="5")
    assert troubles(linux)["visible-devices.out-of-range"].cure.startswith("unset")


@pytest.mark.parametrize(
    ("name", "capability", "arch_list", "version"),
    [
        ("NVIDIA GeForce RTX 5090", (12, 0), "sm_50 sm_80 sm_86 sm_90", "2.10.0"),
        ("NVIDIA GeForce GTX 1080", (6, 1), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "2.7.1"),
    ],
)
def test_case_5_no_kernel_image(
    linux: FakeMachine, name: str, capability: tuple[int, int], arch_list: str, version: str
) -> None:
    linux.libcuda = replace(linux.libcuda, devices=(CudaDevice(name, capability),))
    finding = only(linux.with_torch("2.6.0", "12.4", arch_list))
    assert (finding.id, finding.level) == ("torch-arch.no-code", "error")
    assert name in finding.title
    assert finding.cure.endswith(f"install torch=={version}")
    assert why_no_gpu(linux) == ("", "")
    assert explain_failure("no kernel image is available for execution on the device", linux) == [finding]


@pytest.mark.parametrize(
    ("mark", "engine", "cure"),
    [
        ("/.dockerenv", "docker", "docker run --gpus all"),
        ("/run/.containerenv", "podman", "podman run --device nvidia.com/gpu=all"),
        ("/.singularity.d/x", "apptainer", "apptainer exec --nv"),
    ],
)
def test_case_6_container_without_gpus(no_gpu: FakeMachine, mark: str, engine: str, cure: str) -> None:
    no_gpu.write(mark)
    no_gpu.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15")
    finding = only(no_gpu.with_torch("2.6.0", "12.4"))
    assert (finding.id, finding.level) == ("driver.container", "error")
    assert finding.cure.startswith(cure)
    assert f"container of {engine}" in found(no_gpu)["system"].seen
    no_gpu.at("/proc/driver/nvidia/version").unlink()
    assert only(no_gpu).id == "driver.no-gpu", "an ordinary container on a host without a GPU"
    no_gpu.write("/dev/nvidia3")
    assert "driver.container" in troubles(no_gpu)


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


def test_case_7_driver_updated_without_a_reboot(linux: FakeMachine) -> None:
    finding = only(broken_driver(linux, SMI_FAILURES["version-mismatch"], 18))
    assert (finding.id, finding.level, finding.cure) == ("driver.version-mismatch", "error", "sudo reboot")
    assert why_no_gpu(linux)[1] == "sudo reboot"


@pytest.mark.parametrize("cause", SMI_FAILURES)
def test_nvidia_smi_failures(linux: FakeMachine, cause: str) -> None:
    finding = only(broken_driver(linux, SMI_FAILURES[cause]))
    assert (finding.id, finding.level) == (f"driver.{cause}", "error")
    assert SMI_FAILURES[cause].splitlines()[0] in finding.seen
    linux.write("/.dockerenv")
    assert finding.cure in only(linux).cure or cause == "nvml-unknown"
    assert "on the host" in only(linux).cure
    assert "reboot" not in finding.cure or cause != "fails"


@pytest.mark.parametrize(
    ("mark", "environment", "cure"),
    [
        ("/.dockerenv", {}, "docker restart box   # on the host"),
        ("/run/.containerenv", {}, "podman restart box   # on the host"),
        ("/.singularity.d/x", {}, "apptainer exec --nv ..."),
        ("/tmp/x", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "kubectl set resources deployment NAME"),
    ],
)
def test_a_container_that_lost_its_gpu(linux: FakeMachine, mark: str, environment: dict[str, str], cure: str) -> None:
    broken_driver(linux, SMI_FAILURES["nvml-unknown"]).write(mark)
    assert only(linux.with_environment(**environment)).cure.startswith(cure)


def test_a_pod_without_gpus(no_gpu: FakeMachine) -> None:
    no_gpu.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15")
    finding = only(no_gpu.with_environment(KUBERNETES_SERVICE_HOST="10.0.0.1"))
    assert finding.id == "driver.container"
    assert finding.cure.startswith("kubectl set resources deployment NAME --limits=nvidia.com/gpu=1   # ")


@pytest.mark.parametrize(
    ("name", "version", "finding_id", "level"),
    [
        ("transformers", "5.0.0", "packages.wrong-version", "error"),
        ("transformers", "4.39.0", "packages.wrong-version", "error"),
        ("transformers", "4.57.1", "packages.untested", "warning"),
        ("colossalai", "0.4.9", "packages.wrong-version", "error"),
        ("numpy", "1.25.0", "packages.wrong-version", "error"),
        ("numpy", "3.0.0", "packages.untested", "warning"),
        ("torch", "2.14.0+cu130", "packages.untested", "warning"),
        ("torch", "2.4.1", "packages.wrong-version", "error"),
    ],
)
def test_case_8_versions(linux: FakeMachine, name: str, version: str, finding_id: str, level: str) -> None:
    linux.distributions = tuple(
        replace(each, version=version) if each.name == name else each for each in linux.distributions
    )
    finding = only(linux)
    assert (finding.id, finding.level) == (finding_id, level)
    assert version in finding.seen
    assert finding.cure.startswith("bash install.sh")
    assert explain_failure("ImportError: cannot import name 'X' from 'transformers'", linux) == [finding]


@pytest.mark.parametrize("version", ["2.5.1", "2.13.0+cpu", "2.13.7", "2.7.1+cu128"])
def test_tested_versions(version: str) -> None:
    assert versions.compare("torch", version, versions.TESTED["torch"], "") is None


def test_case_9_gpu_used_by_others(linux: FakeMachine) -> None:
    others = (gpu(0, memory__used="70000"), gpu(1))
    process = f"{others[0]['uuid']}, 4711, python train.py, with, commas, 69000"
    linux.install("/usr/bin/nvidia-smi", FakeSmi(*others, processes=[process]))
    linux.libcuda = replace(linux.libcuda, devices=(H100, H100))
    finding = only(linux.with_torch("2.6.0", "12.4"))
    assert (finding.id, finding.level) == ("gpu-use.busy", "warning")
    assert "70000 of 81559 MiB taken by python train.py, with, commas (process 4711)" in finding.seen
    assert "ps -fp 4711" in finding.cure
    assert "CUDA_VISIBLE_DEVICES=1" in finding.cure
    assert explain_failure("torch.OutOfMemoryError: CUDA out of memory.", linux) == [finding]


def test_case_9_a_process_counts_however_small(linux: FakeMachine) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(), processes=[f"{gpu()['uuid']}, 4711, python, [N/A]"]))
    assert only(linux).id == "gpu-use.busy"
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(), processes=[f"{gpu()['uuid']}, {os.getpid()}, we, 9"]))
    assert troubles(linux) == {}


def test_case_9_where_all_are_taken_the_one_with_most_free_memory(linux: FakeMachine) -> None:
    cards = [gpu(i, memory__used=used) for i, used in enumerate(("70000", "40000", "60000"))]
    linux.install("/usr/bin/nvidia-smi", FakeSmi(*cards))
    linux.libcuda = replace(linux.libcuda, devices=(H100,) * 3)
    assert "CUDA_VISIBLE_DEVICES=1 " in troubles(linux.with_torch("2.6.0", "12.4"))["gpu-use.busy"].cure


def test_case_9_memory_taken_by_processes_that_do_not_show(wsl: FakeMachine) -> None:
    wsl.install("/usr/lib/wsl/lib/nvidia-smi", FakeSmi(rtx_4070(memory__used="9000")))
    assert only(wsl).id == "gpu-use.busy"


@pytest.mark.parametrize(
    ("mode", "finding_id", "level"),
    [
        ("Exclusive_Process", "compute-mode.exclusive", "warning"),
        ("Prohibited", "compute-mode.prohibited", "error"),
    ],
)
def test_case_9_compute_modes(linux: FakeMachine, mode: str, finding_id: str, level: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(compute_mode=mode)))
    finding = only(linux)
    assert (finding.id, finding.level) == (finding_id, level)
    assert finding.cure == "sudo nvidia-smi -i 0 -c DEFAULT"
    assert finding.seen == f"compute mode {mode}"
    assert "compute-mode" not in found(linux)


def test_case_10_small_shared_memory(linux: FakeMachine) -> None:
    linux.write("/.dockerenv")
    linux.disks["/dev/shm"] = Disk(64 << 20, 64 << 20)
    finding = only(linux)
    assert (finding.id, finding.level) == ("shm.small", "warning")
    assert finding.cure.startswith("docker run --shm-size=8g")
    assert explain_failure("Bus error (core dumped)", linux) == [finding]


def test_case_10_killed_for_lack_of_memory(wsl: FakeMachine) -> None:
    wsl.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    wsl.write("/proc/self/cgroup", "0::/init.scope\n")
    wsl.write("/sys/fs/cgroup/cgroup.controllers", "memory")
    wsl.write("/sys/fs/cgroup/init.scope/memory.events", "oom 1\noom_kill 3\noom_group_kill 0\n")
    trouble = troubles(wsl)
    assert list(trouble) == ["memory.little", "cgroup.oom-kills"]
    assert "3 process" in trouble["cgroup.oom-kills"].title
    opens_it = 'cmd.exe /c "notepad %UserProfile%\\.wslconfig"   # write below [wsl2]: memory=12GB'
    assert all(finding.cure.startswith(opens_it) for finding in trouble.values())
    assert explain_failure("exitcode: -9 (SIGKILL)", wsl) == list(trouble.values())
    assert "cgroup" not in found(wsl)
    wsl.write("/.dockerenv")
    assert troubles(wsl)["memory.little"].cure.startswith(opens_it), "no limit of the container to raise"
    wsl.write("/sys/fs/cgroup/memory.max", f"{2 * GIB}\n")
    assert troubles(wsl)["memory.little"].cure.startswith("docker run --memory=7g")


def test_case_11_hang_between_machines(linux: FakeMachine) -> None:
    linux.hostname_answer = {"hostname": "box", "address": "127.0.1.1"}
    assert troubles(linux) == {}
    finding = only(linux.with_environment(NNODES="2"))
    assert (finding.id, finding.level) == ("hostname.loopback", "warning")
    assert finding.cure.startswith("export GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0")
    assert explain_failure("Gloo connectFullMesh failed with ...", linux) == [finding]
    assert troubles(linux.with_environment(GLOO_SOCKET_IFNAME="eth0")) == {}


@pytest.mark.parametrize(
    ("environment", "finding_id"),
    [
        ({"NCCL_SOCKET_IFNAME": "ib0"}, "interface.unknown"),
        ({"GLOO_SOCKET_IFNAME": "eth1,ens3"}, "interface.unknown"),
        ({"NCCL_SOCKET_IFNAME": "docker", "NNODES": "2"}, "interface.virtual"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NNODES": "2"}, "interface.virtual"),
        ({"GLOO_SOCKET_IFNAME": "lo", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}, ""),
        ({"GLOO_SOCKET_IFNAME": "lo"}, ""),
        ({"NCCL_SOCKET_IFNAME": "docker0"}, ""),
        ({"NCCL_SOCKET_IFNAME": "eth"}, ""),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, ""),
        ({"NCCL_SOCKET_IFNAME": "^docker0,virbr0"}, ""),
    ],
)
def test_case_11_interfaces(linux: FakeMachine, environment: dict[str, str], finding_id: str) -> None:
    linux.interfaces.append("docker0")
    assert list(troubles(linux.with_environment(**environment))) == ([finding_id] if finding_id else [])


def test_nvidia_smi_of_a_linux_driver_is_passed_over_in_wsl(wsl: FakeMachine) -> None:
    failure = Completed(9, SMI_FAILURES["not-loaded"])
    wsl.install("/usr/bin/nvidia-smi", FakeSmi(failure=failure))
    assert troubles(wsl) == {}
    wsl.install("/usr/lib/wsl/lib/nvidia-smi", FakeSmi(failure=failure))
    assert troubles(wsl)["driver.not-loaded"].cure.startswith("wsl.exe --update")


# --- the error texts that docs/troubleshooting.md quotes


def without_uvm(machine: FakeMachine) -> FakeMachine:
    machine.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 999)
    return machine.with_torch("2.6.0", "12.4")


def without_code(machine: FakeMachine) -> FakeMachine:
    return machine.with_torch("2.6.0", "12.4", "sm_50 sm_80")


def with_transformers_5(machine: FakeMachine) -> FakeMachine:
    others = tuple(each for each in machine.distributions if each.name != "transformers")
    return machine.change(distributions=(*others, Distribution("transformers", "5.0.0", "/venv/site-packages")))


def with_a_taken_gpu(machine: FakeMachine) -> FakeMachine:
    card = gpu(memory__used="70000", compute_mode="Exclusive_Process")
    machine.install("/usr/bin/nvidia-smi", FakeSmi(card))
    return machine


def with_little_memory(machine: FakeMachine) -> FakeMachine:
    machine.write("/proc/meminfo", "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\n")
    machine.disks["/dev/shm"] = Disk(64 << 20, 64 << 20)
    return machine


def beside_others(machine: FakeMachine) -> FakeMachine:
    machine.hostname_answer = {"hostname": "box", "address": "127.0.1.1"}
    return machine.with_environment(NNODES="2")


# README's case -> the machine in that trouble
README_MACHINES: dict[int, tuple[str, Callable[[FakeMachine], FakeMachine]]] = {
    1: ("wsl", shadow),
    2: ("linux", lambda machine: machine.with_torch("2.13.0+cpu", None)),
    3: ("linux", lambda machine: machine.with_torch("2.13.0", "13.0")),
    5: ("linux", without_code),
    7: ("linux", lambda machine: broken_driver(machine, SMI_FAILURES["version-mismatch"])),
    8: ("linux", with_transformers_5),
    9: ("linux", with_a_taken_gpu),
    10: ("linux", with_little_memory),
    11: ("linux", beside_others),
    12: ("linux", without_uvm),
}
CASES_WITHOUT_A_TEXT = {4, 6}  # nothing is said there but that there is no GPU


def readme_cases() -> dict[int, tuple[list[str], set[str]]]:
    """docs/troubleshooting.md: a case's number -> the texts quoted in its heading, and its finding ids."""
    section = (REPOSITORY / "docs" / "troubleshooting.md").read_text()
    cases = re.findall(r"^(\d+)\. \*\*(.*?)\*\*(.*?)(?=^\d+\. |^<details>)", section, re.MULTILINE | re.DOTALL)
    return {
        int(number): (
            [text for text in re.findall(r"`([^`]+)`", heading) if text != "nvidia-smi"],
            set(re.findall(r"`([a-z-]+\.[a-z-]+)`", body[body.rindex("(") :])),
        )
        for number, heading, body in cases
    }


def test_every_case_of_the_readme_that_quotes_a_text_has_a_machine() -> None:
    cases = readme_cases()
    assert set(cases) == set(README_MACHINES) | CASES_WITHOUT_A_TEXT
    assert {number for number, (texts, _) in cases.items() if not texts} == CASES_WITHOUT_A_TEXT
    assert all(ids for _, ids in cases.values())


README_TEXTS = [(number, text) for number, (texts, _) in readme_cases().items() for text in texts]
# what else the same machines make torch, torchrun and NVIDIA's tools say
OTHER_TEXTS = [
    (2, "RuntimeError: Attempting to deserialize object on a CUDA device but torch.cuda.is_available() is False."),
    (7, "Failed to initialize NVML: Driver/library version mismatch"),
    (7, "UserWarning: Can't initialize NVML"),
    (10, "exitcode  : -9 (pid: 4711)"),
    (12, "RuntimeError: CUDA unknown error - this may be due to an incorrectly set up environment, e.g. changing env"
         " variable CUDA_VISIBLE_DEVICES after program start. Setting the available devices to be zero."),
    (12, "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 304: OS call failed"),
]  # fmt: skip


@pytest.mark.parametrize(("case", "text"), README_TEXTS + OTHER_TEXTS)
def test_a_text_leads_to_its_case(case: int, text: str, request: pytest.FixtureRequest) -> None:
    kind, breaks = README_MACHINES[case]
    explained = {finding.id for finding in explain_failure(text, breaks(request.getfixturevalue(kind)))}
    assert explained & readme_cases()[case][1], explained


# --- the rest of the table


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        (100, "no-device"),
        (0, "no-device"),
        (304, "unknown"),
        (802, "fabric-manager"),
        (803, "version-mismatch"),
        (804, "compat"),
        (999, "unknown"),
        (34, "stub"),
        (46, "init-failed"),
        (1234, "init-failed"),
        (None, "init-failed"),
    ],
)
def test_cuinit_answers(linux: FakeMachine, code: int | None, cause: str) -> None:
    linux.write("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open Kernel Module  550.90\nGCC")
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), code, error="ended by signal 11")
    finding = only(linux.with_torch("2.6.0", "12.4"))
    assert (finding.id, finding.level) == (f"libcuda.{cause}", "error")
    assert LINUX_LIBCUDA in finding.seen
    if cause:
        assert "Open Kernel Module  550.90" in finding.seen
        assert ("ended by signal 11" if code is None else f"cuInit answers {code}") in finding.seen


def test_cuinit_says_more_than_nvidia_smi(linux: FakeMachine) -> None:
    broken_driver(linux, "Segmentation fault").libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 802)
    assert list(troubles(linux)) == ["driver.fails", "libcuda.fabric-manager"]


def test_stub_is_not_taken_for_a_shadow(wsl: FakeMachine) -> None:
    wsl.libcuda = Libcuda(True, ("/usr/local/cuda-12.4/targets/x86_64-linux/lib/stubs/libcuda.so",), None, 100)
    assert only(wsl.with_torch("2.6.0", "12.4")).id == "libcuda.stub"


def test_wsl_restart_comes_first(wsl: FakeMachine) -> None:
    wsl.libcuda = Libcuda(True, (WSL_LIBCUDA,), (12, 4), 999)
    finding = only(wsl.with_torch("2.6.0", "12.4"))
    assert finding.id == "libcuda.unknown"
    assert finding.cure.startswith("wsl.exe --shutdown")


def test_libcuda_that_hangs(linux: FakeMachine) -> None:
    linux.libcuda = Libcuda(False, error="no answer in 30 s", timed_out=True)
    assert "no answer in 30 s" in troubles(linux, "gpu")["libcuda.init-failed"].seen


def test_libcuda_is_missing(linux: FakeMachine) -> None:
    linux.libcuda = Libcuda(False, error="libcuda.so.1: cannot open shared object file")
    linux.with_torch("2.6.0", "12.4")
    assert "libnvidia-compute-550" in only(linux).cure
    assert only(linux).id == "libcuda.missing"
    linux.write("/.dockerenv")
    assert "NVIDIA_DRIVER_CAPABILITIES" in only(linux).cure


def test_wsl_libcuda_is_not_on_the_loaders_path(wsl: FakeMachine) -> None:
    wsl.libcuda = Libcuda(False, error="libcuda.so.1: cannot open shared object file")
    finding = only(wsl.with_torch("2.6.0", "12.4"))
    assert finding.id == "libcuda.not-found"
    assert "/etc/ld.so.conf.d/ld.wsl.conf && sudo ldconfig" in finding.cure


def test_wsl_1(no_gpu: FakeMachine) -> None:
    no_gpu.write("/proc/sys/kernel/osrelease", "4.4.0-19041-Microsoft")
    finding = troubles(no_gpu.with_environment(WSL_DISTRO_NAME="Debian"))["wsl.version-1"]
    assert finding.cure.startswith("wsl.exe --set-version Debian 2")
    assert why_no_gpu(no_gpu)[0].startswith("this is WSL 1")


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


def test_wsl_without_its_device_node(wsl: FakeMachine) -> None:
    wsl.at("/dev/dxg").unlink()
    wsl.libcuda = Libcuda(True, (WSL_LIBCUDA,), (12, 4), 100)
    wsl.with_torch("2.6.0", "12.4")
    assert (only(wsl).id, only(wsl).level) == ("libcuda.device-nodes", "error")
    assert (only(wsl).title, only(wsl).seen) == (
        "the GPU's device nodes are missing",
        f"/dev/dxg: {os.strerror(errno.ENOENT)}; {WSL_LIBCUDA}: cuInit answers 100",
    )
    assert only(wsl).cure.startswith("wsl.exe --update")
    wsl.write("/dev/dxg")
    wsl.locked["/dev/dxg"] = os.strerror(errno.EACCES)
    assert only(wsl).id == "libcuda.device-nodes"
    assert only(wsl).cure == "sudo chmod a+rw /dev/dxg"


def test_wsl_on_a_windows_without_nvidia(wsl: FakeMachine) -> None:
    shutil.rmtree(wsl.at("/usr/lib/wsl"))
    wsl.libcuda = Libcuda(False, error="libcuda.so.1: cannot open shared object file")
    finding = only(wsl.with_torch("2.6.0", "12.4"))
    assert (finding.id, finding.level) == ("driver.no-gpu", "warning")
    assert "wsl.exe --update" in finding.cure


def test_gpu_without_a_driver(no_gpu: FakeMachine) -> None:
    no_gpu.write("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    no_gpu.write("/sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n")
    no_gpu.write("/proc/modules", "nouveau 2396160 4 - Live 0x0\n")
    finding = only(no_gpu)
    assert (finding.id, finding.level) == ("driver.not-installed", "error")
    assert "nouveau" in finding.seen
    assert finding.cure == "sudo ubuntu-drivers install nvidia:580 && sudo reboot"


def test_nvidia_sound_cards_and_other_vendors_are_no_gpus(no_gpu: FakeMachine) -> None:
    for number, vendor, kind in ((1, "0x10de", "0x040300"), (2, "0x8086", "0x030000")):
        no_gpu.write(f"/sys/bus/pci/devices/0000:0{number}:00.0/vendor", f"{vendor}\n")
        no_gpu.write(f"/sys/bus/pci/devices/0000:0{number}:00.0/class", f"{kind}\n")
    assert only(no_gpu).id == "driver.no-gpu"


def test_slim_container_with_a_working_libcuda(linux: FakeMachine) -> None:
    linux.at("/usr/bin/nvidia-smi").unlink()
    assert troubles(linux) == {}
    assert "none needed" in found(linux)["driver"].title
    finding = only(linux.with_environment(CUDA_VISIBLE_DEVICES="3"))
    assert finding.id == "visible-devices.out-of-range"
    assert finding.seen.endswith("GPUs here: 0")


def test_nvidia_smi_hangs(linux: FakeMachine) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(failure=Completed(None, timed_out=True)))
    assert only(linux).id == "driver.hangs"


def test_device_nodes(linux: FakeMachine) -> None:
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 4), 100)
    linux.with_torch("2.6.0", "12.4").locked["/dev/nvidia0"] = os.strerror(errno.EACCES)
    assert [finding.id for finding in explain_no_gpu(linux)] == ["libcuda.device-nodes"]
    assert only(linux).title == "this user may not open the GPU's device nodes"
    assert only(linux).seen == f"/dev/nvidia0: {os.strerror(errno.EACCES)}; {LINUX_LIBCUDA}: cuInit answers 100"
    assert "usermod -aG video $USER" in only(linux).cure
    linux.locked.clear()
    linux.at("/dev/nvidia-uvm").unlink()
    assert only(linux).title == "the GPU's device nodes are missing"
    assert only(linux).seen.startswith(f"/dev/nvidia-uvm: {os.strerror(errno.ENOENT)}; ")
    assert only(linux).cure == "sudo nvidia-modprobe -c 0 -u"
    linux.libcuda = replace(linux.libcuda, init_code=999)
    assert only(linux).id == "libcuda.unknown", "nvidia_uvm is not loaded: README's case 12"
    linux.write("/.dockerenv")
    assert only(linux).cure.startswith("docker run --gpus all")
    linux.libcuda = replace(linux.libcuda, init_code=100)
    linux.write("/dev/nvidia-uvm")
    assert only(linux).id == "libcuda.no-device"


def test_torch_is_missing_or_for_amd_or_broken(linux: FakeMachine) -> None:
    linux.torch_files = TorchFiles()
    linux.distributions = tuple(each for each in linux.distributions if each.name != "torch")
    assert only(linux).id == "packages.missing", "said once"
    linux.with_torch("2.6.0+rocm6.2", None).distributions += (Distribution("torch", "2.6.0", "/venv/site-packages"),)
    assert only(linux).id == "torch-build.cpu-only"
    linux.with_torch("2.6.0", "12.4").with_environment(LD_LIBRARY_PATH="/usr/local/cuda-11.5/lib64:/opt/x")
    assert troubles(linux) == {}
    linux.torch = TorchImport(False, error="ImportError: undefined symbol: ncclCommRegister")
    assert list(troubles(linux)) == ["torch-import.fails"]
    assert "LD_LIBRARY_PATH=/usr/local/cuda-11.5/lib64:/opt/x" in only(linux).seen
    assert only(linux).cure.startswith("env -u LD_LIBRARY_PATH")


@pytest.mark.parametrize(
    ("capability", "arch_list", "fits"),
    [
        ((8, 9), "sm_80 sm_86 sm_90", True),
        ((8, 0), "sm_86", False),
        ((9, 0), "sm_80", False),
        ((12, 0), "sm_90 compute_90", True),
        ((12, 0), "sm_100 sm_120", True),
        ((10, 0), "sm_90a", False),
        ((9, 0), "sm_90a", True),
        ((10, 3), "sm_100", True),
        ((6, 1), "sm_60", True),
        ((6, 1), "compute_70", False),
    ],
)
def test_binary_compatibility(capability: tuple[int, int], arch_list: str, fits: bool) -> None:
    assert torch_build.has_code_for(capability, arch_list.split()) == fits


def test_two_torches(linux: FakeMachine) -> None:
    linux.with_environment(PYTHONPATH="/opt/other")
    linux.distributions = (Distribution("torch", "2.1.0", "/opt/other"), *linux.distributions)
    trouble = troubles(linux)
    assert list(trouble) == ["packages.wrong-version", "duplicates.twice"]
    assert "duplicates" not in found(linux)
    assert trouble["duplicates.twice"].level == "error"
    assert "2.1.0 in /opt/other; 2.6.0 in /venv/site-packages; PYTHONPATH=" in trouble["duplicates.twice"].seen
    linux.distributions = (Distribution("numpy", "2.0.0", "/opt/other"), *linux.distributions[1:])
    assert (only(linux).id, only(linux).level) == ("duplicates.twice", "warning")


def test_missing_packages(linux: FakeMachine) -> None:
    linux.distributions = tuple(each for each in linux.distributions if each.name != "einops")
    assert only(linux).id == "packages.missing"
    assert "packages" not in found(linux)
    assert "einops" in only(linux).title


def test_the_distribution_is_named_once(linux: FakeMachine) -> None:
    lines = as_text([found(linux)["system"]])
    assert lines == "ok       Ubuntu 22.04.5 LTS (kernel 6.8.0-45-generic, x86_64, Python 3.11.7 at python)"


def test_control_group_of_version_2(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "0::/a/b\n")
    linux.write("/sys/fs/cgroup/cgroup.controllers", "cpu memory pids")
    linux.write("/sys/fs/cgroup/a/b/memory.max", "max\n")
    linux.write("/sys/fs/cgroup/a/memory.max", f"{4 * GIB}\n")
    linux.write("/sys/fs/cgroup/a/memory.current", f"{GIB}\n")
    assert host.control_group(linux) == host.ControlGroup(2, 4 * GIB, "/sys/fs/cgroup/a/memory.max", GIB, 0)
    trouble = troubles(linux)
    assert list(trouble) == ["memory.little"]
    assert found(linux)["cgroup"].seen == "control group version 2: memory 4.0 GiB"
    assert "3.0 GiB are left" in trouble["memory.little"].seen
    linux.write("/sys/fs/cgroup/a/b/memory.events", "oom_kill 2\n")
    trouble = troubles(linux)
    assert list(trouble) == ["memory.little", "cgroup.oom-kills"]
    assert trouble["cgroup.oom-kills"].seen.endswith(": memory 4.0 GiB")
    assert "cgroup" not in found(linux)


def test_control_group_of_version_1(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n3:pids:/docker/abc\n0::/x\n")
    # the container sees its own group at the root of the mount, not at the host's path
    limit = "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    linux.write(limit, f"{2 * GIB}\n")
    linux.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", f"{GIB}\n")
    assert host.control_group(linux) == host.ControlGroup(1, 2 * GIB, limit, GIB, 0)
    assert only(linux).id == "memory.little"


def test_version_1_without_limits(linux: FakeMachine) -> None:
    linux.write("/proc/self/cgroup", "5:memory:/\n4:cpu:/\n")
    linux.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    assert host.control_group(linux) == host.ControlGroup(1)
    assert found(linux)["cgroup"].seen == "control group version 1: no limit of memory"
    assert troubles(linux) == {}


@pytest.mark.parametrize(
    ("marks", "environment", "cure"),
    [
        (["/.dockerenv"], {"limit": "1"}, "docker run --memory=8g"),
        (["/run/.containerenv"], {"limit": "1"}, "podman run --memory=8g"),
        ([], {"SLURM_JOB_ID": "1", "limit": "1"}, "sbatch --mem=8G"),
        ([], {"SLURM_JOB_ID": "1", "SLURM_MEM_PER_NODE": "6000"}, "sbatch --mem=12G"),
        ([], {"limit": "1"}, "echo 8G | sudo tee /sys/fs/cgroup/memory.max"),
        ([], {}, "ps -eo rss,pid,user,args --sort=-rss | head"),
    ],
)
def test_more_memory(linux: FakeMachine, marks: list[str], environment: dict[str, str], cure: str) -> None:
    linux.write("/proc/meminfo", "MemTotal: 65000000 kB\nMemAvailable: 1000000 kB\n")
    if environment.pop("limit", ""):
        limited(linux, 3 * GIB)
    for mark in marks:
        linux.write(mark)
    assert only(linux.with_environment(**environment)).cure.startswith(cure)


def limited(machine: FakeMachine, limit_bytes: int, kills: int = 0) -> FakeMachine:
    machine.write("/proc/self/cgroup", "0::/\n")
    machine.write("/sys/fs/cgroup/cgroup.controllers", "memory")
    machine.write("/sys/fs/cgroup/memory.max", f"{limit_bytes}\n")
    machine.write("/sys/fs/cgroup/memory.current", "0\n")
    machine.write("/sys/fs/cgroup/memory.events", f"oom_kill {kills}\n")
    return machine


# the present limit and the host's memory, in GiB -> the limit that helps; None: there is no more to give
LIMITS = [
    (128, 512, 256),
    (128, 160, 160),
    (128, 130, None),
    (128, 128, None),
    (2, 512, 8),
    (1, 1.9, None),
    (30, 64, 60),
]


@pytest.mark.parametrize(("limit", "total", "better"), LIMITS)
@pytest.mark.parametrize("place", ["docker", "podman", "kubernetes", "slurm", "systemd"])
def test_a_limit_is_only_ever_raised(
    linux: FakeMachine, place: str, limit: float, total: float, better: int | None
) -> None:
    """A rank killed for memory: the advice is more than the present limit, no more than the machine has, or other."""
    kilobytes = int(total * GIB) // 1024
    linux.write("/proc/meminfo", f"MemTotal: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    limited(linux, int(limit * GIB), kills=1)
    marks = {"docker": "/.dockerenv", "podman": "/run/.containerenv"}
    variables = {"kubernetes": {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "slurm": {"SLURM_JOB_ID": "7"}}
    if place in marks:
        linux.write(marks[place])
    linux.with_environment(**variables.get(place, {}))
    cure = troubles(linux)["cgroup.oom-kills"].cure
    if better is None:
        assert cure.startswith("ps -eo rss") and "--batch_size 1" in cure
        return
    expected = {
        "docker": f"docker run --memory={better}g --memory-swap={better}g ...",
        "podman": f"podman run --memory={better}g --memory-swap={better}g ...",
        "kubernetes": f"kubectl set resources deployment NAME --limits=memory={better}Gi   # or in the pod's own file",
        "slurm": f"sbatch --mem={better}G ..."
        if better < int(total)
        else "sbatch --mem=0 ...   # all of the node's memory",
        "systemd": f"echo {better}G | sudo tee /sys/fs/cgroup/memory.max",
    }
    assert cure == expected[place]


@pytest.mark.parametrize(("total", "memory"), [(7, 11), (3, 8), (15.5, 24), (63, 95)])
def test_wsl_gets_more_than_it_has(wsl: FakeMachine, total: float, memory: int) -> None:
    wsl.write("/proc/meminfo", f"MemTotal: {int(total * GIB) // 1024} kB\nMemAvailable: 1000000 kB\n")
    assert f"memory={memory}GB (now {total:.1f} GiB;" in only(wsl).cure


@pytest.mark.parametrize(
    ("shm", "total", "size"),
    [
        (64, 512, 8),
        (64, 10, 5),
        (16 << 10, 512, 32),
        (16 << 10, 40, 20),
        (30 << 10, 62, None),
        (64, 1, None),
        (0, 62, 8),
    ],
)
@pytest.mark.parametrize("mark", ["/.dockerenv", "/run/.containerenv", ""])
def test_shared_memory_is_only_ever_enlarged(
    linux: FakeMachine, mark: str, shm: int, total: int, size: int | None
) -> None:
    """By more than it has (MiB), within half of the host's memory (GiB); else it is told what fills it."""
    kilobytes = total * GIB // 1024
    linux.write("/proc/meminfo", f"MemTotal: {kilobytes} kB\nMemAvailable: {kilobytes} kB\n")
    linux.disks["/dev/shm"] = Disk(shm << 20, 1 << 20) if shm else None
    if mark:
        linux.write(mark)
    cure = troubles(linux)["shm.small"].cure
    if size is None:
        assert cure.startswith("ls -lS /dev/shm | head")
    elif mark:
        engine = "docker" if "docker" in mark else "podman"
        assert cure == f"{engine} run --shm-size={size}g ...   # or: --ipc=host"
    else:
        assert cure == f"sudo mount -o remount,size={size}G /dev/shm"


def test_shared_memory_of_a_pod(linux: FakeMachine) -> None:
    linux.disks["/dev/shm"] = Disk(64 << 20, 64 << 20)
    cure = only(linux.with_environment(KUBERNETES_SERVICE_HOST="10.0.0.1")).cure
    assert cure.startswith("kubectl edit deployment NAME   # mount an emptyDir")


# --- nvidia-smi's answers


def test_older_drivers_refuse_fields(linux: FakeMachine) -> None:
    fake = FakeSmi(gpu(memory__used="8"), unknown=("compute_mode", "memory.total", "compute_cap"))
    linux.install("/usr/bin/nvidia-smi", fake)
    answer = smi.smi(linux)
    assert answer.gpus[0].memory_used_mib == 8
    assert (answer.gpus[0].compute_mode, answer.gpus[0].memory_total_mib, answer.gpus[0].capability) == (None,) * 3
    assert fake.queries == 4
    assert smi.smi(linux) is answer


@pytest.mark.parametrize("text", ["", "WARNING: infoROM is corrupted at gpu 0000:41:00.0", "0, GPU-1, H100"])
def test_answers_that_are_no_list_of_gpus(linux: FakeMachine, text: str) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(failure=Completed(0, text)))
    assert not smi.smi(linux).gpus
    assert [name for name in troubles(linux) if name.startswith("driver.")]


@pytest.mark.parametrize(
    ("text", "finding_id", "level"),
    [
        ("WARNING: infoROM is corrupted at gpu 0000:41:00.0", "driver.complains", "warning"),
        ("Unable to determine the device handle for GPU0000:41:00.0: GPU is lost", "driver.complains", "warning"),
    ],
)
def test_complaints_beside_a_list_of_gpus(linux: FakeMachine, text: str, finding_id: str, level: str) -> None:
    rows = FakeSmi(gpu(0), gpu(1))
    linux.install("/usr/bin/nvidia-smi", lambda given: Completed(14, f"{text}\n{rows(given).stdout}"))
    linux.libcuda = replace(linux.libcuda, devices=(H100, H100))
    linux.with_torch("2.6.0", "12.4")
    assert (only(linux).id, only(linux).level) == (finding_id, level)
    assert text.splitlines()[0] in only(linux).seen
    assert "2 GPUs" in found(linux)["driver"].title


def test_a_driver_that_refuses_everything_is_an_error(linux: FakeMachine) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(), unknown=["uuid"]))
    assert "driver.fails" in troubles(linux)


@pytest.mark.parametrize("text", ["[N/A]", "[Not Supported]", "N/A", "[Insufficient Permissions]", ""])
def test_unknown_values(text: str) -> None:
    assert smi.known(text) is None
    assert smi.number(text) is None


@pytest.mark.parametrize(
    ("header", "driver_version", "expected"),
    [
        ("CUDA Version: 12.4 ", "550.54.15", (12, 4)),
        ("CUDA UMD Version: 13.1 ", "590.10", (13, 1)),
        ("CUDA Version: ERR!", "546.80", (12, 3)),
        ("", "551.78", (12, 4)),
        ("", "390.157", None),
    ],
)
def test_cuda_of_the_driver(
    linux: FakeMachine, header: str, driver_version: str, expected: tuple[int, int] | None
) -> None:
    query = FakeSmi(gpu(driver_version=driver_version))
    linux.install("/usr/bin/nvidia-smi", lambda arguments: query(arguments) if arguments else Completed(0, header))
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 2), 100)
    assert smi.driver_cuda(linux) == expected
    linux.libcuda = Libcuda(True, (LINUX_LIBCUDA,), (12, 9), 0, (H100,))
    assert smi.driver_cuda(linux) == (12, 9)


# --- the frame: robustness, ids, schema, exit codes, text


def test_a_check_that_breaks_is_a_warning(linux: FakeMachine) -> None:
    def broken(machine: Machine) -> list[Finding]:
        raise ZeroDivisionError("on a strange machine")

    finding = run_check(Check("strange", "host", broken), linux)[0]
    assert (finding.id, finding.level, finding.topic) == ("strange.unchecked", "warning", "host")
    assert "ZeroDivisionError: on a strange machine" in finding.seen


def test_checks_survive_an_empty_machine(tmp_path: Path) -> None:
    """No file at all, no program: nothing may break, and nothing may be 'could not be checked'."""
    machine = FakeMachine(tmp_path)
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    machine.libcuda, machine.torch_files, machine.distributions = Libcuda(False), TorchFiles(), ()
    machine.torch = TorchImport(False)
    machine.disks = dict.fromkeys(machine.disks)
    machine.interfaces, machine.hostname_answer = [], {"error": "no answer in 5 s"}
    trouble = troubles(machine)
    assert not [name for name in trouble if name.endswith("unchecked")]
    assert exit_code(trouble.values()) == 1


def test_names_of_checks_are_unique() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)


def test_unknown_topic_is_refused(linux: FakeMachine) -> None:
    with pytest.raises(ValueError, match="no such topic: colour; there are system"):
        diagnose(linux, ["colour"])


def test_unknown_failures_are_not_explained(linux: FakeMachine) -> None:
    assert explain_failure("ZeroDivisionError: division by zero", broken_driver(linux, "GPU is lost")) == []


def test_json_schema(wsl: FakeMachine) -> None:
    answer = json.loads(json.dumps(as_json(diagnose(shadow(wsl)))))
    check_schema(answer)
    assert answer["exit_code"] == 1
    assert answer["counts"]["error"] == 1


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


def test_text(wsl: FakeMachine) -> None:
    findings = diagnose(shadow(wsl))
    text = as_text(findings, width=80)
    assert "\x1b" not in text
    cure = "cure: LD_LIBRARY_PATH=/usr/lib/wsl/lib bash run_gemini.sh   # at once, without removing anything"
    assert f"         {cure}" in text.splitlines(), "a command is one line, however narrow the terminal"
    others = [line for line in text.splitlines() if "cure:" not in line and not line.startswith(" " * 15)]
    assert max(map(len, others)) <= 80
    assert "id:   libcuda.shadowed" in text
    coloured = as_text(findings, colour=True, width=80)
    assert coloured != text
    assert re.sub(r"\x1b\[\d+m", "", coloured) == text


def test_colour_is_for_terminals() -> None:
    main_side, other_side = pty.openpty()
    with os.fdopen(main_side), os.fdopen(other_side, "w") as terminal, open(os.devnull, "w") as file:
        assert wants_colour(terminal, {})
        assert wants_colour(terminal, {"NO_COLOR": ""})
        assert not wants_colour(terminal, {"NO_COLOR": "1"})
        assert not wants_colour(terminal, {"TERM": "dumb"})
        assert not wants_colour(file, {})


def test_only_the_standard_library() -> None:
    """At the top of no file anything else, and torch only in probes.py, which runs in child processes."""
    for path in DOCTOR.glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (each.split(".")[0] for each in names):
                allowed = name in sys.stdlib_module_names or name == "commons"
                assert allowed or (name == "torch" and path.name == "probes.py"), (path.name, name)


def test_old_pythons_can_read_the_first_files() -> None:
    """Neither f-strings nor annotations in what an old Python reads before it is refused."""
    first = [DOCTOR / name for name in ("__main__.py", "__init__.py")]
    for path in (REPOSITORY / "commons" / "__init__.py", *first):
        text = path.read_text()
        text.encode("ascii")
        for node in ast.walk(ast.parse(text)):
            assert not isinstance(node, ast.JoinedStr | ast.AnnAssign | ast.NamedExpr), path
            if isinstance(node, ast.FunctionDef):
                assert node.returns is None
                assert not any(argument.annotation for argument in node.args.args)


@pytest.mark.parametrize("name", ["python3.9", "python3.8", "python3.6"])
def test_old_pythons_get_a_sentence(name: str) -> None:
    path = shutil.which(name)
    works = path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0
    if not path or not works:
        pytest.skip(f"no {name} here")
    done = subprocess.run(
        [path, "-B", "commons/doctor", "--json"],  # as run_gemini.sh --doctor does
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: this suite needs Python 3.10 or newer; this is Python")
    assert "Traceback" not in done.stderr


# --- real processes on this machine

HAS_TORCH = Machine().torch_files.version is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="needs torch")
needs_no_gpu = pytest.mark.skipif(bool(Machine().which("nvidia-smi")), reason="for machines without a GPU")


def run_doctor(*arguments: str, python: Sequence[str] = (sys.executable,), **environment: str) -> Completed:
    return run_process(
        [*python, "-m", "commons.doctor", *arguments],
        {**os.environ, "OMP_NUM_THREADS": "1", **environment},
        150,
    )


@needs_torch
def test_real_run() -> None:
    """The whole doctor on this machine."""
    done = run_doctor("--json")
    assert done.stderr == ""
    answer = json.loads(done.stdout)
    check_schema(answer)
    assert done.returncode == answer["exit_code"]
    by_id = {finding["id"]: finding for finding in answer["findings"]}
    assert not [name for name in by_id if name.endswith("unchecked")]
    assert by_id["torch-import"]["level"] == "ok"


def test_real_run_where_nothing_is_installed() -> None:
    done = run_doctor("--json", python=(sys.executable, "-S", "-s"))
    answer = json.loads(done.stdout)
    check_schema(answer)
    ids = {finding["id"] for finding in answer["findings"]}
    assert "packages.missing" in ids
    assert "torch-import" not in ids
    assert done.returncode == 1


def test_text_of_a_real_run_and_wrong_flags() -> None:
    done = run_doctor("--topic", "host")
    assert done.returncode == 0, done.text
    assert re.search(r"^\d+ ok, \d+ warnings?, 0 errors\. Nothing here stops a training run$", done.stdout, re.M)
    assert "\x1b" not in done.stdout
    wrong = run_doctor("--topic", "colour")
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


@needs_no_gpu
def test_why_no_gpu_is_quick_and_leaves_torch_alone() -> None:
    code = """
        import sys, time
        started = time.perf_counter()
        from commons.doctor import why_no_gpu
        cause, cure = why_no_gpu()
        assert time.perf_counter() - started < 2, time.perf_counter() - started
        assert "torch" not in sys.modules
        print(cause)
    """
    done = run_process([sys.executable, "-c", textwrap.dedent(code)], dict(os.environ), 30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.count("\n") == 1


def test_programs_are_found_outside_path_and_must_be_executable(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path).with_environment(PATH="/opt/bin:/usr/bin")
    machine.write("/opt/bin/nvidia-smi")
    assert machine.which("nvidia-smi") is None
    machine.write("/usr/lib/wsl/lib/nvidia-smi", executable=True)
    assert machine.which("nvidia-smi") == "/usr/lib/wsl/lib/nvidia-smi"


SMI_SCRIPT = """#!/bin/sh
case "$*" in
    *query-gpu=*compute_cap*)
        echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;;
    *query-gpu=*)
        echo '0, GPU-1, NVIDIA Fake 1, 551.78, 12282, 10, Default' ;;
    "") echo '| NVIDIA-SMI 550.65   Driver Version: 551.78   CUDA Version: 12.4 |' ;;
esac
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler to make a libcuda")
@pytest.mark.parametrize(("init", "finding_id"), [(100, "libcuda.no-device"), (0, "libcuda"), (999, "libcuda.unknown")])
def test_real_library_and_real_nvidia_smi(tmp_path: Path, init: int, finding_id: str) -> None:
    """The way through dlopen, /proc/self/maps and a child process, with a library made here."""
    library = tmp_path / "libcuda.so.1"
    compile_libcuda(library, init)
    (tmp_path / "nvidia-smi").write_text(SMI_SCRIPT)
    (tmp_path / "nvidia-smi").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    # without site-packages, since torch would be asked for its GPU
    done = run_doctor(
        "--json", "--topic", "gpu", python=(sys.executable, "-S"), PATH=path, LD_LIBRARY_PATH=str(tmp_path)
    )
    by_id = {finding["id"]: finding for finding in json.loads(done.stdout)["findings"]}
    if init and not Path("/dev/nvidiactl").exists() and (init == 100 or Machine().container):
        finding_id = "libcuda.device-nodes"  # and that is the reason for the answer
    assert f"{library}: " in by_id[finding_id]["seen"]
    assert init == 0 or f": cuInit answers {init}" in by_id[finding_id]["seen"]
    assert "551.78" in by_id["driver"]["title"]
    if init == 0:
        assert "NVIDIA Fake 1 (compute capability 8.9)" in by_id["libcuda"]["seen"]
        assert by_id["libcuda"]["title"].endswith("12.4")


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
