"""Checks of how model, batch and sequence are spread over the ranks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from commons.cli.job import Job
from commons.cli.wording import either
from commons.config.resolved import usual_head_counts
from model_zoo import ModelShape, divisors

USUAL_HEAD_DIM = 64  # of GPT-2 in all sizes


def sequence(job: Job) -> Iterator[str]:
    config, shape, seq_len = job.config, job.shape, job.config.seq_len
    if shape is not None and seq_len > shape.positions:
        yield (
            f"--seq_len {seq_len} exceeds the {shape.positions} positions of {config.model_type}:"
            f" use --seq_len {shape.positions} or less"
        )
    if config.sequence_parallel == "on" and seq_len % config.tp_degree:
        fits = max(config.tp_degree, seq_len // config.tp_degree * config.tp_degree)
        yield (
            f"--sequence_parallel cuts the sequence into --tp_degree {config.tp_degree} parts, which do not"
            f" divide --seq_len {seq_len}: use --seq_len {fits}"
        )


def heads(job: Job) -> Iterator[str]:
    shape, tp = job.shape, job.config.tp_degree
    if shape is None:
        return
    if shape.hidden % shape.heads == 0 and shape.heads % tp == 0:
        return
    counts = working_head_counts(shape, tp)
    if counts:
        way_out = f"use --num_heads {either(counts)}"
    else:
        unit = USUAL_HEAD_DIM * tp
        hidden = max(1, round(shape.hidden / unit)) * unit
        way_out = f"use --hidden_size {hidden} --num_heads {hidden // USUAL_HEAD_DIM}"
    if shape.hidden % shape.heads:
        yield (
            f"{shape.heads} heads (--num_heads) do not divide the hidden size {shape.hidden} (--hidden_size): {way_out}"
        )
    else:
        degrees = _degrees_here(job, shape)
        # other heads are no help where the vocabulary is not divided either
        ways_out = f"{way_out}, or {degrees}" if shape.padded_vocab % tp == 0 else f"use {degrees}"
        size = job.config.model_type
        yield f"--tp_degree {tp} does not divide the {shape.heads} attention heads of {size}: {ways_out}"


def working_head_counts(shape: ModelShape, tp_degree: int) -> list[int]:
    """Up to four head counts nearest to the size's own that divide its hidden size and that ``tp_degree``
    divides.

    Head sizes stay between 16 and 128, what attention kernels are fast at, unless the hidden size allows none
    of these.
    """
    counts = usual_head_counts(shape.hidden, tp_degree)
    return sorted(sorted(counts, key=lambda heads: abs(heads - shape.heads))[:4])


def widths(job: Job) -> Iterator[str]:
    shape, tp = job.shape, job.config.tp_degree
    if shape is None:
        return
    widths = {"hidden size (--hidden_size)": shape.hidden, "padded vocabulary": shape.padded_vocab}
    for what, width in widths.items():
        if width % tp:
            yield f"--tp_degree {tp} does not divide the {what} of {width}: use {_degrees_here(job, shape)}"


def _tensor_degrees(shape: ModelShape) -> list[int]:
    """Every --tp_degree that divides all that it has to."""
    heads = shape.heads if shape.hidden % shape.heads == 0 else shape.hidden
    return divisors(math.gcd(shape.hidden, shape.padded_vocab, heads))


def _degrees_here(job: Job, shape: ModelShape) -> str:
    """The flag with these, as far as the ranks can be shared out with them; with all, where that fails whatever the
    degree.
    """
    degrees = _tensor_degrees(shape)
    fitting = [tp for tp in degrees if job.world_size % (tp * job.config.pp_degree) == 0] or degrees
    if job.config.sequence_parallel == "on":
        fitting = [tp for tp in fitting if tp > 1]
    return f"--tp_degree {either(fitting)}" if fitting else "--tp_degree 1 --sequence_parallel off"


def pipeline(job: Job) -> Iterator[str]:
    config, shape, pp = job.config, job.shape, job.config.pp_degree
    chunks, microbatches, batch = config.num_model_chunks, config.num_microbatches, config.batch_size
    parts = pp * chunks
    if shape is not None and shape.layers < parts and pp > 1:
        # the longest pipeline that the ranks can be shared out with too; each divisor of today's is one
        fewer = [p for p in divisors(pp) if p <= shape.layers] if _is_shared_out(job) else [min(pp, shape.layers)]
        extras = _without_pipeline(job) if fewer[-1] == 1 else " --num_model_chunks 1"
        yield (
            f"--pp_degree {pp} x --num_model_chunks {chunks} = {parts} parts, but {config.model_type} has"
            f" {shape.layers} layers: use --pp_degree {fewer[-1]}{extras}, or --num_layers {parts}"
        )
    if pp > 1 and not _keeps_stages_busy(microbatches, pp, chunks):
        rule = "a multiple of" if chunks > 1 else "at least"
        yield (
            f"--num_microbatches must be {rule} --pp_degree {pp} to keep every stage busy, got"
            f" {microbatches}: use --num_microbatches {pp} with a --batch_size that is a multiple of it"
            f" (--batch_size {pp * 2})"
        )
    if pp > 1 and batch % microbatches:
        fitting = [number for number in divisors(batch) if _keeps_stages_busy(number, pp, chunks)][:6]
        pieces = f"--num_microbatches {either(fitting)}, or " if fitting else ""
        yield (
            f"--num_microbatches {microbatches} does not divide --batch_size {batch}: use {pieces}--batch_size"
            f" {microbatches}"
        )
    copies = -(-job.world_size // job.config.model_parallel_size)
    shards_nothing = job.plan is not None and job.plan.pipeline and config.precision == "fp32" and copies > 1
    if pp > 1 and config.zero_stage == 2:
        stages = "0" if shards_nothing else "1 or 0"
        yield (
            "--zero_stage 2 would reduce gradients once per microbatch under --pp_degree above 1: use --zero_stage"
            f" {stages}"
        )
    if job.plan is not None and shards_nothing and config.zero_stage:
        yield (
            f"{job.plan.name} in fp32 shards nothing over data-parallel ranks: use --zero_stage 0, or --precision bf16"
        )
    for name in ("num_microbatches", "num_model_chunks"):
        if pp == 1 and name in job.typed and getattr(config, name) > 1:
            way_out = "remove it" if name == "num_microbatches" else f"use --{name} 1"
            two_stages = ", or use --pp_degree 2" if works(job, pp_degree=2) else ""
            yield f"--{name} {getattr(config, name)} needs a pipeline: {way_out}{two_stages}"


def _keeps_stages_busy(microbatches: int, pp: int, chunks: int) -> bool:
    return microbatches >= pp and (chunks == 1 or microbatches % pp == 0)


def _without_pipeline(job: Job) -> str:
    """The flags that have to follow a --pp_degree of 1."""
    wanted = {"num_model_chunks": job.config.num_model_chunks > 1, "num_microbatches": "num_microbatches" in job.typed}
    return "".join(f" --{name} 1" for name, is_wanted in wanted.items() if is_wanted)


def _is_shared_out(job: Job) -> bool:
    return job.world_size % job.config.model_parallel_size == 0


def works(job: Job, **degrees: int) -> bool:
    """Whether the ranks, the layers and the batch can be shared out with other degrees."""
    given = dataclasses.replace(job.given, **degrees)
    config = given.resolve(job.device_type, job.world_size, job.local_world_size)
    other = dataclasses.replace(job, config=config)
    pp, chunks, microbatches = config.pp_degree, config.num_model_chunks, config.num_microbatches
    return (
        _is_shared_out(other)
        and (job.shape is None or (pp * chunks <= job.shape.layers and config.tp_degree in _tensor_degrees(job.shape)))
        and _keeps_stages_busy(microbatches, pp, chunks)
        and config.batch_size % microbatches == 0
        and not (pp > 1 and config.zero_stage == 2)
    )


def ranks(job: Job) -> Iterator[str]:
    if _is_shared_out(job):
        return
    tp, pp, copy = job.config.tp_degree, job.config.pp_degree, job.config.model_parallel_size
    fits = -(-job.world_size // copy) * copy
    on_gpus = job.device_type == "cuda" and job.node_count == 1
    more = f"start {fits} ranks (GPUNUM={fits} on one machine), or " if not on_gpus or fits <= job.gpu_count else ""
    yield (
        f"world size {job.world_size} is not divisible by --tp_degree {tp} x --pp_degree {pp} = {copy}, the ranks of"
        f" one copy of the model: {more}use {smaller_degrees(job, job.world_size)}"
    )


def smaller_degrees(job: Job, ranks: int) -> str:
    """The flags of the largest copy of the model that so many ranks can be shared out with, cut as is asked for or
    less.
    """
    tp, pp = job.config.tp_degree, job.config.pp_degree
    fitting = divisors(tp) if job.shape is None else set(_tensor_degrees(job.shape)) & set(divisors(tp))
    lower = [(t, p) for t in fitting for p in divisors(pp) if ranks % (t * p) == 0]
    best_tp, best_pp = max(lower, key=lambda degrees: degrees[0] * degrees[1])
    extras = _without_pipeline(job) if best_pp == 1 else ""
    whole = " --sequence_parallel off" if best_tp == 1 and job.config.sequence_parallel == "on" else ""
    return f"--tp_degree {best_tp} --pp_degree {best_pp}{extras}{whole}"
