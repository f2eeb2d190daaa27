"""Defaults for the GPU that there is: batch, recomputation and size by its memory, precision by its age.

Decided by what the GPU has in all, the same for the launcher and for every rank; what is free of it is the preflight's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from commons.config.resolved import DEVICE_DEFAULTS, ResolvedConfig
from commons.config.schema import TrainConfig
from commons.ops.capability import AMPERE
from commons.planner.gpus import GIB, GpuModel
from model_zoo import MODEL_SIZES

SMALLER = ("gpt2_medium", "gpt2_small", "gpt2_tiny")  # in place of the first, where the user gave no size
OF_SIZE = ("model_type", "num_layers", "hidden_size", "num_heads")
Fits = Callable[[Mapping[str, Any]], bool]


class Adapted(NamedTuple):
    """Settings in place of defaults that the GPU cannot take, and the line that says so; both may be empty."""

    settings: dict[str, Any]
    line: str = ""


NOTHING = Adapted({})


def adapt(given: Mapping[str, Any], world_size: int, local_world_size: int) -> Adapted:
    """What this machine's GPU asks for. ``given``: the settings that the user gave; none of them is touched."""
    from commons.planner.room import gpu_here

    gpu = gpu_here()
    older = by_age(given, gpu)
    with_age = {**given, **older.settings}

    def fits(settings: Mapping[str, Any]) -> bool:
        config = TrainConfig(**{**with_age, **settings}).resolve("cuda", world_size, local_world_size)
        return _fits(config, world_size, local_world_size, gpu)

    smaller = by_memory(with_age, gpu, fits)
    return Adapted({**older.settings, **smaller.settings}, "\n".join(filter(None, (older.line, smaller.line))))


def by_age(given: Mapping[str, Any], gpu: GpuModel) -> Adapted:
    """fp16 on GPUs without bf16, unless the user gave a precision."""
    if "precision" in given or gpu.capability >= AMPERE:
        return NOTHING
    return Adapted({"precision": "fp16"}, f"{gpu.device_name} has no bf16: training in fp16 (--precision fp16)")


def by_memory(given: Mapping[str, Any], gpu: GpuModel, fits: Fits) -> Adapted:
    """The largest batch up to the default that ``fits``, else the largest with recomputation, else of a smaller size.

    Nothing where the user gave a batch, where a pipeline asks for one, or where the default fits.
    """
    if "batch_size" in given or given.get("pp_degree", 1) > 1:
        return NOTHING
    wanted = DEVICE_DEFAULTS["cuda"]["batch_size"]
    for settings in _tries(given):
        batch = _largest(lambda size, settings=settings: fits({**settings, "batch_size": size}), wanted)
        if batch == wanted and not settings:
            return NOTHING
        if batch:
            found = {**settings, "batch_size": batch}
            words = " ".join(f"--{name} {value}" for name, value in found.items())
            return Adapted(found, f"{gpu.device_name} has {gpu.memory_bytes / GIB:.1f} GiB: taking {words}")
    return NOTHING  # the preflight says what is lacking


def _tries(given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    recompute = "activation_checkpointing"
    sizes = [{}] if any(name in given for name in OF_SIZE) else [{}, *({"model_type": name} for name in SMALLER[1:])]
    for size in sizes:
        yield size
        if recompute not in given:
            yield {**size, recompute: "on"}


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to ``most`` that fits, where each smaller one does too; 0 if none does."""
    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _fits(config: ResolvedConfig, world_size: int, local_world_size: int, gpu: GpuModel) -> bool:
    from commons.planner.memory import forecast

    if config.model_type not in MODEL_SIZES or world_size % config.model_parallel_size:
        return True  # which is refused for itself
    rest = forecast(config, world_size, local_world_size, gpu, rough=True)
    if rest.device_peak <= gpu.memory_bytes:
        return True
    if rest.device_rest > gpu.memory_bytes:
        return False
    return forecast(config, world_size, local_world_size, gpu).device_peak <= gpu.memory_bytes
