"""From a configuration to a stream of step records: build a session, then step through it."""

from __future__ import annotations

import dataclasses
import gc
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from commons.config.auto import EAGER_STEPS
from commons.config.resolved import ResolvedConfig
from commons.data.random_tokens import DrawnAhead, random_tokens
from commons.distributed.device import Device, PhaseClock, StepTiming, measured_peak_flops, memory_use
from commons.distributed.layout import Place, place
from commons.lifecycle.guard import Guard
from commons.lifecycle.job import read_job
from commons.lifecycle.outcome import Ended
from commons.model.gpt2 import attention_backend
from commons.plans.registry import PLANS, Plan
from commons.plans.trainable import PipelinedTrainable, Trainable, Update
from commons.reporting import record as metrics
from commons.training.tracing import TRACE_FILE, traced
from model_zoo import ModelShape, padded_parameter_count, parameter_count


@dataclass(frozen=True)
class Session:
    """A model ready to train, and what the loop and the sinks must know about it.

    Attributes:
        peak_flops: of this device and precision, FLOP/s, from the datasheet or measured; None if unknown.
    """

    config: ResolvedConfig
    device: Device
    plan: Plan
    shape: ModelShape
    trainable: Trainable | PipelinedTrainable
    peak_flops: float | None

    def place(self, rank: int) -> Place:
        """Which copy, pipeline stage and part of every matrix ``rank`` has."""
        return place(rank, tp_degree=self.config.tp_degree, pp_degree=self.config.pp_degree)

    def has_loss(self, rank: int) -> bool:
        """Only the last stage of a pipeline does."""
        return self.place(rank).pipeline == self.config.pp_degree - 1

    @property
    def sequences_per_step(self) -> int:
        """Over all data-parallel ranks and micro-batches."""
        config = self.config
        return config.batch_size * config.grad_accum * config.data_parallel_size(self.device.world_size)

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.config.seq_len

    def settled_config(self, steps_done: int) -> ResolvedConfig:
        """The settings as they turned out so far: whether ranks copy from each other's memory is known once the model
        is built, whether its passes are captured after the step that does so.
        """
        copies = self.trainable.shared_bytes is not None
        captures = self.config.captures_graphs(self.device.world_size, copies)
        if steps_done > EAGER_STEPS:
            captures = captures and self.trainable.replayed_bytes > 0
        turned_out = {"peer_copies": copies, "cuda_graph": captures}
        return dataclasses.replace(
            self.config, **{name: "on" if value else "off" for name, value in turned_out.items()}
        )

    def header(self) -> dict:
        """What a reader of the log must know, for the sinks."""
        config, world_size, job = self.settled_config(0), self.device.world_size, read_job()
        return {
            "model": config.model_type,
            **{name: getattr(self.shape, name) for name in ("layers", "hidden", "heads")},
            "parameters": parameter_count(self.shape),
            "padded_parameters": padded_parameter_count(self.shape),
            "plan": self.plan.name,
            "placement": config.placement if self.plan.placement else None,
            "dp": config.data_parallel_size(world_size),
            "tp": config.tp_degree,
            "pp": config.pp_degree,
            "world_size": world_size,
            "places": _place_lines(self) if config.model_parallel_size > 1 else [],
            "notes": [f"attempt {job.attempt} of {job.attempts_allowed}"] if job.attempt > 1 else [],
            "micro_batch_size": config.batch_size,
            "grad_accum": config.grad_accum,
            "global_batch_size": self.sequences_per_step,
            "seq_len": config.seq_len,
            "precision": config.precision,
            "attention": config.attention,
            "activation_checkpointing": config.activation_checkpointing,
            "cuda_graph": config.cuda_graph == "on",
            "peer_copies": config.peer_copies == "on",
            "device": self.device.type,
            "device_name": self.device.name,
            "peak_tflops_per_device": None if self.peak_flops is None else self.peak_flops / 1e12,
        }


def _place_lines(session: Session) -> list[str]:
    places = [session.place(rank) for rank in range(session.device.world_size)]
    return [f"rank {r}: dp {at.data}, tp {at.tensor}, pp {at.pipeline}" for r, at in enumerate(places)]


