"""Clocks, data and the host backend: against an outside clock, and where they must not be."""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from suite_runs import run_processes

from commons.data.random_tokens import random_tokens
from commons.distributed.device import Device, detect_type
from commons.distributed.process_group import free_port
from commons.training.clock import MIB, PhaseClock, measured_peak_flops, memory_use

HERE = Device("cpu", "a CPU", 0, 0, 1)


def test_phases_add_up_to_the_step() -> None:
    clock = PhaseClock(HERE)
    clock.start()
    for phase, seconds in (("forward", 0.02), ("backward", 0.04), ("forward", 0.02), ("optimizer", 0.01)):
        clock.mark(phase)
        time.sleep(seconds)
    timing = clock.stop()
    assert timing.forward_seconds >= 0.04 and timing.backward_seconds >= 0.04 and timing.optimizer_seconds >= 0.01
    phases = timing.forward_seconds + timing.backward_seconds + timing.optimizer_seconds
    assert phases <= timing.step_seconds == pytest.approx(phases, abs=0.002)


OUTSIDE_CLOCK = """
import statistics, sys, time
from commons.distributed import process_group
from commons.cli.flags import read_config
from commons.training.loop import train_steps
from commons.training.session import build_session
here = process_group.launch("cpu", 60)
flags = ["--distplan", "Pytorch_DDP", "--device", "cpu", "--model_type", "gpt2_small", "--num_layers", "2",
         "--batch_size", "2", "--seq_len", "256", "--precision", "fp32", "--train_step", "8", "--warmup_step", "1"]
steps = train_steps(build_session(read_config(flags), here))
next(steps)
shares = []
for _ in range(7):
    start = time.monotonic()
    inside = next(steps).step_seconds
    shares.append(inside / (time.monotonic() - start))
print("inside / outside:", shares)
sys.exit(not (0.99 <= statistics.median(shares) and max(shares) <= 1.0))
"""


def test_step_seconds_against_an_outside_clock() -> None:
    """Within 1 % of a clock around each step; the median, so that another process may take the core in between."""
    returncode, console = run_processes([sys.executable, "-c", OUTSIDE_CLOCK])
    assert returncode == 0, console


def test_memory_is_the_process_s() -> None:
    before = memory_use(HERE).host_mib
    ballast = torch.ones(64 * 2**20)  # 256 MiB, written
    assert memory_use(HERE).host_mib - before == pytest.approx(256, abs=16)
    del ballast


def test_measured_peak_is_plausible() -> None:
    assert 1e8 < measured_peak_flops(HERE, "fp32") < 1e14


def test_batches_differ_between_ranks_and_repeat() -> None:
    def first(seed: int, rank: int) -> torch.Tensor:
        stream = random_tokens(
            batch_size=4,
            seq_len=8,
            vocab=1000,
            seed=seed,
            data_parallel_rank=rank,
            data_parallel_size=2,
            device=torch.device("cpu"),
        )
        return next(stream)

    assert torch.equal(first(1, 0), first(1, 0))
    assert not torch.equal(first(1, 0), first(1, 1))
    assert not torch.equal(first(1, 1), first(2, 0)), "neighbouring seeds share no samples"
    assert first(1, 0).max() < 1000 and first(1, 0).dtype == torch.int64


def test_choosing_a_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert detect_type("cpu") == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


JOINED = """
import os
from commons.distributed import process_group
here = process_group.launch("cpu", 60)
print(here.type, here.rank, here.world_size, repr(os.environ["CUDA_VISIBLE_DEVICES"]))
"""


def test_a_rank_on_a_cpu_hides_the_gpus_where_it_joins() -> None:
    returncode, console = run_processes([sys.executable, "-c", JOINED], environment={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert returncode == 0 and console.splitlines()[-1] == "cpu 0 1 ''", console


def test_host_backend_refuses_to_hide_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from commons.plans.colossal.runtime import prepare

    prepare("cpu")
    from commons.plans.colossal import host_backend

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True))
    with pytest.raises(RuntimeError, match="torch sees a CUDA device"):
        host_backend.install()


def test_free_ports_are_free() -> None:
    assert len({free_port() for _ in range(5)}) > 1


def test_the_peak_of_memory_counts_what_a_replayed_pass_uses(monkeypatch) -> None:
    """On top of what is allocated, where that is more than the allocator has seen in the step."""
    seen = {"memory_allocated": 10, "memory_reserved": 30, "max_memory_allocated": 12}
    for name, mib in seen.items():
        monkeypatch.setattr(f"torch.cuda.{name}", lambda mib=mib: mib * MIB)
    gpu = Device("cuda", "a GPU", 0, 0, 1)
    peaks = [memory_use(gpu, replayed * MIB).device_peak_mib for replayed in (0, 1, 5)]
    assert peaks == [12, 12, 15]
