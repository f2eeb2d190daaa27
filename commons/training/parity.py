"""``--check_parity``: a run beside a single-process fp32 training of the same model on the same data.

However a plan splits, shards, casts and overlaps, it must train the same model. So the reference shares
nothing with the plans but the initial weights, the data and the schedule: HuggingFace's model and torch's
AdamW, in fp32, on all data-parallel ranks' batches. What is compared is every step's loss and gradient norm;
a fault in either direction of a pass, in a reduction, in the optimizer or in clipping moves one of the two
within a few steps.
"""

from __future__ import annotations

import dataclasses
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
from commons.lifecycle.outcome import FINISHED, NOTHING_PROVED, Ended
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.reporting.record import StepRecord
from commons.reporting.writing import write_json
from commons.training.schedule import learning_rate
from commons.training.session import Session
from model_zoo import build_model

# Plans tell the gradient norm only where they clip; this clips nothing.
NO_CLIP = 1e30
NORM_PIECE = 1 << 22  # elements of a gradient that are fp64 at a time


@dataclass(frozen=True)
class Bound:
    """Largest relative differences from the fp32 reference that rounding explains."""

    loss: float
    grad_norm: float


@dataclass(frozen=True)
class Rounding:
    """What rounding makes of one number in one precision, by how many tokens a step predicts.

    Attributes:
        floor: however many they are.
        of_one_token: of a single one. Errors of tokens are independent: those of their mean go with 1 / sqrt(tokens).
        ceiling: however few they are.
    """

    floor: float
    of_one_token: float = 0.0
    ceiling: float = math.inf

    def bound(self, tokens: int) -> float:
        return min(self.ceiling, max(self.floor, self.of_one_token / math.sqrt(tokens)))


# (loss, gradient norm). They depend on the precision and on the tokens that a step predicts, over all accumulated
# batches and copies; not on the size of the model: largest differences seen under DDP, FSDP2, ZeRO, Hybrid and Gemini
# on a CPU, 2026-11-27, torch 2.13, gpt2_tiny (5 steps of up to 2032 tokens, 100 of up to 252), gpt2_small with 1 and
# 12 layers and gpt2_medium (3 steps of up to 252 and 31 tokens):
#
# | tokens | fp32          | fp16          | bf16          |
# |-------:|---------------|---------------|---------------|
# |      1 | 1.4e-7 4.0e-7 | 1.4e-4 9.0e-4 | 3.7e-3 1.7e-2 |
# |     15 | 2.7e-7 1.9e-7 | 5.6e-5 1.4e-3 | 5.5e-4 2.1e-2 |
# |     31 | 1.7e-7 1.1e-6 |               | 1.9e-4 4.3e-3 |
# |    252 | 2.8e-7 4.8e-7 | 5.0e-6 7.6e-4 | 7.2e-5 8.7e-3 |
# |   2032 | 2.1e-7 2.5e-8 | 1.3e-6 3.9e-4 | 5.5e-6 2.0e-3 |
#
# fp8 was measured on GPUs with 252 tokens alone (benchmarks/results), and is not made narrower for more.
ROUNDING = {
    "fp32": (Rounding(1e-6), Rounding(1e-5)),
    "fp16": (Rounding(1e-5, 1e-3), Rounding(4e-3)),
    "bf16": (Rounding(1e-4, 8e-3), Rounding(1e-2, 0.4, ceiling=5e-2)),
    "fp8": (Rounding(1e-3, 1.6e-2), Rounding(4e-2)),
}


def bound_for(precision: str, predicted_tokens: int) -> Bound:
    """The most that a run in ``precision`` may be from its reference where a step predicts so many tokens."""
    loss, norm = ROUNDING[precision]
    return Bound(loss.bound(predicted_tokens), norm.bound(predicted_tokens))


@dataclass(frozen=True)
class ReferenceStep:
    """One step of the reference: loss in nats a token, global gradient norm before clipping."""

    loss: float
    grad_norm: float


HOLDS, BROKEN, NOT_COMPARED = "holds", "BROKEN", "not compared"


@dataclass(frozen=True)
class Parity:
    """How far a run was from its reference: the largest relative difference of any step that could be compared,
    infinite where the run's number was not finite, NaN if no step could; and its bound.

    Attributes:
        not_compared: by "loss" and "gradient norm", why some step or every step was not compared; empty if all were.
    """

    precision: str
    steps: int
    loss: float
    grad_norm: float
    bound: Bound
    not_compared: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def verdicts(self) -> dict[str, str]:
        """ "holds", "BROKEN" or "not compared" of the loss and of the gradient norm. What differs is broken, whatever
        could not be compared beside it.
        """
        pairs = {"loss": (self.loss, self.bound.loss), "gradient norm": (self.grad_norm, self.bound.grad_norm)}
        return {name: self._verdict(name, *pair) for name, pair in pairs.items()}

    def _verdict(self, name: str, difference: float, bound: float) -> str:
        if difference > bound:
            return BROKEN
        return NOT_COMPARED if name in self.not_compared or math.isnan(difference) else HOLDS

    @property
    def verdict(self) -> str:
        """Of the whole: broken if a number is, else not compared if one is not."""
        found = self.verdicts.values()
        return next((verdict for verdict in (BROKEN, NOT_COMPARED) if verdict in found), HOLDS)

    @property
    def holds(self) -> bool:
        return self.verdict == HOLDS


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
            data_parallel_size=data_parallel_size,
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
        norm = _clipped_norm(model, config.clip_grad_norm or NO_CLIP)
        for group in adam.param_groups:
            group["lr"] = learning_rate(config, step)
        if step not in skipped:
            adam.step()
        adam.zero_grad()
        steps.append(ReferenceStep(loss, norm))
    return steps, model


