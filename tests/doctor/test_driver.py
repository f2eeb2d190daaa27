"""The checks of driver, containers and WSL: README's cases 6 and 7."""

from __future__ import annotations

import shutil

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi
from worlds.sick_machines import SMI_FAILURES, broken_driver, found, only, troubles

from commons.doctor import as_text, why_no_gpu
from commons.doctor.machine import Libcuda
from commons.doctor.processes import Completed


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


def test_nvidia_smi_of_a_linux_driver_is_passed_over_in_wsl(wsl: FakeMachine) -> None:
    failure = Completed(9, SMI_FAILURES["not-loaded"])
    wsl.install("/usr/bin/nvidia-smi", FakeSmi(failure=failure))
    assert troubles(wsl) == {}
    wsl.install("/usr/lib/wsl/lib/nvidia-smi", FakeSmi(failure=failure))
    assert troubles(wsl)["driver.not-loaded"].cure.startswith("wsl.exe --update")


def test_wsl_1(no_gpu: FakeMachine) -> None:
    no_gpu.write("/proc/sys/kernel/osrelease", "4.4.0-19041-Microsoft")
    finding = troubles(no_gpu.with_environment(WSL_DISTRO_NAME="Debian"))["wsl.version-1"]
    assert finding.cure.startswith("wsl.exe --set-version Debian 2")
    assert why_no_gpu(no_gpu)[0].startswith("this is WSL 1")


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


def test_the_distribution_is_named_once(linux: FakeMachine) -> None:
    lines = as_text([found(linux)["system"]], width=110)
    assert lines == "ok       Ubuntu 22.04.5 LTS (kernel 6.8.0-45-generic, x86_64, Python 3.11.7 at python)"
