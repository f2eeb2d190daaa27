"""What a step is measured by: its record, FLOPs, rates, utilisation, and a run's summary. Pure functions.

**Model FLOPs** are what the model needs, whatever the implementation does: 6N + 12·L·h·S a token for a
forward and a backward pass, with N parameters, L layers, hidden size h and sequence length S (Kaplan et al.
2020, section 2.1; Chowdhery et al. 2022, "PaLM", appendix B). N leaves out position embeddings, which are
only looked up, and the vocabulary's padding rows, which no model needs; it takes the token embedding once,
for the matmul of the tied head. 6N counts biases and layer norms as if they were matmuls: 1.3 % of N on
gpt2_tiny, 0.1 % and less from gpt2_small on.

**Hardware FLOPs** are the matmuls that really run: see :func:`hardware_flops_per_token`.

Both count 2·m·n·k for a matmul, and causal attention as if no position were masked, as the sources above do:
what a kernel skips of the upper triangle is not taken off.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from model_zoo import flops_parameter_count

if TYPE_CHECKING:
    from model_zoo import ModelShape

TERA = 1e12
FUSED_ATTENTIONS = ("sdpa", "flash")


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, measured; a line of metrics.jsonl has these keys. None stands for "not known here".

    Attributes:
        step: number of the step, from 1.
        loss: mean cross-entropy in nats a token, over micro-batches and data-parallel ranks.
        lr: learning rate that the step used.
        grad_norm: L2 norm of the whole gradient before clipping, where the plan computes it.
        step_seconds: from the step's start to the device's end of work on it; the slowest rank's.
        forward_seconds: part of it spent in forward passes.
        backward_seconds: part of it spent in backward passes, communication that overlaps them included.
        optimizer_seconds: part of it spent in clipping and the optimizer's update.
        tokens_per_second: of all devices together.
        model_tflops_per_device: model FLOPs a second and device, in 10^12; see :func:`model_flops_per_token`.
        hardware_tflops_per_device: FLOPs that really run, likewise; see :func:`hardware_flops_per_token`.
        mfu: model FLOPs over the device's peak, a fraction (0.5 is 50 %).
        skipped_steps: steps so far, this one included, whose update was skipped for an fp16 overflow.
        device_memory_allocated_mib: held by tensors at the step's end, MiB; the most of any rank, as below.
        device_memory_reserved_mib: held by torch's allocator at the step's end, MiB.
        device_memory_peak_mib: most that tensors held during the step, MiB.
        device_memory_peak_rank: the rank of that peak.
        host_memory_mib: resident memory of the process, MiB.
        host_memory_peak_rank: the rank that has it.
        nonfinite_loss_ranks: the ranks whose own loss is NaN or infinite.
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

    def to_dict(self) -> dict[str, Any]:
        """The record by its field names, ready for JSON: NaN and infinities, unknown there, become None."""
        return {name: _finite_or_none(value) for name, value in dataclasses.asdict(self).items()}


# --- FLOPs --------------------------------------------------------------------------------------------------


def model_flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """FLOPs a token that training needs, forward and backward: 6N + 12·L·h·S; sources in the module."""
    return 6.0 * flops_parameter_count(shape) + 12.0 * shape.layers * shape.hidden * seq_len


def hardware_flops_per_token(
    shape: ModelShape, seq_len: int, *, recompute: str, attention: str, dropout: float = 0.0
) -> float:
    """FLOPs a token of the matmuls that really run, forward and backward.

    Its terms, h being the hidden size and S the sequence length:

    - blocks: 24·h² a layer forward (12·h² weights), twice that backward;
    - head: 2·h·(padded vocabulary) forward, twice that backward: padding columns are computed in vain;
    - attention: scores and weighted values, 4·h·S a layer forward. Backward "eager" does four matmuls of that
      kind (8·h·S), a fused kernel ("sdpa", "flash") does five (10·h·S), since it computes the scores again.
      On a CPU "sdpa" with dropout is not fused, and this is 2·h·S too much there;
    - recompute: with activation checkpointing "on" each layer's forward once more. torch's non-reentrant
      checkpoint stops as soon as it has back every tensor that the backward pass needs, which without dropout
      is before the last matmul of the feed-forward layer (8·h²); with dropout that one runs too, for the
      tensor saved after it. "selective" repeats none of these, but "eager" attention's two.

    Biases, norms, softmax, activations and the optimizer are no matmuls and not counted, so that "eager"
    without recompute can come out up to 1 % below the model FLOPs, which do count biases and norms.

    Args:
        recompute: activation checkpointing, "off", "selective" or "on".
        attention: "eager", "sdpa" or "flash".
        dropout: as the model was built.

    Raises:
        ValueError: unknown attention.
    """
    if attention != "eager" and attention not in FUSED_ATTENTIONS:
        raise ValueError(f"unknown attention {attention!r}; take one of eager, {', '.join(FUSED_ATTENTIONS)}")
    hidden, layers = float(shape.hidden), shape.layers
    block, head, scores = 24 * hidden**2, 2 * hidden * shape.padded_vocab, 4 * hidden * seq_len
    scores_backward = (2.5 if attention in FUSED_ATTENTIONS else 2.0) * scores
    flops = 3 * (layers * block + head) + layers * (scores + scores_backward)
    if recompute == "on":
        last_matmul = 8 * hidden**2 if dropout == 0 else 0.0
        flops += layers * (block + scores - last_matmul)
    elif recompute == "selective" and attention == "eager":
        flops += layers * scores
    return flops


# --- Rates --------------------------------------------------------------------------------------------------


def tokens_per_second(tokens: int, seconds: float) -> float:
    """``tokens`` of all devices together in ``seconds``.

    Raises:
        ValueError: ``seconds`` is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"a rate needs a positive time, got {seconds} s")
    return tokens / seconds


