"""nvidia-smi's answers as records."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu
from worlds.sick_machines import H100, LINUX_LIBCUDA, found, only, troubles

from commons.doctor import smi
from commons.doctor.machine import Libcuda
from commons.doctor.processes import Completed


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


# https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/: the first branch that runs each CUDA
FIRST_BRANCHES = {
    "11.0": 450, "11.2": 460, "11.4": 470, "11.5": 495, "11.6": 510, "11.7": 515, "11.8": 520, "12.0": 525, "12.1": 530,
    "12.2": 535, "12.3": 545, "12.4": 550, "12.5": 555, "12.6": 560, "12.7": 565, "12.8": 570, "12.9": 575, "13.0": 580,
}  # fmt: skip


@pytest.mark.parametrize("cuda", FIRST_BRANCHES)
def test_both_sides_of_every_driver_branch(linux: FakeMachine, cuda: str) -> None:
    """The branch itself runs its CUDA, the one before it only that one's."""
    branch, versions = FIRST_BRANCHES[cuda], list(FIRST_BRANCHES)
    before = versions[versions.index(cuda) - 1] if cuda != versions[0] else None
    for driver_version, expected in ((f"{branch}.00", cuda), (f"{branch}.999", cuda), (f"{branch - 1}.99", before)):
        query = FakeSmi(gpu(driver_version=driver_version))
        linux.install("/usr/bin/nvidia-smi", lambda given, query=query: query(given) if given else Completed(0, ""))
        linux.forget()
        assert smi.cuda_by_nvidia_smi(linux) == (None if expected is None else tuple(map(int, expected.split("."))))
