"""The training loop: a stream of step records from a session."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from commons.data.random_tokens import DrawnAhead
from commons.distributed.device import Device
from commons.lifecycle.guard import Guard
from commons.lifecycle.outcome import Ended
from commons.model.gpt2 import attention_backend
from commons.plans.states import Progress
from commons.plans.trainable import Update
from commons.reporting.flops import (
    hardware_flops_per_token,
    mfu,
    model_flops_per_token,
    tflops_per_device,
    tokens_per_second,
)
from commons.reporting.record import StepRecord
from commons.reporting.summary import bad_streak, describe_bad_steps
from commons.training.clock import PhaseClock, StepTiming, memory_use
from commons.training.evaluation import Evaluation, evaluate, is_due
from commons.training.keeping import Keeper, NoKeeper
from commons.training.schedule import learning_rate
from commons.training.session import Session
from commons.training.tracing import TRACE_FILE, traced


def batches(session: Session, start: int = 0) -> Iterator[torch.Tensor]:
    """This rank's stream of micro-batches: equal inside a tensor- or pipeline-parallel group, different
    between data-parallel ranks. ``start``: samples that all ranks have taken before.
    """
    return session.source.batches(session.batch_place(session.device.rank), start)


def train_steps(session: Session, guard: Guard | None = None, keeper: Keeper | None = None) -> Iterator[StepRecord]:
    """Train until step ``config.train_step``, one record each (collective, the same record on every rank).

    The clock stops before a record is yielded, so what the consumer does with it costs no measured time.

    Args:
        guard: follows what this rank does; it says how the run ended if that is before the last step: at a signal
            that any rank got, or after ``--max_bad_steps``.
        keeper: says where the training goes on, and keeps what it comes to.
    """
    guard, keeper, config, bad = guard or Guard(), keeper or NoKeeper(), session.config, []
    progress = keeper.progress
    stream = DrawnAhead(batches(session, progress.samples))
    clock = PhaseClock(session.device, guard.beat)
    with attention_backend(config.attention), guard.at_work(config.train_step), _settled_heap():
        for step in range(progress.steps + 1, config.train_step + 1):
            lr = learning_rate(config, step)
            for group in session.trainable.param_groups:
                group["lr"] = lr
            session.device.reset_peak_memory()
            guard.beat("wait", step)
            # rank 0 may still be logging: without this the others would wait for it inside their clocks
            dist.barrier()
            with traced(_trace_file(session, step), session.device.type):
                clock.start()
                loss, update = _train_step(session, stream, clock, keeper)
                timing = clock.stop()
            progress = _further(progress, session, update)
            guard.beat("record")
            ranks = _gather(session, loss, timing, Told(guard.signum, keeper.trouble is not None))
            record = make_record(session, step, lr, update, progress.skipped_steps, ranks)
            if is_due(session, step):
                record = with_evaluation(record, evaluate(session, guard))
            guard.beat("log")
            yield record
            bad = bad_streak([*bad, record])
            stops = guard.stop_after(step, [int(rank.signum) for rank in ranks])
            if not stops and bad and len(bad) == config.max_bad_steps:
                guard.ended, stops = _bad_steps_ended(bad), True
            if any(rank.trouble for rank in ranks):
                break
            keeper.after_step(progress, finite=not bad, last=stops or step == config.train_step)
            if stops:
                break
        keeper.finish()


def _further(progress: Progress, session: Session, update: Update) -> Progress:
    """One step further."""
    return Progress(
        progress.steps + 1, progress.samples + session.sequences_per_step, progress.skipped_steps + update.skipped
    )


@contextmanager
def _settled_heap() -> Iterator[None]:
    """The libraries' half a million objects live on: no garbage collection inside needs to look at them again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _bad_steps_ended(bad: list[StepRecord]) -> Ended:
    cure = "lower --lr, try --clip_grad_norm 1 or --precision bf16; --max_bad_steps 0 goes on regardless"
    return Ended("bad steps", f"{describe_bad_steps(bad)} Stopped by --max_bad_steps {len(bad)}: {cure}.")


def _trace_file(session: Session, step: int) -> Path | None:
    if step != session.config.trace_step or session.device.rank != 0:
        return None
    return session.config.run_dir / TRACE_FILE


def _train_step(session: Session, stream: DrawnAhead, clock: PhaseClock, keeper: Keeper) -> tuple[torch.Tensor, Update]:
    """One optimizer step over ``grad_accum`` micro-batches; returns their mean loss on this rank, still on
    the device.
    """
    trainable, grad_accum = session.trainable, session.config.grad_accum
    total = torch.zeros((), device=session.device.torch_device)
    for index in range(grad_accum):
        with trainable.micro_batch(last=index == grad_accum - 1):
            loss = trainable.forward_backward(stream.take(), 1 / grad_accum, clock.mark)
        stream.draw()  # while the device is still at work
        if loss is not None:
            total += loss.detach()
    clock.mark("optimizer")
    keeper.before_update()
    return total, trainable.step()