def tflops_per_device(flops_per_token: float, tokens: int, seconds: float, devices: int) -> float:
    """10^12 FLOPs a second and device, for ``tokens`` that ``devices`` process together in ``seconds``."""
    return flops_per_token * tokens_per_second(tokens, seconds) / devices / TERA


def mfu(model_tflops_per_device: float, peak_flops_per_second: float | None) -> float | None:
    """Model FLOPs utilisation, a fraction (PaLM, appendix B); None where the peak is not known."""
    return None if peak_flops_per_second is None else model_tflops_per_device * TERA / peak_flops_per_second


# --- Peak rates ---------------------------------------------------------------------------------------------


class PeakRates(NamedTuple):
    """Dense datasheet rates of one kind of device, in 10^12 FLOPs a second; None: the device cannot.

    Attributes:
        name: a regular expression for the whole device name, lower case and without "NVIDIA".
        bf16: matmul with fp32 accumulation, no sparsity.
        fp16: likewise.
        fp32: plain fp32, TF32 off.
        source: the document that says so.
    """

    name: str
    bf16: float | None
    fp16: float | None
    fp32: float | None
    source: str


# Datasheets state tensor rates with 2:4 sparsity; half of that is the dense rate here.
DATACENTER_PEAKS = (
    PeakRates(r"gb200", 2500, 2500, 80, "GB200 NVL72 datasheet, a GPU"),
    PeakRates(r"b200", 2250, 2250, 75, "HGX B200 datasheet, a GPU"),
    PeakRates(r"b100", 1750, 1750, 60, "Blackwell architecture technical brief, HGX B100"),
    PeakRates(r"h200", 989.4, 989.4, 66.9, "H200 datasheet, SXM"),
    PeakRates(r"h200 nvl", 835.5, 835.5, 60, "H200 datasheet, NVL"),
    PeakRates(r"gh200 \d+gb?( hbm3e?)?", 989.4, 989.4, 66.9, "GH200 datasheet"),
    PeakRates(r"h100 (80gb hbm3|sxm5?( 80gb)?)", 989.4, 989.4, 66.9, "H100 architecture whitepaper, SXM5"),
    PeakRates(r"h100 pcie", 756, 756, 51.2, "H100 architecture whitepaper, PCIe"),
    PeakRates(r"h100 nvl", 835.5, 835.5, 60, "H100 datasheet, NVL"),
    PeakRates(r"h800", 989.4, 989.4, 66.9, "H800 datasheet, SXM"),
    PeakRates(r"h800 pcie", 756, 756, 51.2, "H800 datasheet, PCIe"),
    PeakRates(r"h20", 148, 148, 44, "H20 datasheet"),
    PeakRates(r"a[18]00([ -](sxm4?|pcie|40gb|80gb))*", 312, 312, 19.5, "A100 datasheet; A800 differs in NVLink only"),
    PeakRates(r"a800 40gb active", 312, 312, 19.5, "A800 40GB Active datasheet"),
    PeakRates(r"a40", 149.7, 149.7, 37.4, "A40 datasheet"),
    PeakRates(r"a30", 165, 165, 10.3, "A30 datasheet"),
    PeakRates(r"a10", 125, 125, 31.2, "A10 datasheet"),
    PeakRates(r"a10g", 70, 70, 35, "A10G datasheet"),
    PeakRates(r"l4", 121, 121, 30.3, "L4 datasheet"),
    PeakRates(r"l40", 181.05, 181.05, 90.5, "L40 datasheet"),
    PeakRates(r"l40s", 362.05, 362.05, 91.6, "L40S datasheet"),
    PeakRates(r"(tesla )?v100-sxm[23]-\d+gb", None, 125, 15.7, "V100 datasheet, SXM2"),
    PeakRates(r"(tesla )?v100-pcie-\d+gb", None, 112, 14, "V100 datasheet, PCIe"),
    PeakRates(r"(tesla )?v100s-pcie-32gb", None, 130, 16.4, "V100 datasheet, V100S"),
    PeakRates(r"(tesla )?t4", None, 65, 8.1, "T4 datasheet"),
    PeakRates(r"(quadro )?rtx a6000", 154.8, 154.8, 38.7, "GA102 architecture whitepaper, RTX A6000"),
    PeakRates(r"rtx 6000 ada generation", 364.2, 364.2, 91.1, "Ada professional whitepaper, RTX 6000 Ada"),
    PeakRates(r"rtx pro 6000 blackwell workstation edition", 503.8, 503.8, 126.0, "RTX Blackwell PRO whitepaper"),
    PeakRates(
        r"rtx pro 6000 blackwell max-q workstation edition",
        438.9,
        438.9,
        109.7,
        "RTX Blackwell PRO whitepaper",
    ),
)


