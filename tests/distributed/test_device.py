"""Clocks, data and the host backend: against an outside clock, and where they must not be."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from suite_runs import run_processes

from commons.data.random_tokens import random_tokens
from commons.distributed.device import Device, detect_type
from commons.distributed.process_group import free_port
from commons.training.clock import MIB, PhaseClock, StepTiming, measured_peak_flops, memory_use

HERE = Device("cpu", "a CPU", 0, 0, 1)


def test_phases_add_up_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own, read once at the start, at each mark, and at the end for phases and step."""
    times = iter([1.0, 1.5, 2.5, 6.5, 7.0, 7.25, 7.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = PhaseClock(HERE)
    clock.start()
    for phase in ("forward", "backward", "forward", "optimizer"):
        clock.mark(phase)
    assert clock.stop() == StepTiming(6.5, 1.0 + 0.5, 4.0, 0.25)
    assert next(times, None) is None


def test_a_step_forgets_the_marks_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", iter(range(100)).__next__)
    monkeypatch.setattr(PhaseClock, "_elapsed_seconds", staticmethod(lambda begin, end: float(end - begin)))
    clock = PhaseClock(HERE)
    timings = []
    for _ in range(2):
        clock.start()
        clock.mark("forward")
        timings.append(clock.stop())
    assert timings[0] == timings[1] == StepTiming(3, 1.0, 0.0, 0.0)


def test_a_phase_begins_at_the_event_that_a_captured_graph_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the host launched the graph: the forward pass lasts until the event, the backward pass from there."""
    times = iter([10.0, 10.5, 14.0, 14.5, 15.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    told: list[str] = []
    clock = PhaseClock(HERE, told.append)
    clock.start()
    clock.mark("forward")
    clock.mark("backward", at=cast("Any", 12.0))
    clock.mark("optimizer")
    assert clock.stop() == StepTiming(5.0, 1.5, 2.0, 0.5)
    assert told == ["forward", "backward", "optimizer"]


class Event:
    """A CUDA event whose time is known; milliseconds, as torch has them."""

    def __init__(self, milliseconds: float) -> None:
        self.milliseconds = milliseconds

    def elapsed_time(self, end: Event) -> float:
        return end.milliseconds - self.milliseconds


def test_events_of_the_device_are_in_milliseconds() -> None:
    assert PhaseClock._elapsed_seconds(Event(250), Event(1750)) == 1.5


OUTSIDE_CLOCK = """
import json, statistics, time
import torch.distributed as dist
from commons.distributed import process_group
from commons.cli.flags import read_config
from commons.training.clock import PhaseClock
from commons.training.loop import train_steps
from commons.training.session import build_session
here = process_group.launch("cpu", 60)
flags = ["--distplan", "Pytorch_DDP", "--device", "cpu", "--model_type", "gpt2_small", "--num_layers", "2",
         "--batch_size", "2", "--seq_len", "256", "--precision", "fp32", "--train_step", "8", "--warmup_step", "1"]
session = build_session(read_config(flags), here)
steps = train_steps(session)
next(steps)
shares = []
for _ in range(6):
    start = time.monotonic()
    inside = next(steps).step_seconds
    shares.append(inside / (time.monotonic() - start))
events = []
def noted(owner, name):
    function = getattr(owner, name)
    def call(*arguments):
        events.append(name)
        return function(*arguments)
    setattr(owner, name, call)
noted(dist, "barrier")
for name in ("start", "stop"):
    noted(PhaseClock, name)
for name in ("forward_backward", "step"):
    noted(session.trainable, name)
next(steps)
print("SEEN", json.dumps([statistics.median(shares), max(shares), events]), flush=True)
"""


def test_step_seconds_against_an_outside_clock() -> None:
    """All of a step's work is inside, the wait for other ranks outside, and a clock around both sees little more: by
    the median, so that another process may take the core in between.
    """
    returncode, console = run_processes([sys.executable, "-c", OUTSIDE_CLOCK])
    assert returncode == 0, console
    median, most, events = json.loads(console.partition("SEEN ")[2])
    assert events == ["barrier", "start", "forward_backward", "step", "stop"]
    assert median >= 0.8 and most <= 1.0


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