class RankStep(NamedTuple):
    """What one rank saw of a step; see StepTiming and MemoryUse.

    Attributes:
        loss: this rank's mean over its micro-batches, in nats per token; 0 on a pipeline's stages without one.
        signum: of the stop signal that it has heard, 0 before.
        trouble: 1 where it could not write its part of a checkpoint.
    """

    loss: float
    signum: float
    trouble: float
    step_seconds: float
    forward_seconds: float
    backward_seconds: float
    optimizer_seconds: float
    device_allocated_mib: float
    device_reserved_mib: float
    device_peak_mib: float
    host_mib: float


class Told(NamedTuple):
    """What a rank tells the others beside the measures of a step."""

    signum: int
    trouble: bool


def _gather(session: Session, loss: torch.Tensor, timing: StepTiming, told: Told) -> list[RankStep]:
    """What every rank saw of a step, by rank (collective: one small all-gather)."""
    memory = memory_use(session.device, session.trainable.replayed_bytes, session.trainable.shared_bytes or 0)
    mine = RankStep(loss.item(), float(told.signum), float(told.trouble), **vars(timing), **vars(memory))
    return [RankStep(*row) for row in _all_gather(mine, session.device)]


def make_record(
    session: Session, step: int, lr: float, update: Update, skipped_steps: int, ranks: Sequence[RankStep]
) -> StepRecord:
    """Make one record of what the ranks saw.

    The loss is the mean over the ranks that have one, the times are those of the slowest rank, each memory
    measure that of the rank with most.

    Args:
        skipped_steps: so far, this step included.
        ranks: by rank.
    """
    device, tokens = session.device, session.tokens_per_step
    losses = {rank: seen.loss for rank, seen in enumerate(ranks) if session.has_loss(rank)}
    slowest = max(ranks, key=lambda seen: seen.step_seconds)
    seconds, pipelined = slowest.step_seconds, session.config.pp_degree > 1
    model, hardware = (
        tflops_per_device(count, tokens, seconds, device.world_size) for count in _flops_per_token(session)
    )
    return StepRecord(
        step=step,
        loss=statistics.fmean(losses.values()),
        lr=lr,
        grad_norm=update.grad_norm,
        step_seconds=seconds,
        # forward and backward of a pipeline's microbatches alternate and have no times of their own
        forward_seconds=None if pipelined else slowest.forward_seconds,
        backward_seconds=None if pipelined else slowest.backward_seconds,
        optimizer_seconds=slowest.optimizer_seconds,
        tokens_per_second=tokens_per_second(tokens, seconds),
        model_tflops_per_device=model,
        hardware_tflops_per_device=hardware,
        mfu=mfu(model, session.peak_flops),
        skipped_steps=skipped_steps,
        nonfinite_loss_ranks=[rank for rank, loss in losses.items() if not math.isfinite(loss)],
        tokens_seen=step * tokens,
        **_memory_fields(ranks),
    )


def with_evaluation(record: StepRecord, evaluation: Evaluation) -> StepRecord:
    """The record of a step after which the model was evaluated."""
    return dataclasses.replace(
        record,
        eval_loss=evaluation.loss,
        eval_perplexity=evaluation.perplexity,
        eval_seconds=evaluation.seconds,
    )


def _flops_per_token(session: Session) -> tuple[float, float]:
    """Model FLOPs and hardware FLOPs."""
    config = session.config
    model = model_flops_per_token(session.shape, config.seq_len)
    hardware = hardware_flops_per_token(
        session.shape,
        config.seq_len,
        recompute=config.activation_checkpointing,
        attention=config.attention,
        dropout=config.dropout,
    )
    return model, hardware


def _all_gather(values: Sequence[float], device: Device) -> list[list[float]]:
    """Every rank's ``values``, by rank (collective)."""
    mine = torch.tensor(values, dtype=torch.float64, device=device.torch_device)
    gathered = mine.new_empty(device.world_size * len(values))
    dist.all_gather_into_tensor(gathered, mine)
    return gathered.view(device.world_size, -1).tolist()


def _memory_fields(ranks: Sequence[RankStep]) -> dict:
    """The record's memory fields: the maximum over ranks and the rank that has it; what no device has is
    None.
    """

    def most(name: str) -> tuple[float | None, int | None]:
        value, rank = max((getattr(seen, name), rank) for rank, seen in enumerate(ranks))
        return (None, None) if math.isnan(value) else (value, rank)

    peak, peak_rank = most("device_peak_mib")
    host, host_rank = most("host_mib")
    return {
        "device_memory_allocated_mib": most("device_allocated_mib")[0],
        "device_memory_reserved_mib": most("device_reserved_mib")[0],
        "device_memory_peak_mib": peak,
        "device_memory_peak_rank": peak_rank,
        "host_memory_mib": host,
        "host_memory_peak_rank": host_rank,
    }