class GeForce(NamedTuple):
    """A GeForce desktop card by two figures of NVIDIA's product page; laptop cards have others."""

    name: str
    cuda_cores: int
    boost_mhz: int


# The 3080's 12 GB edition has 3 % more cores under the same name.
GEFORCE_CARDS = (
    GeForce("rtx 3060", 3584, 1777),
    GeForce("rtx 3060 ti", 4864, 1665),
    GeForce("rtx 3070", 5888, 1725),
    GeForce("rtx 3070 ti", 6144, 1770),
    GeForce("rtx 3080", 8704, 1710),
    GeForce("rtx 3080 ti", 10240, 1665),
    GeForce("rtx 3090", 10496, 1695),
    GeForce("rtx 3090 ti", 10752, 1860),
    GeForce("rtx 4060", 3072, 2460),
    GeForce("rtx 4060 ti", 4352, 2535),
    GeForce("rtx 4070", 5888, 2475),
    GeForce("rtx 4070 super", 7168, 2475),
    GeForce("rtx 4070 ti", 7680, 2610),
    GeForce("rtx 4070 ti super", 8448, 2610),
    GeForce("rtx 4080", 9728, 2505),
    GeForce("rtx 4080 super", 10240, 2550),
    GeForce("rtx 4090", 16384, 2520),
    GeForce("rtx 4090 d", 14592, 2520),
    GeForce("rtx 5060", 3840, 2497),
    GeForce("rtx 5060 ti", 4608, 2572),
    GeForce("rtx 5070", 6144, 2512),
    GeForce("rtx 5070 ti", 8960, 2452),
    GeForce("rtx 5080", 10752, 2617),
    GeForce("rtx 5090", 21760, 2407),
)


def _geforce_peak(card: GeForce) -> PeakRates:
    """One fused multiply-add a core and cycle in fp32; twice that on tensor cores with fp32 accumulation.

    So it is in all three generations: GA102 whitepaper table 2, Ada whitepaper appendix A, RTX Blackwell
    whitepaper appendix A. With fp16 accumulation the tensor cores do twice as much, which no training uses.
    """
    fp32 = 2 * card.cuda_cores * card.boost_mhz / 1e6
    source = f"GeForce {card.name.upper()} product page: cores and boost clock"
    return PeakRates(f"geforce {re.escape(card.name)}", 2 * fp32, 2 * fp32, fp32, source)


PEAK_RATES: tuple[PeakRates, ...] = (*DATACENTER_PEAKS, *map(_geforce_peak, GEFORCE_CARDS))
PRECISIONS = ("bf16", "fp16", "fp32", "fp8")