def build_session(config: ResolvedConfig, device: Device) -> Session:
    """Build and wrap the model (collective). ``config`` is resolved and checked."""
    plan = PLANS[config.distplan]
    trainable = plan.build(config, device)
    if config.measure_peak:
        peak = measured_peak_flops(device, config.base_precision)
    else:
        peak = metrics.peak_flops(device.name, config.precision)
    return Session(config, device, plan, config.shape(), trainable, peak)


def batches(session: Session) -> Iterator[torch.Tensor]:
    """This rank's stream of micro-batches: equal inside a tensor- or pipeline-parallel group, different
    between data-parallel ranks.
    """
    config = session.config
    return random_tokens(
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        vocab=session.shape.vocab,
        seed=config.seed,
        data_parallel_rank=session.place(session.device.rank).data,
        device=session.device.torch_device,
    )


def learning_rate(config: ResolvedConfig, step: int) -> float:
    """The learning rate of ``step`` (from 1): a linear warm-up over ``lr_warmup_step``, then constant or a
    cosine down to a tenth.
    """
    if step <= config.lr_warmup_step:
        return config.lr * step / config.lr_warmup_step
    if config.lr_schedule == "constant":
        return config.lr
    progress = (step - config.lr_warmup_step) / max(1, config.train_step - config.lr_warmup_step)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def train_steps(session: Session, guard: Guard | None = None) -> Iterator[metrics.StepRecord]:
    """Train ``config.train_step`` steps, one record each (collective, the same record on every rank).

    The clock stops before a record is yielded, so what the consumer does with it costs no measured time.

    Args:
        guard: told what this rank does; it says how the run ended if that is before the last step: at a signal
            that any rank got, or after ``--max_bad_steps``.
    """
    guard, config, bad = guard or Guard(), session.config, []
    stream, skipped_steps = DrawnAhead(batches(session)), 0
    clock = PhaseClock(session.device, guard.beat)
    with attention_backend(config.attention), guard.at_work(config.train_step), _settled_heap():
        for step in range(1, config.train_step + 1):
            lr = learning_rate(config, step)
            for group in session.trainable.param_groups:
                group["lr"] = lr
            session.device.reset_peak_memory()
            guard.beat("wait", step)
            # rank 0 may still be logging: without this the others would wait for it inside their clocks
            dist.barrier()
            with traced(_trace_file(session, step), session.device.type):
                clock.start()
                loss, update = _train_step(session, stream, clock)
                timing = clock.stop()
            skipped_steps += update.skipped
            guard.beat("record")
            ranks = _gather(session, loss, timing, guard.signum)
            record = _record(session, step, lr, update, skipped_steps, ranks)
            guard.beat("log")
            yield record
            bad = metrics.bad_streak([*bad, record])
            if guard.stop_after(step, [int(rank["signum"]) for rank in ranks]):
                return
            if bad and len(bad) == config.max_bad_steps:
                guard.ended = _bad_steps_ended(bad)
                return


