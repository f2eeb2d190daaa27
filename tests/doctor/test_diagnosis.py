"""CHECKS and SYMPTOMS: machines without troubles, docs/troubleshooting.md's error texts, robustness."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu
from worlds.sick_machines import (
    H100,
    LINUX_LIBCUDA,
    REPOSITORY,
    SMI_FAILURES,
    broken_driver,
    found,
    only,
    shadow,
    troubles,
)

from commons.doctor import CHECKS, Finding, Machine, diagnose, exit_code, explain_failure, explain_no_gpu, why_no_gpu
from commons.doctor.diagnosis import Check, run_check
from commons.doctor.machine import Disk, Distribution, Libcuda, TorchFiles, TorchImport


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


# a case of docs/troubleshooting.md -> the machine in that trouble
CASE_MACHINES: dict[int, tuple[str, Callable[[FakeMachine], FakeMachine]]] = {
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


def documented_cases() -> dict[int, tuple[list[str], set[str]]]:
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
    cases = documented_cases()
    assert set(cases) == set(CASE_MACHINES) | CASES_WITHOUT_A_TEXT
    assert {number for number, (texts, _) in cases.items() if not texts} == CASES_WITHOUT_A_TEXT
    assert all(ids for _, ids in cases.values())


CASE_TEXTS = [(number, text) for number, (texts, _) in documented_cases().items() for text in texts]

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


@pytest.mark.parametrize(("case", "text"), CASE_TEXTS + OTHER_TEXTS)
def test_a_text_leads_to_its_case(case: int, text: str, request: pytest.FixtureRequest) -> None:
    kind, breaks = CASE_MACHINES[case]
    explained = {finding.id for finding in explain_failure(text, breaks(request.getfixturevalue(kind)))}
    assert explained & documented_cases()[case][1], explained


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


def test_no_cure_has_a_size_that_was_not_worked_out() -> None:
    """A number in a cure is computed, from what the machine has and from what is set now."""
    fixed = re.compile(
        r"(?:--[a-z_-]*(?:mem|memory|size|cpus|limit|gpus|task|node)[a-z_-]*|\bmemory|\bsize|ulimit.*)[= ]\d+"
    )
    wrong = {
        f"{path.name}: {hit}"
        for path in (REPOSITORY / "commons" / "doctor").glob("*.py")
        for hit in fixed.findall(path.read_text())
    }
    assert wrong == {"host.py: --batch_size 1", "host.py: --mem=0"}, (
        "the least that there can be, and Slurm's word for all"
    )
