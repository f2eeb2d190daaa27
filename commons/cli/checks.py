"""What is wrong with a configuration: all of it at once, each with a setting that works.

Adding a check is one generator in CHECKS; adding a range one entry in LIMITS.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from commons.config.schema import FRACTIONS, PLACEMENTS, TrainConfig
from commons.lifecycle.job import read_job

if TYPE_CHECKING:
    from commons.plans.registry import Plan
    from model_zoo import ModelShape

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
MAX_RUN_NAME = 200  # file systems end at 255 bytes, and files are named after the run
USUAL_HEAD_DIM = 64  # of GPT-2 in all sizes
MAX_GPU_HEAD_DIM = 256  # of torch's flash kernel
DOCTOR = "bash run_gemini.sh --doctor"


@dataclass(frozen=True)
class Limit:
    """The range of a number.

    Attributes:
        works: a value to suggest.
        low, high: the least and the greatest value that is allowed.
        above, below: the values that are not allowed any more.
    """

    works: float
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None

    def allows(self, value: float) -> bool:
        return not (
            (self.low is not None and value < self.low)
            or (self.above is not None and value <= self.above)
            or (self.high is not None and value > self.high)
            or (self.below is not None and value >= self.below)
        )

    def __str__(self) -> str:
        words = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in words.items() if bound is not None)


def _fraction(works: float) -> Limit:
    return Limit(works, low=0, high=1)


LIMITS: dict[str, Limit] = {
    "num_layers": Limit(4, low=1),
    "hidden_size": Limit(64, low=1),
    "num_heads": Limit(4, low=1),
    "dropout": Limit(0.1, low=0, below=1),
    "shard_param_frac": _fraction(1),
    "offload_optim_frac": _fraction(0.5),
    "offload_param_frac": _fraction(0),
    # of the device's memory: beyond these no chunk would fit into it
    "warmup_non_model_data_ratio": Limit(0.8, low=0, below=1),
    "steady_cuda_cap_ratio": Limit(0.9, above=0, high=1),
    "max_prefetch": Limit(0, low=0),
    "blocks_per_chunk": Limit(1, low=1),
    "tp_degree": Limit(1, low=1),
    "pp_degree": Limit(1, low=1),
    "zero_stage": Limit(0, low=0, high=2),
    "num_microbatches": Limit(1, low=1),
    "num_model_chunks": Limit(1, low=1),
    "batch_size": Limit(4, low=1),
    "seq_len": Limit(64, low=2),  # the last token has no successor to predict
    "train_step": Limit(10, low=1),
    "warmup_step": Limit(2, low=0),
    "grad_accum": Limit(1, low=1),
    "max_bad_steps": Limit(3, low=0),
    "seed": Limit(42, low=0, below=2**63),
    "lr": Limit(3e-4, low=0),
    "lr_warmup_step": Limit(0, low=0),
    "weight_decay": Limit(0.01, low=0),
    "beta1": Limit(0.9, low=0, below=1),
    "beta2": Limit(0.95, low=0, below=1),
    "adam_eps": Limit(1e-8, above=0),
    "clip_grad_norm": Limit(1.0, low=0),
    "trace_step": Limit(5, low=0),
    "initial_loss_scale": Limit(2**16, low=1, high=2**32),  # Colossal-AI's scalers grow no further
    "timeout": Limit(600, above=0),
    "max_restarts": Limit(1, low=0),
}


@dataclass(frozen=True)
class Job:
    """A configuration and the machine that is to run it.

    Attributes:
        typed: the settings that the user gave himself, by name; everything else was chosen for him.
        plan, shape: None where the plan or the size does not exist.
        gpu_count: GPUs that this node's processes see.
    """

    config: TrainConfig
    typed: frozenset[str]
    plan: Plan | None
    shape: ModelShape | None
    world_size: int
    local_world_size: int
    device_type: str
    gpu_count: int

    @property
    def node_count(self) -> int:
        return max(1, self.world_size // self.local_world_size)


def problems(
    config: TrainConfig,
    world_size: int,
    device_type: str,
    gpu_count: int,
    plan: Plan | None,
    *,
    local_world_size: int | None = None,
    typed: Iterable[str] | None = None,
) -> list[str]:
    """Everything that would keep ``config`` from running, a line each, empty if nothing.

    Args:
        config: as the user gave it, not resolved: what is chosen for him is not held against him.
        world_size: ranks in all; ``local_world_size`` of them on this node (default: all).
        device_type: "cuda" or "cpu", what ``config.device`` came out as.
        gpu_count: GPUs visible here.
        plan: PLANS' entry for ``config.distplan``, None if there is none.
        typed: names of the settings that he gave, be it with their defaults' values (default: those that differ).
    """
    names = frozenset(name for name in DEFAULTS if getattr(config, name) != DEFAULTS[name]) if typed is None else typed
    by_name = {name: _problem_by_itself(plan, config, name, name in names) for name in DEFAULTS}
    wrong = {name: DEFAULTS[name] for name, problem in by_name.items() if problem}
    # what depends on one of these is judged with the default in its place: no division by zero, no mistake told twice
    config = dataclasses.replace(config, **wrong).resolve(device_type)
    shape = config.shape() if _model_sizes().get(str(config.model_type)) else None
    local_world_size = local_world_size or world_size
    typed = frozenset(names) - wrong.keys()
    job = Job(config, typed, plan, shape, world_size, local_world_size, device_type, gpu_count)
    return [problem for problem in by_name.values() if problem] + [p for check in CHECKS for p in check(job)]


def _problem_by_itself(plan: Plan | None, config: TrainConfig, name: str, typed: bool) -> str | None:
    """The first thing wrong with a setting: nobody reads it, or it is out of its range."""
    value = getattr(config, name)
    range_problem = None if value is None or name not in LIMITS else _number_problem(name, value, LIMITS[name])
    if not typed:
        return range_problem
    return (
        _means_nothing(plan, name, value)
        or _contradicts_placement(plan, config, name)
        or _is_not_read(config, name, range_problem is None)
        or range_problem
    )


def _contradicts_placement(plan: Plan | None, config: TrainConfig, name: str) -> str | None:
    """A fraction that ``--placement`` fixes or does not have."""
    if plan is None or not plan.placement or name not in FRACTIONS or config.placement == "static":
        return None
    implied, value = PLACEMENTS[config.placement][FRACTIONS.index(name)], getattr(config, name)
    if config.placement != "auto" and value == implied:
        return None
    fixed = "has none" if config.placement == "auto" else f"means --{name} {implied:g}"
    return (
        f"--{name} {value:g} contradicts --placement {config.placement}, which {fixed}: leave it out, or use"
        " --placement static"
    )


def nearest(value: str, names: Iterable[str]) -> str:
    """The way out of a name that does not exist: the ones most like it, or all."""
    names = list(names)
    lower = {name.lower(): name for name in names}
    close = [lower[match] for match in difflib.get_close_matches(value.lower(), lower, n=3, cutoff=0.5)]
    return f"did you mean {_either(close)}?" if close else f"use {_either(names)}"


def unknown(name: str, value: str, names: Iterable[str]) -> str:
    """The problem line of a flag whose value is not one of ``names``."""
    return f"--{name} {value!r} does not exist: {nearest(value, names)}"


def _either(names: Iterable[Any]) -> str:
    *rest, last = [str(name) for name in names]
    return f"{', '.join(rest)} or {last}" if rest else last


def _number_problem(name: str, value: float, limit: Limit) -> str | None:
    if not math.isfinite(value):
        return f"--{name} must be a finite number, got {value}: try --{name} {limit.works:g}"
    if not limit.allows(value):
        return f"--{name} must be {limit}, got {value:g}: try --{name} {limit.works:g}"
    return None


def _model_sizes() -> dict[str, ModelShape]:
    from model_zoo import MODEL_SIZES

    return MODEL_SIZES


def _names(job: Job) -> Iterator[str]:
    from commons.plans.registry import PLANS

    if job.plan is None:
        yield unknown("distplan", job.config.distplan, PLANS)
    if job.shape is None:
        yield unknown("model_type", str(job.config.model_type), _model_sizes())


def _steps(job: Job) -> Iterator[str]:
    config = job.config
    if config.warmup_step >= config.train_step:
        yield (
            f"--train_step must exceed --warmup_step ({config.warmup_step}), got {config.train_step}:"
            f" try --train_step {config.warmup_step + 10}, or --warmup_step {config.train_step - 1}"
        )
    if config.trace_step > config.train_step:
        yield (
            f"--trace_step {config.trace_step} is never reached with --train_step {config.train_step}:"
            f" try --trace_step {config.train_step}"
        )
    if config.lr_warmup_step > config.train_step:
        yield (
            f"--lr_warmup_step {config.lr_warmup_step} would not end within --train_step {config.train_step}:"
            f" try --lr_warmup_step {config.train_step // 10}"
        )


def _sequence(job: Job) -> Iterator[str]:
    config, shape, seq_len = job.config, job.shape, job.config.seq_len or 0
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


def _heads(job: Job) -> Iterator[str]:
    shape, tp = job.shape, job.config.tp_degree
    if shape is None:
        return
    if shape.hidden % shape.heads == 0 and shape.heads % tp == 0:
        return
    counts = working_head_counts(shape, tp)
    if counts:
        way_out = f"use --num_heads {_either(counts)}"
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
    fitting = [heads for heads in _divisors(shape.hidden) if heads % tp_degree == 0]
    usual = [heads for heads in fitting if 16 <= shape.hidden // heads <= 128]
    return sorted(sorted(usual or fitting, key=lambda heads: abs(heads - shape.heads))[:4])


def _divisors(number: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def _widths(job: Job) -> Iterator[str]:
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
    return _divisors(math.gcd(shape.hidden, shape.padded_vocab, heads))


def _degrees_here(job: Job, shape: ModelShape) -> str:
    """The flag with these, as far as the ranks can be shared out with them; with all, where that fails whatever the
    degree.
    """
    degrees = _tensor_degrees(shape)
    fitting = [tp for tp in degrees if job.world_size % (tp * job.config.pp_degree) == 0] or degrees
    if job.config.sequence_parallel == "on":
        fitting = [tp for tp in fitting if tp > 1]
    return f"--tp_degree {_either(fitting)}" if fitting else "--tp_degree 1 --sequence_parallel off"


def _pipeline(job: Job) -> Iterator[str]:
    config, shape, pp = job.config, job.shape, job.config.pp_degree
    chunks, microbatches, batch = config.num_model_chunks, config.num_microbatches or 1, config.batch_size or 1
    parts = pp * chunks
    if shape is not None and shape.layers < parts and pp > 1:
        # the longest pipeline that the ranks can be shared out with too; each divisor of today's is one
        fewer = [p for p in _divisors(pp) if p <= shape.layers] if _is_shared_out(job) else [min(pp, shape.layers)]
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
        fitting = [number for number in _divisors(batch) if _keeps_stages_busy(number, pp, chunks)][:6]
        pieces = f"--num_microbatches {_either(fitting)}, or " if fitting else ""
        yield (
            f"--num_microbatches {microbatches} does not divide --batch_size {batch}: use {pieces}--batch_size"
            f" {microbatches}"
        )
    copies = -(-job.world_size // job.config.model_parallel_size)
    shards_nothing = job.plan is not None and job.plan.pipeline and config.precision == "fp32" and copies > 1
    if pp > 1 and config.zero_stage == 2:
        stages = "0" if shards_nothing else "1 or 0"
        yield (
            "--zero_stage 2 would reduce gradients once a microbatch under --pp_degree above 1: use --zero_stage"
            f" {stages}"
        )
    if job.plan is not None and shards_nothing and config.zero_stage:
        yield (
            f"{job.plan.name} in fp32 shards nothing over data-parallel ranks: use --zero_stage 0, or --precision bf16"
        )
    for name in ("num_microbatches", "num_model_chunks"):
        if pp == 1 and name in job.typed and getattr(config, name) > 1:
            way_out = "leave it out" if name == "num_microbatches" else f"use --{name} 1"
            two_stages = ", or use --pp_degree 2" if _works(job, pp_degree=2) else ""
            yield f"--{name} {getattr(config, name)} needs a pipeline: {way_out}{two_stages}"


def _keeps_stages_busy(microbatches: int, pp: int, chunks: int) -> bool:
    return microbatches >= pp and (chunks == 1 or microbatches % pp == 0)


def _without_pipeline(job: Job) -> str:
    """The flags that have to follow a --pp_degree of 1."""
    wanted = {"num_model_chunks": job.config.num_model_chunks > 1, "num_microbatches": "num_microbatches" in job.typed}
    return "".join(f" --{name} 1" for name, is_wanted in wanted.items() if is_wanted)


def _is_shared_out(job: Job) -> bool:
    return job.world_size % job.config.model_parallel_size == 0


def _works(job: Job, **degrees: int) -> bool:
    """Whether the ranks, the layers and the batch can be shared out with other degrees."""
    typed = {"num_microbatches": job.config.num_microbatches if "num_microbatches" in job.typed else None}
    config = dataclasses.replace(job.config, **degrees, **typed).resolve(job.device_type)  # pyright: ignore
    other = dataclasses.replace(job, config=config)
    pp, chunks, microbatches = config.pp_degree, config.num_model_chunks, config.num_microbatches or 1
    return (
        _is_shared_out(other)
        and (job.shape is None or (pp * chunks <= job.shape.layers and config.tp_degree in _tensor_degrees(job.shape)))
        and _keeps_stages_busy(microbatches, pp, chunks)
        and (config.batch_size or 1) % microbatches == 0
        and not (pp > 1 and config.zero_stage == 2)
    )


# What a plan may lack: the attribute of Plan, and the settings that need it.
ABILITIES: dict[str, tuple[str, ...]] = {
    "placement": (
        "placement", *FRACTIONS, "warmup_non_model_data_ratio", "steady_cuda_cap_ratio", "max_prefetch",
        "blocks_per_chunk", "gemini_hooks", "peer_copies",
    ),
    "tensor_parallel": ("tp_degree",),
    "sequence_parallel": ("sequence_parallel",),
    "pipeline": ("pp_degree", "num_microbatches", "num_model_chunks", "zero_stage"),
}  # fmt: skip


# Of these the values that are true of every plan: scripts set them whatever the plan, and nobody is misled.
NEUTRAL = {"tp_degree": 1, "pp_degree": 1, "num_microbatches": 1, "num_model_chunks": 1, "sequence_parallel": "off"}


def _means_nothing(plan: Plan | None, name: str, value: Any) -> str | None:
    """The problem with a setting that ``plan`` does not have, None if it has it."""
    from commons.plans.registry import PLANS

    ability = next((ability for ability, names in ABILITIES.items() if name in names), None)
    if plan is None or ability is None or getattr(plan, ability) or NEUTRAL.get(name) == value:
        return None
    able = [other.name for other in PLANS.values() if getattr(other, ability)]
    return f"--{name} {_shown(value)} means nothing to {plan.name}: leave it out, or use --distplan {_either(able)}"


# Settings that are read under one value of another setting only.
READ_UNDER = {
    "warmup_non_model_data_ratio": ("placement", "auto"),
    "steady_cuda_cap_ratio": ("placement", "auto"),
    "initial_loss_scale": ("precision", "fp16"),
}


def _is_not_read(config: TrainConfig, name: str, in_range: bool) -> str | None:
    if name not in READ_UNDER:
        return None
    other, wanted = READ_UNDER[name]
    if getattr(config, other) == wanted:
        return None
    change = f", or use --{other} {wanted}" if in_range else ""
    return f"--{name} is read under --{other} {wanted} only: leave it out{change}"


def _precisions(job: Job) -> Iterator[str]:
    """A precision that the plan does not have."""
    from commons.plans.registry import PLANS

    if job.plan is None:
        return
    if job.config.precision not in job.plan.precisions:
        able = [plan.name for plan in PLANS.values() if job.config.precision in plan.precisions]
        here = [name for name in job.plan.precisions if name != "fp8" or job.device_type == "cuda"]
        yield (
            f"{job.plan.name} cannot train in --precision {job.config.precision}: use --precision"
            f" {_either(here)}, or --distplan {_either(able)}"
        )


def _torch_version(job: Job) -> Iterator[str]:
    oldest = None if job.plan is None or job.device_type != "cpu" else job.plan.cpu_torch
    installed = importlib.metadata.version("torch")
    if oldest is not None and Version(installed) < Version(oldest):
        yield (
            f"--distplan {job.config.distplan} runs on a CPU with torch {oldest} or newer, this is {installed}: use"
            " another --distplan, a GPU, or a newer torch"
        )


def _placement(job: Job) -> Iterator[str]:
    config = job.config
    if job.plan is None or not job.plan.placement:
        return
    whole = (config.shard_param_frac, config.offload_optim_frac) == (1, 1)
    if config.placement == "static" and config.offload_param_frac and not whole:
        yield (
            f"--offload_param_frac {config.offload_param_frac:g} would be ignored: Gemini keeps parameters"
            " on the host only with --shard_param_frac 1 --offload_optim_frac 1, got"
            f" {config.shard_param_frac:g} and {config.offload_optim_frac:g}: add these two, or use"
            " --offload_param_frac 0"
        )


def _layout(job: Job) -> Iterator[str]:
    if _is_shared_out(job):
        return
    tp, pp, copy = job.config.tp_degree, job.config.pp_degree, job.config.model_parallel_size
    fits = -(-job.world_size // copy) * copy
    on_gpus = job.device_type == "cuda" and job.node_count == 1
    more = f"start {fits} ranks (GPUNUM={fits} on one machine), or " if not on_gpus or fits <= job.gpu_count else ""
    yield (
        f"--tp_degree {tp} x --pp_degree {pp} = {copy} ranks hold one copy of the model, and"
        f" {_count(job.world_size, 'rank')} cannot be shared out so: {more}use {_smaller_degrees(job, job.world_size)}"
    )


def _smaller_degrees(job: Job, ranks: int) -> str:
    """The flags of the largest copy of the model that so many ranks can be shared out with, cut as is asked for or
    less.
    """
    tp, pp = job.config.tp_degree, job.config.pp_degree
    fitting = _divisors(tp) if job.shape is None else set(_tensor_degrees(job.shape)) & set(_divisors(tp))
    lower = [(t, p) for t in fitting for p in _divisors(pp) if ranks % (t * p) == 0]
    best_tp, best_pp = max(lower, key=lambda degrees: degrees[0] * degrees[1])
    extras = _without_pipeline(job) if best_pp == 1 else ""
    whole = " --sequence_parallel off" if best_tp == 1 and job.config.sequence_parallel == "on" else ""
    return f"--tp_degree {best_tp} --pp_degree {best_pp}{extras}{whole}"


def _compile(job: Job) -> Iterator[str]:
    """What ``--compile on`` cannot do; "auto" leaves it out by itself."""
    from commons.config.auto import compile_problem

    config = job.config
    if config.compile != "on":
        return
    if config.model_parallel_size > 1:
        yield (
            "--compile on takes whole blocks, and --tp_degree and --pp_degree split them: leave it out, or"
            " use --tp_degree 1 --pp_degree 1"
        )
    elif config.gemini_hooks == "operation" and config.distplan == "CAI_Gemini":
        yield ("--compile on cannot see through --gemini_hooks operation: use --gemini_hooks block, or --compile off")
    elif job.plan is not None and job.plan.pipeline:
        yield f"--compile on means nothing to {job.plan.name}: leave it out, or use another --distplan"
    problem = compile_problem(job.device_type)
    if problem:
        yield f"--compile on: {problem}; or use --compile off"


def _cuda_graph(job: Job) -> Iterator[str]:
    """What ``--cuda_graph on`` cannot do; "auto" leaves it out by itself."""
    if job.config.cuda_graph != "on":
        return
    from commons.config.auto import graph_problems

    copies = job.config.peer_copies != "off" and not any(_without_peer_copies(job))
    for problem in graph_problems(job.config, job.device_type, job.world_size, copies):
        yield f"--cuda_graph on records nothing {problem}: use --cuda_graph off"


def _peer_copies(job: Job) -> Iterator[str]:
    """What ``--peer_copies on`` cannot do; "auto" leaves it out by itself."""
    if job.config.peer_copies == "on":
        for problem in _without_peer_copies(job):
            yield f"--peer_copies on gathers nothing {problem}: use --peer_copies off"


def _without_peer_copies(job: Job) -> Iterator[str]:
    from commons.config.auto import peer_problems

    return peer_problems(job.config, job.world_size, job.local_world_size)


def _kernels(job: Job) -> Iterator[str]:
    config = job.config
    if config.sequence_parallel == "on" and config.tp_degree == 1:
        two_parts = "use --tp_degree 2, or " if _works(job, tp_degree=2) else ""
        yield f"--sequence_parallel on needs tensor parallelism: {two_parts}leave it out"
    if config.activation_checkpointing == "selective" and config.tp_degree > 1:
        yield (
            "--activation_checkpointing selective would keep results that --tp_degree above 1 adds up in place, and add"
            " them up twice: use --activation_checkpointing on, or off"
        )
    if config.check_parity and config.dropout > 0:
        yield "--check_parity needs a run without chance: use --dropout 0, or leave it out"
    if config.attention != "flash":
        return
    if job.device_type == "cpu" and config.dropout > 0:
        yield "--attention flash has no dropout on a CPU: use --dropout 0, or --attention sdpa"
    if job.device_type == "cuda" and config.precision == "fp32":
        yield "--attention flash has no fp32 on a GPU: use --precision bf16, or --attention sdpa"
    if job.shape is not None and job.device_type == "cuda" and job.shape.head_dim > MAX_GPU_HEAD_DIM:
        yield (
            f"--attention flash takes heads of at most {MAX_GPU_HEAD_DIM}, got {job.shape.head_dim}:"
            f" use --num_heads {_either(working_head_counts(job.shape, config.tp_degree))}, or --attention"
            " sdpa"
        )


def _fp8(job: Job) -> Iterator[str]:
    """Where ``--precision fp8`` has no kernels: on other devices, under hooks an operation, for odd sizes."""
    config, shape = job.config, job.shape
    if config.precision != "fp8" or job.plan is None or "fp8" not in job.plan.precisions:
        return
    instead = "use --precision bf16"
    if job.device_type != "cuda":
        yield f"--precision fp8 needs a GPU that has it (RTX 40, L40S, H100 or newer), not a CPU: {instead}"
    elif job.gpu_count:
        import torch

        from commons.ops.fp8 import FIRST_CAPABILITY

        if torch.cuda.get_device_capability() < FIRST_CAPABILITY:
            name = torch.cuda.get_device_name()
            yield f"--precision fp8 needs a GPU that has it (RTX 40, L40S, H100 or newer), not {name}: {instead}"
    if config.tp_degree > 1 or config.gemini_hooks == "operation":
        yield f"--precision fp8 takes whole blocks: use --tp_degree 1 and --gemini_hooks block, or {instead}"
    tokens = (config.batch_size or 0) * (config.seq_len or 0)
    for what, size in (("--hidden_size", shape.hidden if shape else 0), ("--batch_size x --seq_len", tokens)):
        if size % 16:
            yield f"--precision fp8 needs a {what} that is a multiple of 16, got {size}: use {size // 16 * 16 + 16}"


def _machine(job: Job) -> Iterator[str]:
    if job.device_type != "cuda":
        return
    if job.gpu_count == 0:
        cause, cure = why_no_gpu()
        because = f" ({cause})" if cause else ""
        yield f"--device cuda needs a GPU, and none is seen{because}: use --device cpu, or run {cure or DOCTOR}"
    elif job.local_world_size > job.gpu_count:
        yield (
            f"{job.local_world_size} ranks on this machine, but {_count(job.gpu_count, 'visible GPU')}:"
            f" use {_fewer_ranks(job)}, or --device cpu"
        )


def _fewer_ranks(job: Job) -> str:
    """As many ranks as the GPUs are and the degrees allow; where they are too few for one copy, smaller degrees too."""
    nodes, counts = job.node_count, range(job.gpu_count, 0, -1)
    number = next((count for count in counts if nodes * count % job.config.model_parallel_size == 0), None)
    if number is None:
        return f"GPUNUM={job.gpu_count} {_smaller_degrees(job, nodes * job.gpu_count)}"
    return f"GPUNUM={number} (torchrun --nproc_per_node {number})"


def why_no_gpu() -> tuple[str, str]:
    """The doctor's cause and the command that cures it, each empty where it knows none."""
    try:
        from commons.doctor import why_no_gpu as ask_the_doctor

        return ask_the_doctor()
    except Exception:  # a diagnosis must never be what keeps a run from starting
        return "", ""


