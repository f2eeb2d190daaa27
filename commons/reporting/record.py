"""StepRecord: what one optimizer step is measured by; a line of metrics.jsonl."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, measured; a line of metrics.jsonl has these keys. None stands for "not known here".

    Attributes:
        step: number of the step, from 1.
        loss: mean cross-entropy in nats per token, over micro-batches and data-parallel ranks.
        lr: learning rate that the step used.
        grad_norm: L2 norm of the whole gradient before clipping, where the plan computes it.
        step_seconds: from the step's start to the device's end of work on it; the slowest rank's.
        forward_seconds: part of it spent in forward passes.
        backward_seconds: part of it spent in backward passes, communication that overlaps them included.
        optimizer_seconds: part of it spent in clipping and the optimizer's update.
        tokens_per_second: of all devices together.
        model_tflops_per_device: model FLOPs per second and device, in 10^12; see commons.reporting.flops.
        hardware_tflops_per_device: FLOPs that really run, likewise; see there.
        mfu: model FLOPs over the device's peak, a fraction (0.5 is 50 %).
        skipped_steps: steps so far, this one included, whose update was skipped for an fp16 overflow.
        device_memory_allocated_mib: held by tensors at the step's end, MiB; the most of any rank, as below.
        device_memory_reserved_mib: held by torch's allocator at the step's end, MiB.
        device_memory_peak_mib: most that tensors held during the step, MiB.
        device_memory_peak_rank: the rank of that peak.
        host_memory_mib: resident memory of the process, MiB.
        host_memory_peak_rank: the rank that has it.
        nonfinite_loss_ranks: the ranks whose own loss is NaN or infinite.
        tokens_seen: tokens trained on so far, this step included, over all ranks.
        eval_loss: mean cross-entropy in nats per token on held-out data after this step; None but after the steps that
            ``--eval_every`` names, as the next two.
        eval_perplexity: e to the power of that.
        eval_seconds: what the evaluation took, beside the step's times.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    step_seconds: float
    forward_seconds: float | None
    backward_seconds: float | None
    optimizer_seconds: float | None
    tokens_per_second: float
    model_tflops_per_device: float
    hardware_tflops_per_device: float
    mfu: float | None
    skipped_steps: int
    device_memory_allocated_mib: float | None
    device_memory_reserved_mib: float | None
    device_memory_peak_mib: float | None
    device_memory_peak_rank: int | None
    host_memory_mib: float
    host_memory_peak_rank: int
    nonfinite_loss_ranks: list[int] = dataclasses.field(default_factory=list)
    tokens_seen: int | None = None
    eval_loss: float | None = None
    eval_perplexity: float | None = None
    eval_seconds: float | None = None