def peak_flops(device_name: str, precision: str) -> float | None:
    """The datasheet's dense peak of a device, in FLOPs a second (not tera).

    The whole name has to match: a laptop's card, a MIG slice, a model not in the table give None, no guess.

    Args:
        device_name: as the driver gives it, "NVIDIA H100 80GB HBM3" for one.
        precision: "bf16", "fp16" or "fp32". "fp8" has no peak: its matrix products are of two kinds.

    Raises:
        ValueError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; take one of {', '.join(PRECISIONS)}")
    rates = peak_rates(device_name)
    tflops = getattr(rates, precision, None) if rates else None
    return None if tflops is None else tflops * TERA


def peak_rates(device_name: str) -> PeakRates | None:
    """The table's row for a device, its source with it; None if there is none."""
    name = " ".join(device_name.lower().split()).removeprefix("nvidia ")
    return next((rates for rates in PEAK_RATES if re.fullmatch(rates.name, name)), None)


# --- Summary ------------------------------------------------------------------------------------------------

# fields that number things; a median of them says nothing
_UNMEASURED = {
    "step",
    "skipped_steps",
    "device_memory_peak_rank",
    "host_memory_peak_rank",
    "nonfinite_loss_ranks",
}
MEASURED_FIELDS = tuple(field.name for field in dataclasses.fields(StepRecord) if field.name not in _UNMEASURED)
STATISTICS = {"median": 0.5, "p10": 0.1, "p90": 0.9}


def summarize(records: Sequence[StepRecord], warmup_step: int) -> dict[str, Any]:
    """What summary.json holds of the steps done, which may be none; every value is valid JSON.

    Returns:
        ``steps`` done, ``warmup_step``, ``steps_measured`` (those after the warm-up); for each measured field
        of :class:`StepRecord` its ``{"median", "p10", "p90"}`` over the steps measured, None where no step
        has a finite value; ``first_loss`` and ``last_loss``, None if not finite; ``nonfinite_loss_steps``;
        ``skipped_steps``; and ``peak_device_memory_mib``, ``peak_device_memory_rank``,
        ``peak_host_memory_mib``, ``peak_host_memory_rank`` over all steps, the warm-up included.
    """
    measured = [record for record in records if record.step > warmup_step]
    device_mib, device_rank = _peak(records, "device_memory_peak_mib", "device_memory_peak_rank")
    host_mib, host_rank = _peak(records, "host_memory_mib", "host_memory_peak_rank")
    return {
        "steps": len(records),
        "warmup_step": warmup_step,
        "steps_measured": len(measured),
        **{name: _statistics(getattr(record, name) for record in measured) for name in MEASURED_FIELDS},
        "first_loss": _finite_or_none(records[0].loss) if records else None,
        "last_loss": _finite_or_none(records[-1].loss) if records else None,
        "nonfinite_loss_steps": sum(not math.isfinite(record.loss) for record in records),
        "skipped_steps": records[-1].skipped_steps if records else 0,
        "peak_device_memory_mib": device_mib,
        "peak_device_memory_rank": device_rank,
        "peak_host_memory_mib": host_mib,
        "peak_host_memory_rank": host_rank,
    }


def bad_streak(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The steps at the end of ``records`` whose loss is not finite, back to the last one with a finite loss.

    A step that fp16 skipped for an overflow of its gradients has a finite loss and is not bad.
    """
    finite = [index for index, record in enumerate(records) if math.isfinite(record.loss)]
    return list(records[finite[-1] + 1 :] if finite else records)


def describe_bad_steps(streak: Sequence[StepRecord]) -> str:
    """A sentence about a bad_streak(): which steps, and the ranks that it began on."""
    first, last = streak[0], streak[-1]
    steps = f"step {first.step}" if len(streak) == 1 else f"steps {first.step} to {last.step}"
    ranks = first.nonfinite_loss_ranks
    where = f" on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" if ranks else ""
    return f"The loss is not finite in {steps}: it began as {first.loss} in step {first.step}{where}."


def _statistics(values: Iterable[float | None]) -> dict[str, float | None]:
    finite = sorted(value for value in values if value is not None and math.isfinite(value))
    return {name: quantile(finite, fraction) if finite else None for name, fraction in STATISTICS.items()}


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """The value that ``fraction`` of ``ordered`` (sorted, not empty) lies below, by linear interpolation.

    numpy.quantile's default definition; the median is its 0.5.
    """
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _peak(records: Sequence[StepRecord], field: str, rank_field: str) -> tuple[float | None, int | None]:
    """The largest value of ``field`` over ``records`` and the rank that had it."""
    known = [
        record for record in records if getattr(record, field) is not None and math.isfinite(getattr(record, field))
    ]
    if not known:
        return None, None
    highest = max(known, key=lambda record: getattr(record, field))
    return getattr(highest, field), getattr(highest, rank_field)


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
