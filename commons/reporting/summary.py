"""What is said of a whole run: the statistics in summary.json, and whether its last steps went wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from commons.reporting.record import StepRecord

# fields that number things; a median of them says nothing
_UNMEASURED = {
    "step",
    "skipped_steps",
    "device_memory_peak_rank",
    "host_memory_peak_rank",
    "nonfinite_loss_ranks",
    "tokens_seen",
    "eval_loss",
    "eval_perplexity",
    "eval_seconds",
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
        ``peak_host_memory_mib``, ``peak_host_memory_rank`` over all steps, the warm-up included; ``tokens_seen``
        after the last step; ``evaluations``, how many, the loss and perplexity of the last, and the best loss with its
        step.
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
        "tokens_seen": records[-1].tokens_seen if records else 0,
        **_evaluations(records),
    }


def _evaluations(records: Sequence[StepRecord]) -> dict[str, Any]:
    seen = [(record.eval_loss, record) for record in records if record.eval_loss is not None]
    finite = [(loss, record.step) for loss, record in seen if math.isfinite(loss)]
    last, (best, best_step) = (seen[-1][1] if seen else None), min(finite, default=(None, None))
    return {
        "evaluations": len(seen),
        "last_eval_loss": _finite_or_none(last and last.eval_loss),
        "last_eval_perplexity": _finite_or_none(last and last.eval_perplexity),
        "best_eval_loss": best,
        "best_eval_step": best_step,
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
