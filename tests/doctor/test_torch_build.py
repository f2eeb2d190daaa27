"""The checks of torch's build: README's cases 2, 3 and 5, and the torch to install."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu
from worlds.sick_machines import H100, INSIDE_WSL, LINUX_LIBCUDA, WSL_LIBCUDA, found, only, shadow, troubles

from commons.doctor import explain_failure, explain_no_gpu, torch_build, why_no_gpu
from commons.doctor.machine import CudaDevice, Distribution, Libcuda, TorchFiles, TorchImport
from commons.doctor.processes import Completed


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
        ("13.1", "9.0", "2.11.0", "the one that the GPU tests have passed with"),
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


@pytest.mark.parametrize(("cuda", "version"), [("12.4", "2.10.0"), ("13.0", "2.11.0")])
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


# --- advice that fits: driver, GPU and the present torch are looked at before a version is named


@pytest.mark.parametrize(
    ("capability", "cuda", "expected"),
    [
        ((9, 0), "13.0", "2.11.0"),
        ((9, 0), "12.8", "2.10.0"),
        ((9, 0), "12.0", "2.10.0"),
        ((7, 5), "12.8", "2.10.0"),
        ((7, 0), "13.0", "2.7.1"),
        ((6, 1), "12.4", "2.7.1"),
        ((5, 0), "12.4", "2.7.1"),
    ],
)
@pytest.mark.parametrize("trouble", ["torch-build.cpu-only", "packages.untested", "torch-import.fails"])
def test_the_version_fits_driver_and_gpu(
    linux: FakeMachine, trouble: str, capability: tuple[int, int], cuda: str, expected: str
) -> None:
    major, minor = capability
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(compute_cap=f"{major}.{minor}"), cuda=cuda))
    version = tuple(map(int, cuda.split(".")))
    linux.libcuda = replace(linux.libcuda, version=version, devices=(CudaDevice("NVIDIA X", capability),))
    linux.with_torch("2.14.0", None if trouble == "torch-build.cpu-only" else "12.4", "sm_50 compute_50")
    if trouble == "torch-import.fails":
        linux.torch = TorchImport(False, error="ImportError")
    assert troubles(linux)[trouble].cure.endswith(f" install torch=={expected}")


def test_no_torch_has_code_for_it(linux: FakeMachine) -> None:
    """Kepler: older than all builds."""
    linux.libcuda = replace(linux.libcuda, devices=(CudaDevice("Tesla K80", (3, 7)),))
    assert only(linux.with_torch("2.6.0", "12.4")).cure.startswith("bash run_gemini.sh --device cpu")
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(name="Tesla K80", compute_cap="3.7")))
    version, why = torch_build.choose_torch(linux, "2.13.0")
    assert (version, why) == ("2.13.0", "no tested torch has code for Tesla K80: it trains on the CPU")


@pytest.mark.parametrize(
    ("present", "cuda", "cure"),
    [
        ("2.6.0", (12, 4), "python -m pip uninstall -y torch && python -m pip install torch==2.10.0"),
        ("2.10.0", (12, 8), "sudo ubuntu-drivers install nvidia:580 && sudo reboot\npython -m pip uninstall -y torch"),
        ("2.10.0", (13, 0), "python -m pip uninstall -y torch && python -m pip install torch==2.11.0"),
        ("2.13.0", (13, 0), "python -m pip install --upgrade torch   # newer than the tested versions"),
    ],
)
def test_a_newer_gpu_needs_a_newer_torch_than_there_is(
    linux: FakeMachine, present: str, cuda: tuple[int, int], cure: str
) -> None:
    linux.libcuda = replace(linux.libcuda, version=cuda, devices=(CudaDevice("NVIDIA Next", (14, 0)),))
    assert troubles(linux.with_torch(present, "12.4"))["torch-arch.no-code"].cure.startswith(cure)


@pytest.mark.parametrize(("branch", "updates"), [("579.99", True), ("580.00", False), ("590.10", False)])
def test_no_driver_is_updated_to_what_it_is(linux: FakeMachine, branch: str, updates: bool) -> None:
    """A torch for a CUDA that no tested driver runs."""
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(driver_version=branch), cuda="13.0"))
    linux.libcuda = replace(linux.libcuda, version=(13, 0))
    cure = troubles(linux.with_torch("2.13.0", "14.0"))["torch-cuda.newer-than-driver"].cure
    assert cure.startswith("python -m pip uninstall -y torch && python -m pip install torch==2.11.0")
    assert ("ubuntu-drivers install nvidia:580" in cure) == updates