def _output(job: Job) -> Iterator[str]:
    folder, name = Path(job.config.log_dir), job.config.run_name
    yield from _folder_problem(folder)
    if name is None:
        return
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name or len(name) > MAX_RUN_NAME:
        yield (
            f"--run_name {name!r} must be a folder's name of at most {MAX_RUN_NAME} characters, inside"
            f" --log_dir: use one without '/', for example --run_name {_plain(name)}"
        )
    elif (folder / name / "config.json").exists() and not _is_restart():
        yield (f"--run_name {name}: {folder / name} already holds a run: choose another name, or move that folder away")


def _is_restart() -> bool:
    """Whether torchelastic started this rank again: it goes on in the folder that it had."""
    return read_job().attempt > 1


def _folder_problem(folder: Path) -> Iterator[str]:
    """Whether ``folder`` could be made and written to. Only trying tells; what is tried leaves no trace."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield f"--log_dir {folder}: {existing} is a file, not a folder: choose another --log_dir"
        return
    try:
        tempfile.TemporaryDirectory(prefix=".write_test_", dir=existing).cleanup()
    except OSError as error:
        yield (
            f"--log_dir {folder}: nothing can be written in {existing} ({error.strerror}): choose another"
            " --log_dir, or make that one writable"
        )


def _plain(name: str) -> str:
    """The name without what may not be in it, as a suggestion."""
    kept = "".join(c if c.isalnum() or c in "._-" else "_" for c in name).strip("._-")
    return kept[:MAX_RUN_NAME] or "my_run"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


CHECKS = (
    _names,
    _steps,
    _sequence,
    _heads,
    _widths,
    _pipeline,
    _precisions,
    _torch_version,
    _placement,
    _layout,
    _compile,
    _cuda_graph,
    _peer_copies,
    _kernels,
    _fp8,
    _machine,
    _output,
)
