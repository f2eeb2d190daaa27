"""The check of CUDA_VISIBLE_DEVICES: README's case 4."""

from __future__ import annotations

from dataclasses import replace

import pytest
from worlds.fake_machine import FakeMachine, FakeSmi, gpu
from worlds.sick_machines import H100, LINUX_LIBCUDA, found, only, troubles

from commons.doctor import why_no_gpu
from commons.doctor.machine import Libcuda


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
    ("wanted", "gpus", "asked"), [("", 2, 1), ("2", 4, 2), ("8", 4, 4), ("many", 2, 1), ("0", 2, 1)]
)
def test_case_4_slurm_is_asked_for_no_more_gpus_than_there_are(
    linux: FakeMachine, wanted: str, gpus: int, asked: int
) -> None:
    linux.install("/usr/bin/nvidia-smi", FakeSmi(*(gpu(i) for i in range(gpus))))
    linux.with_environment(CUDA_VISIBLE_DEVICES="", SLURM_JOB_ID="7", GPUNUM=wanted)
    assert troubles(linux)["visible-devices.hidden"].cure.startswith(f"salloc --gpus-per-node={asked} ")
