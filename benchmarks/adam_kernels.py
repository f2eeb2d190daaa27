"""torch's fused Adam behind Colossal-AI's loaders against Colossal-AI's own CUDA kernel: time and memory of
the optimizer phase.

    python -m benchmarks.adam_kernels [--out FILE] [training flags]

Needs a GPU and nvcc (Colossal-AI builds its kernel, about a minute). One session is trained; the kernel is
swapped every step, so both see the same weights, gradients and machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from commons.cli.flags import read_config
from commons.config.resolved import ResolvedConfig
from commons.distributed import process_group
from commons.lifecycle import leaving
from commons.reporting.environment import describe_environment
from commons.training.clock import MIB


class Meter:
    """Wraps a kernel and notes how much memory it takes at most beyond what was there."""

    def __init__(self, kernel: Callable) -> None:
        self._kernel = kernel
        self.extra_mib: list[float] = []

    def __call__(self, *args: object) -> None:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self._kernel(*args)
        self.extra_mib.append((torch.cuda.max_memory_allocated() - before) / MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("adam_kernels.json"))
    arguments, training_flags = parser.parse_known_args()
    config = read_config(["--distplan", "CAI_Gemini", *training_flags])
    here = process_group.launch(config.device, config.timeout)

    from commons.training.loop import train_steps
    from commons.training.session import build_session

    session = build_session(config, here)
    from commons.plans.colossal.adam_kernels import CompiledAdam, fused_adam

    optimizer: Any = session.trainable.optimizer  # pyright: ignore[reportAttributeAccessIssue]
    kernels = {"torch": fused_adam, "compiled": CompiledAdam(), "colossalai": upstream_adam()}
    times: dict[str, list[float]] = {name: [] for name in kernels}
    meters = {name: Meter(kernel) for name, kernel in kernels.items()}
    steps = train_steps(session)
    for index in range(config.train_step):
        name = list(kernels)[index % len(kernels)]
        # memory in the first steps, time in the rest: the meter's synchronisation would be in the time
        measure_memory = index < config.warmup_step
        optimizer.chunk_adam.update_on_gpu = meters[name] if measure_memory else kernels[name]
        record = next(steps)
        if not measure_memory and record.optimizer_seconds is not None:
            times[name].append(record.optimizer_seconds * 1000)
    report(arguments.out, config, times, meters, describe_environment(here.name))
    leaving.teardown()


def upstream_adam() -> Callable:
    """Colossal-AI's own kernel with the signature of ours, and the copy of the weights that upstream makes after it."""
    from colossalai.kernel.extensions import FusedOptimizerCudaExtension

    kernel = FusedOptimizerCudaExtension().load().multi_tensor_adam  # pyright: ignore[reportOptionalMemberAccess]
    overflow = torch.zeros(1, dtype=torch.int, device="cuda")

    def update(slots: Any, settings: Any) -> None:
        params, grads, exp_avgs, exp_avg_sqs, weights = (list(column) for column in zip(*slots, strict=True))
        kernel(
            65536,  # elements a block of the kernel, upstream's own choice
            overflow,
            [grads, params, exp_avgs, exp_avg_sqs],
            settings.lr,
            settings.beta1,
            settings.beta2,
            settings.eps,
            settings.step,
            int(settings.decoupled_weight_decay),
            1,
            settings.weight_decay,
            settings.div_scale,
        )
        torch._foreach_copy_(weights, params)

    return update


def report(out: Path, config: ResolvedConfig, times: dict, meters: dict[str, Meter], environment: dict) -> None:
    """Write the JSON and print its heart."""
    kernels = {
        name: {
            "optimizer_ms_median": statistics.median(times[name]),
            "optimizer_ms_min": min(times[name]),
            "optimizer_ms_max": max(times[name]),
            "steps": len(times[name]),
            "extra_memory_mib": max(meters[name].extra_mib),
        }
        for name in times
    }
    upstream = kernels["colossalai"]["optimizer_ms_median"]
    ratios = {name: kernels[name]["optimizer_ms_median"] / upstream for name in ("torch", "compiled")}
    result = {"kernels": kernels, "ratios": ratios}
    print(json.dumps(result, indent=2))
    out.write_text(json.dumps({**result, "config": config.as_dict(), "environment": environment}, indent=2))


if __name__ == "__main__":
    main()
