"""What is wrong with a configuration: all of it at once, each with a setting that works.

Adding a check is one generator in CHECKS; adding a range one entry in LIMITS.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.metadata
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from commons.config import FRACTIONS, PLACEMENTS, TrainConfig

if TYPE_CHECKING:
    from commons.plans import Plan
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
    "warmup_non_model_data_ratio": _fraction(0.8),
    "steady_cuda_cap_ratio": _fraction(0.9),
    "max_prefetch": Limit(0, low=0),
    "blocks_per_chunk": Limit(1, low=1),
    "tp_degree": Limit(1, low=1),
    "pp_degree": Limit(1, low=1),
    "zero_stage": Limit(1, low=0, high=2),
    "num_microbatches": Limit(2, low=1),
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
        given: the configuration before anything was chosen for the user.
        plan, shape: None where the plan or the size does not exist.
        gpu_count: GPUs that this node's processes see.
    """

    config: TrainConfig
    given: TrainConfig
    plan: Plan | None
    shape: ModelShape | None
    world_size: int
    local_world_size: int
    device_type: str
    gpu_count: int


def problems(
    config: TrainConfig,
    world_size: int,
    device_type: str,
    gpu_count: int,
    plan: Plan | None,
    *,
    local_world_size: int | None = None,
) -> list[str]:
    """Everything that would keep ``config`` from running, a line each, empty if nothing.

    Args:
        config: as the user gave it, not resolved: what is chosen for him is not held against him.
        world_size: ranks in all; ``local_world_size`` of them on this node (default: all).
        device_type: "cuda" or "cpu", what ``config.device`` came out as.
        gpu_count: GPUs visible here.
        plan: PLANS' entry for ``config.distplan``, None if there is none.
    """
    found, wrong = [], {}
    for name, limit in LIMITS.items():
        value = getattr(config, name)
        problem = None if value is None else _number_problem(name, value, limit)
        if problem:
            found.append(_means_nothing(plan, name, value) or problem)
            wrong[name] = DEFAULTS[name]
    # what depends on a number out of its range is judged with the default in its place: no division by zero
    given = dataclasses.replace(config, **wrong)
    config = given.resolve(device_type)
    shape = config.shape() if _model_sizes().get(str(config.model_type)) else None
    job = Job(config, given, plan, shape, world_size, local_world_size or world_size, device_type, gpu_count)
    return found + [problem for check in CHECKS for problem in check(job)]


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
    from commons.plans import PLANS

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
        degrees = _either(_tensor_degrees(shape))
        yield (
            f"--tp_degree {tp} does not divide the {shape.heads} attention heads of {job.config.model_type}:"
            f" {way_out}, or --tp_degree {degrees}"
        )


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
            yield (
                f"--tp_degree {tp} does not divide the {what} of {width}: use --tp_degree"
                f" {_either(_tensor_degrees(shape))}"
            )


def _tensor_degrees(shape: ModelShape) -> list[int]:
    """Every --tp_degree that divides all that it has to."""
    heads = shape.heads if shape.hidden % shape.heads == 0 else shape.hidden
    return _divisors(math.gcd(shape.hidden, shape.padded_vocab, heads))


def _pipeline(job: Job) -> Iterator[str]:
    config, shape, pp = job.config, job.shape, job.config.pp_degree
    microbatches, batch = config.num_microbatches or 1, config.batch_size or 1
    parts = pp * config.num_model_chunks
    if shape is not None and shape.layers < parts:
        yield (
            f"--pp_degree {pp} x --num_model_chunks {config.num_model_chunks} = {parts} parts, but"
            f" {config.model_type} has {shape.layers} layers: use --pp_degree {min(pp, shape.layers)}"
            f" --num_model_chunks 1, or --num_layers {parts}"
        )
    if batch % microbatches:
        yield (
            f"--num_microbatches {microbatches} does not divide --batch_size {batch}:"
            f" use --num_microbatches {_either(_divisors(batch)[:6])}, or --batch_size {microbatches}"
        )
    if pp > 1 and (microbatches < pp or (config.num_model_chunks > 1 and microbatches % pp)):
        rule = "a multiple of" if config.num_model_chunks > 1 else "at least"
        yield (
            f"--num_microbatches must be {rule} --pp_degree {pp} to keep every stage busy, got"
            f" {microbatches}: use --num_microbatches {pp} with a --batch_size that is a multiple of it"
            f" (--batch_size {pp * 2})"
        )
    if pp > 1 and config.zero_stage == 2:
        yield (
            "--zero_stage 2 would reduce gradients once a microbatch under --pp_degree above 1: use --zero_stage 1 or 0"
        )
    copies = job.world_size // config.model_parallel_size
    if job.plan is not None and job.plan.pipeline and config.precision == "fp32" and config.zero_stage and copies > 1:
        yield (
            f"{job.plan.name} in fp32 shards nothing over data-parallel ranks: use --zero_stage 0, or --precision bf16"
        )
    if pp == 1 and config.num_model_chunks > 1:
        yield (
            f"--num_model_chunks {config.num_model_chunks} needs a pipeline: use --num_model_chunks 1, or --pp_degree 2"
        )


# What a plan may lack: the attribute of Plan, and the settings that need it.
ABILITIES: dict[str, tuple[str, ...]] = {
    "placement": (
        "placement", *FRACTIONS, "warmup_non_model_data_ratio", "steady_cuda_cap_ratio", "max_prefetch",
        "blocks_per_chunk", "gemini_hooks",
    ),
    "tensor_parallel": ("tp_degree",),
    "sequence_parallel": ("sequence_parallel",),
    "pipeline": ("pp_degree", "num_microbatches", "num_model_chunks", "zero_stage"),
}  # fmt: skip


