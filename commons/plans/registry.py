"""The plans: each a name, what it can do, and how it wraps model and optimizer. Adding a plan is one function
and one entry in PLANS.

This module is light to import (the configuration's checks read the table); torch and Colossal-AI are imported
when a plan is built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commons.config.resolved import ResolvedConfig
    from commons.distributed.device import Device
    from commons.plans.trainable import Trainable

ALL_PRECISIONS = ("bf16", "fp16", "fp32", "fp8")
MODEL_STATES: tuple[str, ...] = ("parameters", "gradients", "optimizer states")


@dataclass(frozen=True)
class Plan:
    """How a model is spread over devices.

    Attributes:
        name: as given to ``--distplan``.
        summary: one line for ``--help`` and the README.
        build: wraps model and optimizer (collective).
        sharded: which of MODEL_STATES are sharded over the data-parallel ranks by default. Each of these ranks holds
            the whole of the others.
        precisions: what ``--precision`` may be.
        placement: takes ``--placement`` and its fractions.
        tensor_parallel, pipeline: takes ``--tp_degree``, ``--pp_degree`` above 1.
        sequence_parallel: takes ``--sequence_parallel`` beside tensor parallelism.
        cpu_torch: the oldest torch that it runs with on a CPU, where that is newer than the suite's.
    """

    name: str
    summary: str
    build: Callable[[ResolvedConfig, Device], Trainable]
    sharded: tuple[str, ...]
    precisions: tuple[str, ...] = ALL_PRECISIONS
    placement: bool = False
    tensor_parallel: bool = False
    sequence_parallel: bool = False
    pipeline: bool = False
    cpu_torch: str | None = None


def _gemini(config: ResolvedConfig, device: Device) -> Trainable:
    from commons.plans.colossal.boosted import build_gemini

    return build_gemini(config, device)


def _zero(stage: int) -> Callable[[ResolvedConfig, Device], Trainable]:
    def build(config: ResolvedConfig, device: Device) -> Trainable:
        from commons.plans.colossal.boosted import build_zero

        return build_zero(config, device, stage)

    return build


def _hybrid(config: ResolvedConfig, device: Device) -> Trainable:
    from commons.plans.colossal.hybrid import build_hybrid

    return build_hybrid(config, device)


def _torch(kind: str) -> Callable[[ResolvedConfig, Device], Trainable]:
    def build(config: ResolvedConfig, device: Device) -> Trainable:
        from commons.plans import torch_native

        return torch_native.build(kind, config, device)

    return build


PLANS: dict[str, Plan] = {
    plan.name: plan
    for plan in (
        Plan(
            "CAI_Gemini",
            "Colossal-AI Gemini: parameters, gradients and optimizer states in sharded chunks, on device or host",
            _gemini,
            MODEL_STATES,
            precisions=("bf16", "fp16", "fp8"),
            placement=True,
            tensor_parallel=True,
        ),
        Plan(
            "CAI_Hybrid",
            "Colossal-AI tensor and pipeline parallelism, with ZeRO 0, 1 or 2 over the data-parallel ranks",
            _hybrid,
            ("optimizer states",),
            precisions=("bf16", "fp16", "fp32"),
            tensor_parallel=True,
            sequence_parallel=True,
            pipeline=True,
        ),
        Plan("CAI_ZeRO1", "Colossal-AI ZeRO-1: optimizer states sharded", _zero(1), ("optimizer states",)),
        Plan(
            "CAI_ZeRO2",
            "Colossal-AI ZeRO-2: optimizer states and gradients sharded",
            _zero(2),
            ("gradients", "optimizer states"),
        ),
        Plan("Pytorch_DDP", "torch DistributedDataParallel: everything replicated", _torch("ddp"), ()),
        Plan(
            "Pytorch_ZeRO",
            "torch DDP with ZeroRedundancyOptimizer: optimizer states sharded",
            _torch("zero"),
            ("optimizer states",),
        ),
        Plan(
            "Pytorch_FSDP",
            "torch FSDP2 (fully_shard): parameters, gradients and optimizer states sharded (ZeRO-3)",
            _torch("fsdp"),
            MODEL_STATES,
            cpu_torch="2.6.0",
        ),
    )
}
