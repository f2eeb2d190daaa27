"""--calibrate: the rates of this machine, measured: products, memory, links, and Adam on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from commons.planner.machines import Machine

MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}
LINK_BYTES = 256 << 20
ADAM_ELEMENTS = 1 << 24
REPEATS, WARM_UPS = 10, 3
MOST_SECONDS = 2.0  # of one rate: a CPU without fp16 takes seconds for a product
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FIRST_BF16 = (8, 0)


def measure(machine: Machine, on_rate: Callable[[str, float], object]) -> dict[str, Any]:
    """The rates of one device and of this host, by the names of commons.planner.rates.Rates; takes some seconds.
    Without a GPU the device is the whole host, with a thread on each core.

    What this machine does not have (a second GPU, a GPU at all) is left out.

    Args:
        on_rate: called with the name and value of each as it is known.
    """
    device = torch.device(machine.device_type)
    torch.set_num_threads(machine.cores_per_node)  # whatever OMP_NUM_THREADS says: ranks share all of them
    measured: dict[str, Any] = {"matmul_flops": {}}
    for precision, dtype in PRECISIONS.items():
        if precision == "bf16" and machine.gpu is not None and machine.gpu.capability < FIRST_BF16:
            continue
        measured["matmul_flops"][precision] = _matmul_flops(device, dtype)
        on_rate(f"matmul_flops, {precision}", measured["matmul_flops"][precision])
    others: dict[str, Callable[[], float | None]] = {
        "memory_bandwidth": lambda: _memory_bandwidth(device),
        "host_link_bandwidth": lambda: _host_link(device),
        "link_bandwidth": lambda: _link(device),
        "host_adam": _host_adam,
    }
    for name, ask in others.items():
        value = ask()
        if value is not None:
            measured[name] = value
            on_rate(name, value)
    return measured


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of REPEATS calls, each until the device is done; of fewer where they take long."""
    end = time.perf_counter() + MOST_SECONDS

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    taken = [once()]
    while len(taken) < WARM_UPS + REPEATS and time.perf_counter() < end:
        taken.append(once())
    return statistics.median(taken[WARM_UPS:] or taken[-1:])


def _matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a large square product. Random data: what is multiplied decides how much power it takes."""
    size = MATMUL_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _seconds(lambda: torch.mm(left, right), device)


def _memory_bandwidth(device: torch.device) -> float:
    """Of a copy within the device, read and written."""
    source = torch.ones(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), device)


def _host_link(device: torch.device) -> float | None:
    """Of a pinned copy to the device, the slower of both directions."""
    if device.type == "cpu":
        return None
    host = torch.ones(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    up = _seconds(lambda: there.copy_(host, non_blocking=True), device)
    down = _seconds(lambda: host.copy_(there, non_blocking=True), device)
    return LINK_BYTES / max(up, down)


def _link(device: torch.device) -> float | None:
    """Of a copy from one GPU to the next."""
    if device.type == "cpu" or torch.cuda.device_count() < 2:
        return None
    source = torch.ones(LINK_BYTES, dtype=torch.uint8, device="cuda:0")
    target = torch.empty(LINK_BYTES, dtype=torch.uint8, device="cuda:1")
    return LINK_BYTES / _seconds(lambda: target.copy_(source, non_blocking=True), device)


def _host_adam() -> float:
    """Elements per second that this process updates on the host, with all its threads."""
    weight, gradient, first, second = (torch.full((ADAM_ELEMENTS,), 1e-3) for _ in range(4))
    step = torch.tensor(1.0)

    def update() -> None:
        torch._fused_adamw_(
            [weight], [gradient], [first], [second], [], [step],
            lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    return ADAM_ELEMENTS / _seconds(update, torch.device("cpu"))
