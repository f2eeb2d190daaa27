"""What a run that is out of memory can be started with instead: complete commands, each judged as if it had been typed,
and what else its shortage shows.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from commons.cli.flags import CommandLine, judge
from commons.config.resolved import ResolvedConfig
from commons.config.schema import FRACTIONS, TrainConfig, as_words
from commons.doctor.host import TAKE_LESS, more_memory
from commons.doctor.machine import Machine
from commons.lifecycle.host_memory import memory_sizes
from commons.lifecycle.job import JobPlace, read_job
from commons.lifecycle.memory_shortage import GPU, PINNED, SUMMARY_KEY, Shortage, in_words, shortage_of
from commons.lifecycle.outcome import Ended
from commons.plans.registry import MODEL_STATES, PLANS
from model_zoo import MODEL_SIZES, parameter_count

MOST_COMMANDS = 3
WORTH_TELLING = 0.02  # of a GPU, held by other processes
# in these the model's states are made; in all others it is activations that come and go
BUILDING = ("start", "join", "build", "optimizer")
OFFLOADED_BYTES = 16  # per parameter: weights, gradients, master weights and Adam's states


@dataclass(frozen=True)
class Change:
    """Settings that take less memory.

    Attributes:
        settings: by name; None takes back what the user gave.
        why: a few words for the end of the command's line.
    """

    settings: Mapping[str, Any]
    why: str


@dataclass(frozen=True)
class Start:
    """How the run was started.

    Attributes:
        command: as it begins.
        world_size, local_world_size: its ranks, and those of this machine.
    """

    command: str
    world_size: int
    local_world_size: int


def with_advice(config: ResolvedConfig, ended: Ended, start: Start | None = None) -> tuple[Ended, list[str]]:
    """What summary.json is to have of a run that is out of memory, with the commands; and what the user is told after
    the sentence. Any other end as it is.

    Args:
        start: default: by this rank's place in its job.
    """
    lack = shortage_of(ended)
    if lack is None:
        return ended, []
    commands = dict(_commands(config, lack, start or _start_of(read_job())))
    found = {**ended.details[SUMMARY_KEY], "commands": list(commands)}
    lines = [f"  {command}   # {why}" for command, why in commands.items()]
    told = [*(["Try, in this order:"] if lines else []), *lines, *_hints(lack)]
    return dataclasses.replace(ended, details={**ended.details, SUMMARY_KEY: found}), told


# ---- what takes less


def changes(config: ResolvedConfig, lack: Shortage, start: Start) -> Iterator[Change]:
    """Most useful first, by rules of thumb; the planner's answer is to take this function's place."""
    if lack.memory == PINNED or (lack.memory != GPU and config.device == "cuda"):
        yield from _less_on_the_host(config)
        return
    activations, states = _less_activations(config), _less_states(config, lack, start)
    yield from (*states, *activations) if lack.phase in BUILDING else (*activations, *states)


def _less_activations(config: ResolvedConfig) -> Iterator[Change]:
    batch, sequences = config.batch_size, config.batch_size * config.grad_accum
    half = {"batch_size": batch // 2, "grad_accum": sequences // max(1, batch // 2)}
    if batch % 2 == 0:
        yield Change(half, "the same global batch in pieces of half the size")
    checkpoints = {"activation_checkpointing": "on"}
    if config.activation_checkpointing != "on":
        yield Change(checkpoints, "the least activations, a third more work")
    if batch > 1:
        yield Change(
            {"batch_size": 1, "grad_accum": sequences, **checkpoints}, "both, in the smallest pieces there are"
        )


def _less_states(config: ResolvedConfig, lack: Shortage, start: Start) -> Iterator[Change]:
    if start.world_size > 1 and PLANS[config.distplan].sharded != MODEL_STATES and config.model_parallel_size == 1:
        yield Change({"distplan": "CAI_Gemini"}, "parameters, gradients and optimizer states sharded over the ranks")
    on_device = config.distplan != "CAI_Gemini" or (config.offload_optim_frac < 1 and config.placement != "auto")
    if lack.memory == GPU and on_device and _host_has_room(config, start):
        settings = {"distplan": "CAI_Gemini", "placement": "cpu", **dict.fromkeys(FRACTIONS)}
        yield Change(settings, "parameters and optimizer states in host memory between uses")
    yield from _smaller_model(config)


def _host_has_room(config: ResolvedConfig, start: Start) -> bool:
    """For the states of this machine's ranks, as far as it is free now."""
    free = memory_sizes().get("MemAvailable", 0)
    copies = config.data_parallel_size(start.world_size) * config.model_parallel_size
    return OFFLOADED_BYTES * parameter_count(config.shape()) * start.local_world_size / max(1, copies) < free


