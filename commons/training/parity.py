"""``--check_parity``: a run beside a single-process fp32 training of the same model on the same data.

However a plan splits, shards, casts and overlaps, it must train the same model. So the reference shares
nothing with the plans but the initial weights, the data and the schedule: HuggingFace's model and torch's
AdamW, in fp32, on all data-parallel ranks' batches. What is compared is every step's loss and gradient norm;
a fault in either direction of a pass, in a reduction, in the optimizer or in clipping moves one of the two
within a few steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from commons.config.resolved import ResolvedConfig
from commons.data.random_tokens import random_tokens
from commons.distributed.device import compute_dtype
from commons.lifecycle.outcome import FINISHED, Ended
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.reporting.record import StepRecord
from commons.training.loop import Session, learning_rate
from model_zoo import build_model

# Plans tell the gradient norm only where they clip; this clips nothing.
NO_CLIP = 1e30


@dataclass(frozen=True)
class Bound:
    """Largest relative differences from the fp32 reference that rounding explains."""

    loss: float
    grad_norm: float


# Measured with gpt2_tiny over every plan and layout (tests/test_splitting.py), then about four times that. Of
# the faults listed in commons/colossal the smallest moved a norm by 1e-2, and in fp32 that is 1000 times the
# bound.
BOUNDS = {
    "fp32": Bound(loss=1e-6, grad_norm=1e-5),
    "fp16": Bound(loss=1e-4, grad_norm=4e-3),
    "bf16": Bound(loss=5e-4, grad_norm=1e-2),
    "fp8": Bound(loss=1e-3, grad_norm=4e-2),
}


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the reference: loss in nats a token, global gradient norm before clipping."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Parity:
    """How far a run was from its reference: the largest relative difference of any step, and its bound."""

    precision: str
    steps: int
    loss: float
    grad_norm: float
    bound: Bound

    @property
    def holds(self) -> bool:
        """NaN holds nothing."""
        return self.loss <= self.bound.loss and self.grad_norm <= self.bound.grad_norm


def with_known_norms(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration to train with under ``--check_parity``: every plan tells its gradient norm."""
    return config if config.clip_grad_norm > 0 else dataclasses.replace(config, clip_grad_norm=NO_CLIP)


def reference_steps(
    config: ResolvedConfig, data_parallel_size: int, device: torch.device, skipped: frozenset[int] = frozenset()
) -> tuple[list[ReferenceStep], nn.Module]:
    """Train ``config`` in this process alone, in fp32.

    Args:
        data_parallel_size: how many ranks' batches make a step.
        skipped: steps (from 1) whose update is left out, as fp16 does when its gradients overflow.

    Returns:
        Every step's loss and gradient norm, and the trained model.
    """
    with device:
        model = build_model(config.shape())
    rounded_to = compute_dtype(config.base_precision)
    seeded_init_(model, config.seed, device, rounded_to)
    adam = torch.optim.AdamW(
        decay_groups(model, config.weight_decay), betas=(config.beta1, config.beta2), eps=config.adam_eps
    )
    streams = [
        random_tokens(
            batch_size=config.batch_size,
            seq_len=config.seq_len,
            vocab=config.shape().vocab,
            seed=config.seed,
            data_parallel_rank=rank,
            device=device,
        )
        for rank in range(data_parallel_size)
    ]
    parts = config.grad_accum * data_parallel_size
    steps = []
    for step in range(1, config.train_step + 1):
        loss = 0.0
        for _ in range(config.grad_accum):
            for stream in streams:
                tokens = next(stream)
                part = model(input_ids=tokens, labels=tokens).loss / parts
                part.backward()
                loss += part.item()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad_norm or NO_CLIP).item()
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, step)
        if step not in skipped:
            adam.step()
        adam.zero_grad()
        steps.append(ReferenceStep(loss, norm))
    return steps, model


def compare(config: ResolvedConfig, records: Sequence[StepRecord], reference: Sequence[ReferenceStep]) -> Parity:
    """Set a run's steps against the reference's. A step that fp16 skipped has a loss but no gradient norm."""
    losses = [_relative(ran.loss, ref.loss) for ran, ref in zip(records, reference, strict=True)]
    norms = [
        _relative(ran.grad_norm, ref.grad_norm)
        for ran, ref in zip(records, reference, strict=True)
        if ran.grad_norm is not None
    ]
    worst_norm = _worst(norms) if norms else math.nan
    return Parity(config.precision, len(losses), _worst(losses), worst_norm, BOUNDS[config.precision])


def skipped_steps(records: Sequence[StepRecord]) -> frozenset[int]:
    """The steps that fp16 left out; a record counts them up to itself."""
    before = [0, *(record.skipped_steps for record in records)]
    return frozenset(r.step for r, earlier in zip(records, before, strict=False) if r.skipped_steps > earlier)


def check_parity(session: Session, records: Sequence[StepRecord]) -> Ended:
    """Train the reference on rank 0, print and write the comparison to parity.json (collective); the run's end,
    a failure where it does not hold.
    """
    config, device = session.config, session.device
    holds = torch.zeros((), dtype=torch.int32, device=device.torch_device)
    if device.rank == 0:
        ranks = config.data_parallel_size(device.world_size)
        reference, _ = reference_steps(config, ranks, device.torch_device, skipped_steps(records))
        parity = compare(config, records, reference)
        print(describe(parity), flush=True)
        write(parity, config.run_dir)
        holds.fill_(int(parity.holds))
    dist.broadcast(holds, src=0)
    if holds.item():
        return FINISHED
    return Ended("finished", "--check_parity: this run is not its reference, see parity.json.")


def describe(parity: Parity) -> str:
    """For the console: both differences with their bounds."""
    rows = [
        ("loss", parity.loss, parity.bound.loss),
        ("gradient norm", parity.grad_norm, parity.bound.grad_norm),
    ]
    lines = [f"parity with one fp32 process over {parity.steps} steps, {parity.precision}:"]
    for name, difference, bound in rows:
        verdict = "holds" if difference <= bound else "BROKEN"
        lines.append(f"  {name:13} largest relative difference {difference:.1e}, bound {bound:.0e}: {verdict}")
    return "\n".join(lines)


def write(parity: Parity, run_dir: Path) -> None:
    """parity.json: the differences, their bounds and the verdict."""
    content = {**dataclasses.asdict(parity), "holds": parity.holds}
    unknown = {name: None for name, value in content.items() if isinstance(value, float) and math.isnan(value)}
    (run_dir / "parity.json").write_text(json.dumps(content | unknown, indent=2) + "\n")


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


def _worst(differences: Sequence[float]) -> float:
    """The largest; NaN if any is, which ``max`` would depend on the order for."""
    return math.nan if any(map(math.isnan, differences)) else max(differences)