def _clipped_norm(model: nn.Module, max_norm: float) -> float:
    """Clip the gradients in place; their L2 norm before, added up in fp64.

    Written out here, a piece at a time: what a plan is measured with may share no code with it
    (commons.ops.gradient_norm).
    """
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    pieces = (piece for gradient in gradients for piece in gradient.flatten().split(NORM_PIECE))
    norm = math.sqrt(sum(piece.double().square().sum().item() for piece in pieces))
    if norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / (norm + 1e-6))
    return norm


def compare(
    config: ResolvedConfig, records: Sequence[StepRecord], reference: Sequence[ReferenceStep], copies: int
) -> Parity:
    """Set a run's steps against the reference's.

    A step that fp16 skipped has a loss but no gradient norm, and is not compared by it. Nor is one of which the
    reference's own number is not finite.

    Args:
        config: resolved, with batch and sequence.
        copies: of the model, each with a batch of its own.
    """
    pairs = list(zip(records, reference, strict=True))
    losses = [(ran.loss, ref.loss) for ran, ref in pairs]
    norms = [(ran.grad_norm, ref.grad_norm) for ran, ref in pairs if ran.grad_norm is not None]
    reasons = {"loss": _reason(losses), "gradient norm": _reason(norms) or _no_norm(config, len(norms))}
    tokens = copies * config.batch_size * config.grad_accum * (config.seq_len - 1)
    return Parity(
        config.precision,
        len(pairs),
        _worst(losses),
        _worst(norms),
        bound_for(config.precision, tokens),
        {name: reason for name, reason in reasons.items() if reason},
    )


def _reason(values: Sequence[tuple[float, float]]) -> str:
    """Why some of these pairs of a run's number and the reference's cannot be compared; "" if all can."""
    lost = sum(not math.isfinite(reference) for _, reference in values)
    return f"the reference's own is not finite in {lost} of {len(values)} steps: lower --lr" if lost else ""


def _no_norm(config: ResolvedConfig, told: int) -> str:
    if told:
        return ""
    if config.precision == "fp16":
        return "every step was skipped for overflow: use more --train_step, or a lower --initial_loss_scale"
    return f"{config.distplan} told none"


def skipped_steps(records: Sequence[StepRecord]) -> frozenset[int]:
    """The steps that fp16 left out; a record counts them up to itself."""
    before = [0, *(record.skipped_steps for record in records)]
    return frozenset(r.step for r, earlier in zip(records, before, strict=False) if r.skipped_steps > earlier)


def check_parity(session: Session, records: Sequence[StepRecord]) -> Ended:
    """Train the reference on rank 0, print and write the comparison to parity.json (collective); the run's end: a
    failure where it is broken, and an exit code of its own where something could not be compared.
    """
    config, device = session.config, session.device
    number = torch.zeros((), dtype=torch.int32, device=device.torch_device)
    if device.rank == 0:
        copies = config.data_parallel_size(device.world_size)
        reference, _ = reference_steps(config, copies, device.torch_device, skipped_steps(records))
        parity = compare(config, records, reference, copies)
        print(describe(parity), flush=True)
        write(parity, config.run_dir)
        number.fill_(list(ENDS).index(parity.verdict))
    dist.broadcast(number, src=0)
    return list(ENDS.values())[int(number.item())]


# How a run ends by its verdict. What was not compared is neither right nor wrong, and its exit code says neither.
ENDS = {
    HOLDS: FINISHED,
    BROKEN: Ended("finished", "--check_parity: this run is not its reference, see parity.json."),
    NOT_COMPARED: Ended("finished", "--check_parity: not everything was compared, see parity.json.", NOTHING_PROVED),
}


def describe(parity: Parity) -> str:
    """For the console: both differences with their bounds, or why there is none."""
    rows = [
        ("loss", parity.loss, parity.bound.loss),
        ("gradient norm", parity.grad_norm, parity.bound.grad_norm),
    ]
    lines = [f"parity with one fp32 process over {parity.steps} steps, {parity.precision}:"]
    for name, difference, bound in rows:
        reason = parity.not_compared.get(name)
        told = f"{parity.verdicts[name]}{f' ({reason})' if reason else ''}"
        measured = f"largest relative difference {difference:.1e}, bound {bound:.1e}: "
        lines.append(f"  {name:13} {'' if math.isnan(difference) and reason else measured}{told}")
    return "\n".join(lines)


def write(parity: Parity, run_dir: Path) -> None:
    """parity.json: the differences, their bounds, the verdict, and why something was not compared."""
    verdict = {"holds": parity.holds, "verdict": parity.verdict}
    write_json(run_dir / "parity.json", {**dataclasses.asdict(parity), **verdict})


def _relative(value: float, reference: float) -> float:
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def _worst(pairs: Sequence[tuple[float, float]]) -> float:
    """The largest difference of those whose reference is finite, infinite where the run's number is NaN; NaN if there
    are none.
    """
    differences = [_relative(*pair) for pair in pairs if math.isfinite(pair[1])]
    # max() of NaN and numbers would depend on their order
    return max((math.inf if math.isnan(each) else each for each in differences), default=math.nan)