def _less_on_the_host(config: ResolvedConfig) -> Iterator[Change]:
    if config.distplan == "CAI_Gemini":
        on_gpu = {**dict.fromkeys(FRACTIONS), "placement": "cuda"}
        if config.placement == "auto":
            yield Change({"placement": "const"}, "half of the optimizer states on the host")
        elif config.offload_param_frac > 0:
            yield Change({**on_gpu, "placement": "static", "offload_optim_frac": 1.0}, "parameters on the GPU")
        if config.offload_optim_frac > 0.5:
            yield Change({**on_gpu, "placement": "const"}, "half of the optimizer states on the host")
        if config.offload_optim_frac > 0 or config.placement == "auto":
            yield Change(on_gpu, "nothing on the host, if the GPU has room")
    yield from _smaller_model(config)


def _smaller_model(config: ResolvedConfig) -> Iterator[Change]:
    if any(config.asked(name) for name in ("num_layers", "hidden_size", "num_heads")):
        if config.num_layers > 1:
            yield Change({"num_layers": config.num_layers // 2}, "half the blocks")
        return
    present = parameter_count(config.shape())
    sizes = {name: parameter_count(shape) for name, shape in MODEL_SIZES.items()}
    if smaller := [name for name, count in sizes.items() if count < present]:
        yield Change({"model_type": max(smaller, key=sizes.__getitem__)}, "a smaller model")


# ---- as commands


def _commands(config: ResolvedConfig, lack: Shortage, start: Start) -> Iterator[tuple[str, str]]:
    """Of the changes, the first that make a command nothing is wrong with; each with its reason."""
    given, left = given_settings(config), MOST_COMMANDS
    for change in changes(config, lack, start):
        settings = {name: value for name, value in {**given, **change.settings}.items() if value is not None}
        _, problems = judge(CommandLine(settings, []), start.world_size, start.local_world_size)
        if not problems and left:
            left -= 1
            yield f"{start.command} {shlex.join(as_words(settings))}".rstrip(), change.why


def given_settings(config: ResolvedConfig) -> dict[str, Any]:
    """What has to be on a command line for the same run in a folder of its own."""
    plain, values = TrainConfig().as_dict(), config.as_dict()
    del values["run_name"]
    return {name: value for name, value in values.items() if config.asked(name) and value != plain[name]}


def _start_of(job: JobPlace) -> Start:
    command = "[started as before] train_gpt_demo.py"
    if job.world_size == 1:
        command = "python train_gpt_demo.py"
    elif job.run_id and job.local_world_size == job.world_size:
        command = f"torchrun --standalone --nproc_per_node {job.world_size} train_gpt_demo.py"
    return Start(command, job.world_size, job.local_world_size)


# ---- and what is no setting


def _hints(lack: Shortage) -> Iterator[str]:
    if lack.others_bytes and lack.others_bytes > WORTH_TELLING * (lack.total_bytes or 0):
        yield f"{in_words(lack.others_bytes)} of this GPU are held by other processes: nvidia-smi lists them."
    if lack.limit.startswith("ulimit"):
        yield f"{lack.limit} sets the limit: `{lack.limit} unlimited` takes it away."
    elif lack.memory != GPU:
        more = more_memory(Machine())
        if more != TAKE_LESS:
            yield f"Or more memory for it: {more.splitlines()[0]}"
