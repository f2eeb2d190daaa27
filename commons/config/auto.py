"""Where blocks can be compiled, passes captured and chunks gathered by copies, and why not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec

from commons.config.schema import TrainConfig

# Triton compiles its launchers with a C compiler, inductor its CPU kernels with a C++ one: variable, usual names
COMPILERS = {"cuda": ("CC", ("gcc", "cc", "clang")), "cpu": ("CXX", ("g++", "clang++"))}
# The first is Gemini's warm-up and fills the libraries' caches. Few enough that the capture itself is among the
# steps that the medians leave out.
EAGER_STEPS = 1
# What torch's own wrappers send goes by NCCL, whose kernels can be captured; Gemini's passes only without them.
CAPTURED_PLANS = ("CAI_Gemini", "Pytorch_DDP", "Pytorch_ZeRO", "Pytorch_FSDP")


def compile_problem(device_type: str) -> str | None:
    """Why nothing can be compiled for "cuda" or "cpu" on this machine, and what to do; None where it can."""
    if device_type == "cuda" and find_spec("triton") is None:
        return "the package triton is missing (pip install triton)"
    variable, names = COMPILERS[device_type]
    if not any(name and shutil.which(name) for name in (os.environ.get(variable), *names)):
        return f"none of the compilers {', '.join(names)} was found (install one, or name yours in {variable})"
    return None


def is_compilable(config: TrainConfig) -> bool:
    """Whether a configuration's blocks are whole and visible, so that they can be compiled where a compiler is."""
    whole_blocks = config.model_parallel_size == 1 and config.distplan != "CAI_Hybrid"
    return whole_blocks and (config.distplan != "CAI_Gemini" or config.gemini_hooks == "block")


def chunk_problems(config: TrainConfig) -> Iterator[str]:
    """Where Gemini's chunks are not gathered by a region's hooks, or do not stay on the device, one reason each."""
    offload = config.offload_optim_frac or config.offload_param_frac
    rules = (
        (config.gemini_hooks == "operation", "under --gemini_hooks operation"),
        (config.tp_degree > 1, "under --tp_degree, whose collectives are inside of blocks"),
        (config.placement not in ("static", "cuda"), f"under --placement {config.placement}, which moves chunks"),
        (offload, "under --offload_optim_frac and --offload_param_frac, which move chunks"),
    )
    return (text for applies, text in rules if applies)


def peer_problems(config: TrainConfig, world_size: int, local_world_size: int) -> Iterator[str]:
    """Where nothing can be gathered by copies, one reason each."""
    yield from chunk_problems(config)
    if config.data_parallel_size(world_size) == 1:
        yield "on one data-parallel rank, which has everything itself"
    if world_size > local_world_size:
        yield "across machines"


def graph_problems(
    config: TrainConfig, device_type: str, world_size: int, peer_copies: bool = False
) -> tuple[str, ...]:
    """Where the passes cannot be captured, one reason each. ``peer_copies``: ranks copy from each other's memory."""
    several = config.data_parallel_size(world_size) > 1
    of_the_plan = (
        _gemini_graph_problems(config, several, peer_copies)
        if config.distplan == "CAI_Gemini"
        else ((config.compile == "off", "without --compile"),)
    )
    rules = (
        (device_type != "cuda", "on a CPU"),
        (config.distplan not in CAPTURED_PLANS, f"under {config.distplan}"),
        *of_the_plan,
        (config.precision == "fp16", "in fp16, which looks for infinities"),
        (config.grad_accum > 1, "under --grad_accum, whose passes differ"),
        (config.dropout > 0, "under --dropout"),
        (config.train_step is not None and config.train_step <= EAGER_STEPS, f"in the first {EAGER_STEPS + 1} steps"),
    )
    return tuple(text for applies, text in rules if applies)


def _gemini_graph_problems(
    config: TrainConfig, several: bool, peer_copies: bool
) -> tuple[tuple[bool | float | None, str], ...]:
    return (
        (several and not peer_copies, "on several data-parallel ranks without --peer_copies"),
        # freed beside the computing stream, which a capture does only at its end; what is replicated is never freed
        (
            several and config.max_prefetch == 0 and config.shard_param_frac != 0,
            "under --max_prefetch 0 on several ranks, which would keep all chunks gathered",
        ),
        *((True, text) for text in chunk_problems(config)),
    )
