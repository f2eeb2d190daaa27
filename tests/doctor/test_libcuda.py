"""The check of libcuda: README's cases 1 and 12, and what else cuInit may answer."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine
from worlds.sick_machines import INSIDE_WSL, LINUX_LIBCUDA, WSL_LIBCUDA, broken_driver, found, only, shadow, troubles

from commons.doctor import explain_failure, explain_no_gpu, why_no_gpu
from commons.doctor.machine import Libcuda
from commons.doctor.processes import Completed


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


def test_case_1_containers_in_wsl_have_their_libcuda_elsewhere(wsl: FakeMachine) -> None:
    wsl.write("/.dockerenv")
    mounted = "/usr/lib/x86_64-linux-gnu/libcuda.so.1.1"
    wsl.libcuda = replace(wsl.libcuda, paths=(mounted,))
    wsl.write(INSIDE_WSL)
    assert troubles(wsl) == {}
    wsl.libcuda = Libcuda(True, (mounted,), (12, 4), 100)
    assert only(wsl.with_torch("2.6.0", "12.4")).id == "libcuda.no-device"


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