@contextmanager
def _settled_heap() -> Iterator[None]:
    """The libraries' half a million objects live on: no garbage collection inside needs to look at them again."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _bad_steps_ended(bad: list[metrics.StepRecord]) -> Ended:
    cure = "lower --lr, try --clip_grad_norm 1 or --precision bf16; --max_bad_steps 0 goes on regardless"
    return Ended("bad steps", f"{metrics.describe_bad_steps(bad)} Stopped by --max_bad_steps {len(bad)}: {cure}.")


def _trace_file(session: Session, step: int) -> Path | None:
    if step != session.config.trace_step or session.device.rank != 0:
        return None
    return session.config.run_dir / TRACE_FILE


def _train_step(session: Session, stream: DrawnAhead, clock: PhaseClock) -> tuple[torch.Tensor, Update]:
    """One optimizer step over ``grad_accum`` micro-batches; returns their mean loss on this rank, still on
    the device.
    """
    trainable, grad_accum = session.trainable, session.config.grad_accum
    total = torch.zeros((), device=session.device.torch_device)
    for index in range(grad_accum):
        with trainable.micro_batch(last=index == grad_accum - 1):
            clock.mark("forward")
            if isinstance(trainable, PipelinedTrainable):
                loss = trainable.forward_backward(stream.take(), 1 / grad_accum)
            else:
                loss = trainable.forward(stream.take()) / grad_accum
                clock.mark("backward")
                trainable.backward(loss)
        stream.draw()  # while the device is still at work
        if loss is not None:
            total += loss.detach()
    clock.mark("optimizer")
    return total, trainable.step()


def _gather(session: Session, loss: torch.Tensor, timing: StepTiming, signum: int) -> list[dict[str, float]]:
    """What every rank saw of a step, by rank (collective: one small all-gather)."""
    seen = {
        "loss": loss.item(),
        "signum": float(signum),
        **vars(timing),
        **vars(memory_use(session.device, session.trainable.replayed_bytes, session.trainable.shared_bytes or 0)),
    }
    rows = _all_gather(list(seen.values()), session.device)
    return [dict(zip(seen, row, strict=True)) for row in rows]


def _record(
    session: Session,
    step: int,
    lr: float,
    update: Update,
    skipped_steps: int,
    ranks: list[dict[str, float]],
) -> metrics.StepRecord:
    """Make one record of what the ranks saw.

    The loss is the mean over the ranks that have one, the times are those of the slowest rank, each memory
    measure that of the rank with most.
    """
    device = session.device
    losses = {rank: seen["loss"] for rank, seen in enumerate(ranks) if session.has_loss(rank)}
    slowest = max(ranks, key=lambda rank: rank["step_seconds"])
    step_seconds, pipelined = slowest["step_seconds"], session.config.pp_degree > 1
    flops = _flops_per_token(session)
    model_tflops, hardware_tflops = (
        metrics.tflops_per_device(count, session.tokens_per_step, step_seconds, device.world_size) for count in flops
    )
    return metrics.StepRecord(
        step=step,
        loss=statistics.fmean(losses.values()),
        lr=lr,
        grad_norm=update.grad_norm,
        step_seconds=step_seconds,
        # the passes of a pipeline's microbatches alternate and have no times of their own
        forward_seconds=None if pipelined else slowest["forward_seconds"],
        backward_seconds=None if pipelined else slowest["backward_seconds"],
        optimizer_seconds=slowest["optimizer_seconds"],
        tokens_per_second=metrics.tokens_per_second(session.tokens_per_step, step_seconds),
        model_tflops_per_device=model_tflops,
        hardware_tflops_per_device=hardware_tflops,
        mfu=metrics.mfu(model_tflops, session.peak_flops),
        skipped_steps=skipped_steps,
        nonfinite_loss_ranks=[rank for rank, loss in losses.items() if not math.isfinite(loss)],
        **_memory_fields(ranks),
    )


def _flops_per_token(session: Session) -> tuple[float, float]:
    config = session.config
    model = metrics.model_flops_per_token(session.shape, config.seq_len)
    hardware = metrics.hardware_flops_per_token(
        session.shape,
        config.seq_len,
        recompute=config.activation_checkpointing,
        attention=config.attention,
        dropout=config.dropout,
    )
    return model, hardware


def _all_gather(values: list[float], device: Device) -> list[list[float]]:
    """Every rank's ``values``, by rank (collective)."""
    mine = torch.tensor(values, dtype=torch.float64, device=device.torch_device)
    gathered = mine.new_empty(device.world_size * len(values))
    dist.all_gather_into_tensor(gathered, mine)
    return gathered.view(device.world_size, -1).tolist()


def _memory_fields(ranks: list[dict[str, float]]) -> dict:
    """The record's memory fields: the maximum over ranks and the rank that has it; what no device has is
    None.
    """

    def most(name: str) -> tuple[float | None, int | None]:
        value, rank = max((seen[name], rank) for rank, seen in enumerate(ranks))
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