def _means_nothing(plan: Plan | None, name: str, value: Any) -> str | None:
    """The problem with a setting that ``plan`` does not have, None if it has it."""
    from commons.plans import PLANS

    ability = next((ability for ability, names in ABILITIES.items() if name in names), None)
    if plan is None or ability is None or getattr(plan, ability):
        return None
    able = [other.name for other in PLANS.values() if getattr(other, ability)]
    return f"--{name} {_shown(value)} means nothing to {plan.name}: leave it out, or use --distplan {_either(able)}"


def _abilities(job: Job) -> Iterator[str]:
    """Settings that somebody gave and the plan does not have."""
    from commons.plans import PLANS

    if job.plan is None:
        return
    for name in (name for names in ABILITIES.values() for name in names):
        value = getattr(job.given, name)
        problem = None if value == DEFAULTS[name] else _means_nothing(job.plan, name, value)
        if problem:
            yield problem
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


def _was_chosen(job: Job, name: str) -> bool:
    """Whether a setting is other than it would be had nobody given it."""
    without = dataclasses.replace(job.config, **{name: DEFAULTS[name]}).resolve(job.device_type)
    return getattr(job.config, name) != getattr(without, name)


def _placement(job: Job) -> Iterator[str]:
    config = job.config
    if job.plan is None or not job.plan.placement:
        return
    if config.placement != "static":
        for name, implied in zip(FRACTIONS, PLACEMENTS[config.placement], strict=True):
            if _was_chosen(job, name):
                fixed = "has none" if config.placement == "auto" else f"means --{name} {implied:g}"
                yield (
                    f"--{name} {getattr(config, name):g} contradicts --placement {config.placement}, which"
                    f" {fixed}: leave it out, or use --placement static"
                )
    elif config.offload_param_frac and (config.shard_param_frac, config.offload_optim_frac) != (1, 1):
        yield (
            f"--offload_param_frac {config.offload_param_frac:g} would be ignored: Gemini keeps parameters"
            " on the host only with --shard_param_frac 1 --offload_optim_frac 1, got"
            f" {config.shard_param_frac:g} and {config.offload_optim_frac:g}: add these two, or use"
            " --offload_param_frac 0"
        )
    if config.placement != "auto":
        for name in ("warmup_non_model_data_ratio", "steady_cuda_cap_ratio"):
            if _was_chosen(job, name):
                yield f"--{name} is read under --placement auto only: leave it out, or use --placement auto"


def _layout(job: Job) -> Iterator[str]:
    # a degree that the plan does not take has been told already, and the cure is another
    plan = job.plan
    tp = job.config.tp_degree if plan is None or plan.tensor_parallel else 1
    pp = job.config.pp_degree if plan is None or plan.pipeline else 1
    if job.world_size % (tp * pp):
        fits = -(-job.world_size // (tp * pp)) * tp * pp
        fitting = _divisors(tp) if job.shape is None else set(_tensor_degrees(job.shape)) & set(_divisors(tp))
        lower = [(t, p) for t in fitting for p in _divisors(pp) if job.world_size % (t * p) == 0]
        best_tp, best_pp = max(lower, key=lambda degrees: degrees[0] * degrees[1])
        yield (
            f"--tp_degree {tp} x --pp_degree {pp} = {tp * pp} ranks hold one copy of the model, and"
            f" {_count(job.world_size, 'rank')} cannot be shared out so: start {fits} ranks (GPUNUM={fits}"
            f" on one machine), or use --tp_degree {best_tp} --pp_degree {best_pp}"
        )


def _compile(job: Job) -> Iterator[str]:
    """What ``--compile on`` cannot do; "auto" leaves it out by itself."""
    from commons.compiling import compile_problem

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


def _kernels(job: Job) -> Iterator[str]:
    config = job.config
    if config.sequence_parallel == "on" and config.tp_degree == 1:
        yield "--sequence_parallel on needs tensor parallelism: use --tp_degree 2, or leave it out"
    if config.activation_checkpointing == "selective" and config.tp_degree > 1:
        yield (
            "--activation_checkpointing selective would keep results that --tp_degree above 1 adds up in place, and add"
            " them up twice: use --activation_checkpointing on, or off"
        )
    if config.check_parity and config.dropout > 0:
        yield "--check_parity needs a run without chance: use --dropout 0, or leave it out"
    if config.precision != "fp16" and _was_chosen(job, "initial_loss_scale"):
        yield (
            f"--initial_loss_scale is read in fp16 only, this is {config.precision}: leave it out, or use --precision"
            " fp16"
        )
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

        from commons.fp8 import FIRST_CAPABILITY

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
        yield f"--device cuda needs a GPU ({why_no_gpu()}): use --device cpu, or run {DOCTOR}"
    elif job.local_world_size > job.gpu_count:
        yield (
            f"{job.local_world_size} ranks on this machine, but {_count(job.gpu_count, 'visible GPU')}:"
            f" use GPUNUM={job.gpu_count} (torchrun --nproc_per_node {job.gpu_count}), or --device cpu"
        )


def why_no_gpu() -> str:
    """The doctor's line, "no GPU seen: <cause>; try: <command>", or its beginning where it knows none."""
    try:
        from commons.doctor import why_no_gpu as ask_the_doctor

        return ask_the_doctor() or "no GPU seen"
    except Exception:  # a diagnosis must never be what keeps a run from starting
        return "no GPU seen"


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
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


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
    _abilities,
    _torch_version,
    _placement,
    _layout,
    _compile,
    _kernels,
    _fp8,
    _machine,
    _output,
)
