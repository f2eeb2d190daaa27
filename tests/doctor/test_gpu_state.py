"""The checks of compute mode and other processes: README's case 9."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu, rtx_4070
from worlds.sick_machines import H100, found, only, troubles

from commons.doctor import diagnose, explain_failure


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


def test_case_9_the_taken_gpu_itself_is_never_the_advice(linux: FakeMachine) -> None:
    """One GPU, and it is taken; then the emptier of two that are taken."""
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(), processes=[f"{gpu()['uuid']}, 4711, python, 9"]))
    assert "CUDA_VISIBLE_DEVICES" not in only(linux).cure
    assert only(linux).cure == "ps -fp 4711   # whose are they? stop them, or wait"
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(memory__used="70000")))
    assert only(linux).cure == "nvidia-smi   # wait until its memory is free"
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(0, memory__used="70000"), gpu(1, memory__used="40000")))
    first, second = (finding for finding in diagnose(linux, ["gpu-state"]) if finding.level != "ok")
    assert first.cure.startswith("export CUDA_VISIBLE_DEVICES=1   # the one with the most free memory")
    assert "CUDA_VISIBLE_DEVICES" not in second.cure


def test_case_9_every_idle_gpu_is_named(linux: FakeMachine) -> None:
    cards = [gpu(0, memory__used="70000"), gpu(1), gpu(2), gpu(3)]
    linux.install("/usr/bin/nvidia-smi", FakeSmi(*cards))
    cure = troubles(linux, "gpu-state")["gpu-use.busy"].cure
    assert cure.startswith("export CUDA_VISIBLE_DEVICES=1,2,3   # the idle ones")
    cards[2]["name"] = "NVIDIA A100"  # CUDA would count the H100s first
    linux.install("/usr/bin/nvidia-smi", FakeSmi(*cards))
    cure = troubles(linux, "gpu-state")["gpu-use.busy"].cure
    assert cure.startswith("export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,2,3 ")


@pytest.mark.parametrize(
    ("visible", "busy"),
    [("1", False), ("0", True), ("0,1", True), (gpu(1)["uuid"][:8], False), (gpu(0)["uuid"], True), ("MIG-x", True)],
)
def test_case_9_what_others_do_on_gpus_that_this_run_does_not_see(linux: FakeMachine, visible: str, busy: bool) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(gpu(0, memory__used="70000"), gpu(1)))
    linux.with_environment(CUDA_VISIBLE_DEVICES=visible)
    assert list(troubles(linux, "gpu-state")) == (["gpu-use.busy"] if busy else [])
