"""What is wrong with a configuration: all of it at once, each with a setting that works.

Adding a check is one generator in CHECKS; adding a range one entry in commons.cli.limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from commons.cli import checkpoints, data, layout, machine, output
from commons.cli.job import Job
from commons.cli.limits import LIMITS, number_problem
from commons.cli.planning import planning
from commons.cli.wording import either, unknown
from commons.config.gpt2_folder import FolderError, look_through
from commons.config.resolved import SHAPE_FLAGS
from commons.config.schema import FRACTIONS, PLACEMENTS, RANDOM_WEIGHTS, TrainConfig, as_typed
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES

if TYPE_CHECKING:
    from commons.plans.registry import Plan

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


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
        config: as the user gave it, not resolved: what is chosen for the user is not held against them.
        world_size: ranks in all; ``local_world_size`` of them on this node (default: all).
        device_type: "cuda" or "cpu", what ``config.device`` came out as.
        gpu_count: GPUs visible here.
        plan: PLANS' entry for ``config.distplan``, None if there is none.
        typed: names of the settings that the user gave, be it with their defaults' values (default: those that differ).
    """
    names = frozenset(name for name in DEFAULTS if getattr(config, name) != DEFAULTS[name]) if typed is None else typed
    by_name = {name: _problem_by_itself(plan, config, name, name in names) for name in DEFAULTS}
    wrong = {name: DEFAULTS[name] for name, problem in by_name.items() if problem}
    # what depends on one of these is judged with the default in its place: no division by zero, no mistake told twice
    given, local_world_size = dataclasses.replace(config, **wrong), local_world_size or world_size
    resolved = given.resolve(device_type, world_size, local_world_size)
    shape = resolved.shape() if resolved.model_type in MODEL_SIZES else None
    typed = frozenset(names) - wrong.keys()
    job = Job(given, resolved, typed, plan, shape, world_size, local_world_size, device_type, gpu_count)
    return [problem for problem in by_name.values() if problem] + [p for check in CHECKS for p in check(job)]


def _problem_by_itself(plan: Plan | None, config: TrainConfig, name: str, typed: bool) -> str | None:
    """The first thing wrong with a setting: nobody reads it, or it is out of its range."""
    value = getattr(config, name)
    range_problem = None if value is None or name not in LIMITS else number_problem(name, value, LIMITS[name])
    if not typed:
        return range_problem
    return (
        _has_no_effect(plan, name, value)
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
        f"--{name} {value:g} contradicts --placement {config.placement}, which {fixed}: remove it, or use"
        " --placement static"
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


def _has_no_effect(plan: Plan | None, name: str, value: Any) -> str | None:
    """The problem with a setting that ``plan`` does not have, None if it has it."""
    ability = next((ability for ability, names in ABILITIES.items() if name in names), None)
    if plan is None or ability is None or getattr(plan, ability) or NEUTRAL.get(name) == value:
        return None
    able = [other.name for other in PLANS.values() if getattr(other, ability)]
    return f"--{name} {as_typed(value)} has no effect with {plan.name}: remove it, or use --distplan {either(able)}"


# Settings that are read under one value of another setting only.
READ_UNDER = {
    "warmup_non_model_data_ratio": ("placement", "auto"),
    "steady_cuda_cap_ratio": ("placement", "auto"),
    "initial_loss_scale": ("precision", "fp16"),
    "auto_minutes": ("auto", True),
}


def _is_not_read(config: TrainConfig, name: str, in_range: bool) -> str | None:
    if name not in READ_UNDER:
        return None
    other, wanted = READ_UNDER[name]
    if getattr(config, other) == wanted:
        return None
    change = f", or use --{other} {as_typed(wanted)}" if in_range else ""
    return f"--{name} is read under --{other} {as_typed(wanted)} only: remove it{change}"


def _names(job: Job) -> Iterator[str]:
    if job.plan is None:
        yield unknown("distplan", job.config.distplan, PLANS)
    if job.shape is None:
        yield unknown("model_type", job.config.model_type, MODEL_SIZES)


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


def _precisions(job: Job) -> Iterator[str]:
    """A precision that the plan does not have."""
    if job.plan is None:
        return
    if job.config.precision not in job.plan.precisions:
        able = [plan.name for plan in PLANS.values() if job.config.precision in plan.precisions]
        here = [name for name in job.plan.precisions if name != "fp8" or job.device_type == "cuda"]
        yield (
            f"{job.plan.name} cannot train in --precision {job.config.precision}: use --precision"
            f" {either(here)}, or --distplan {either(able)}"
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


def _initial_weights(job: Job) -> Iterator[str]:
    """Whether the model in ``--init_from`` is there whole, and the one that is to be trained."""
    config = job.config
    if config.init_from == RANDOM_WEIGHTS:
        return
    try:
        held = look_through(config.init_from).shape
    except FolderError as error:
        yield from (f"--init_from: {problem}" for problem in error.problems)
        return
    differing = {flag: field for field, flag in SHAPE_FLAGS.items() if getattr(held, field) != getattr(config, flag)}
    if job.shape is not None and differing:
        told = ", ".join(f"--{flag} {getattr(held, field)}" for flag, field in differing.items())
        asked = ", ".join(str(getattr(config, flag)) for flag in differing)
        yield (
            f"--init_from {config.init_from} holds a model with {told}, not {asked}: remove --model_type and these, so"
            " that its size is taken"
        )


CHECKS: tuple[Callable[[Job], Iterable[str]], ...] = (
    _names,
    _initial_weights,
    _steps,
    data.settings,
    data.corpus,
    layout.sequence,
    layout.heads,
    layout.widths,
    layout.pipeline,
    _precisions,
    machine.packages,
    _placement,
    layout.ranks,
    machine.compile,
    machine.cuda_graph,
    machine.peer_copies,
    machine.kernels,
    machine.fp8,
    machine.gpus,
    planning,
    output.output,
    checkpoints.saving,
    checkpoints.resuming,
)
