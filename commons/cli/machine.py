"""Checks of what this machine, its packages and its kernels can do."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.version import Version

from commons.cli.job import Job
from commons.cli.layout import smaller_degrees, working_head_counts, works
from commons.cli.wording import count, either
from commons.config.auto import compile_problem, graph_problems, peer_problems
from commons.config.resolved import ResolvedConfig
from commons.ops import capability
from commons.plans.colossal.imports import check_version
from commons.plans.registry import PLANS

MAX_GPU_HEAD_DIM = 256  # of torch's flash kernel


DOCTOR = "bash run_gemini.sh --doctor"


def packages(job: Job) -> Iterator[str]:
    """What the plan needs and is not installed, or too old."""
    yield from _colossalai(job)
    yield from _torch_version(job)


def _colossalai(job: Job) -> Iterator[str]:
    if job.plan is None or not job.plan.name.startswith("CAI_"):
        return
    try:
        check_version()
    except RuntimeError as error:
        others = either(name for name in PLANS if not name.startswith("CAI_"))
        yield f"--distplan {job.plan.name}: {error}; or use --distplan {others}"


def _torch_version(job: Job) -> Iterator[str]:
    oldest = None if job.plan is None or job.device_type != "cpu" else job.plan.cpu_torch
    installed = importlib.metadata.version("torch")
    if oldest is not None and Version(installed) < Version(oldest):
        yield (
            f"--distplan {job.config.distplan} runs on a CPU with torch {oldest} or newer, this is {installed}: use"
            " another --distplan, a GPU, or a newer torch"
        )


def compile(job: Job) -> Iterator[str]:
    """What ``--compile on`` cannot do; "auto" leaves it out by itself."""
    config = job.config
    if config.compile != "on":
        return
    if config.model_parallel_size > 1:
        yield (
            "--compile on takes whole blocks, and --tp_degree and --pp_degree split them: remove it, or"
            " use --tp_degree 1 --pp_degree 1"
        )
    elif config.gemini_hooks == "operation" and config.distplan == "CAI_Gemini":
        yield ("--compile on cannot see through --gemini_hooks operation: use --gemini_hooks block, or --compile off")
    elif job.plan is not None and job.plan.pipeline:
        yield f"--compile on has no effect with {job.plan.name}: remove it, or use another --distplan"
    problem = compile_problem(job.device_type)
    if problem:
        yield f"--compile on: {problem}; or use --compile off"


def cuda_graph(job: Job) -> Iterator[str]:
    """What ``--cuda_graph on`` cannot do; "auto" leaves it out by itself."""
    if job.config.cuda_graph != "on":
        return
    copies = job.config.peer_copies == "on" and not any(_without_peer_copies(job))
    for problem in graph_problems(job.config, job.device_type, job.world_size, copies):
        yield f"--cuda_graph on captures nothing {problem}: use --cuda_graph off"


def peer_copies(job: Job) -> Iterator[str]:
    """What ``--peer_copies on`` cannot do; "auto" leaves it out by itself."""
    if job.config.peer_copies == "on":
        for problem in _without_peer_copies(job):
            yield f"--peer_copies on gathers nothing {problem}: use --peer_copies off"


def _without_peer_copies(job: Job) -> Iterator[str]:
    return peer_problems(job.config, job.world_size, job.local_world_size)


def kernels(job: Job) -> Iterator[str]:
    config = job.config
    if config.sequence_parallel == "on" and config.tp_degree == 1:
        two_parts = "use --tp_degree 2, or " if works(job, tp_degree=2) else ""
        yield f"--sequence_parallel on needs tensor parallelism: {two_parts}remove it"
    if config.activation_checkpointing == "selective" and config.tp_degree > 1:
        yield (
            "--activation_checkpointing selective would keep results that --tp_degree above 1 adds up in place, and add"
            " them up twice: use --activation_checkpointing on, or off"
        )
    if config.check_parity and config.dropout > 0:
        yield "--check_parity needs a run without chance: use --dropout 0, or remove it"
    if config.attention != "flash":
        return
    if job.device_type == "cpu" and config.dropout > 0:
        yield "--attention flash has no dropout on a CPU: use --dropout 0, or --attention sdpa"
    if job.device_type == "cuda" and job.gpu_count and capability.is_older(capability.AMPERE):
        yield "--attention flash needs an A100, RTX 30 or newer: use --attention sdpa"
    if job.device_type == "cuda" and config.precision == "fp32":
        yield "--attention flash has no fp32 on a GPU: use --precision bf16, or --attention sdpa"
    if job.shape is not None and job.device_type == "cuda" and job.shape.head_dim > MAX_GPU_HEAD_DIM:
        yield (
            f"--attention flash takes heads of at most {MAX_GPU_HEAD_DIM}, got {job.shape.head_dim}:"
            f" use --num_heads {either(working_head_counts(job.shape, config.tp_degree))}, or --attention"
            " sdpa"
        )


def fp8(job: Job) -> Iterator[str]:
    """Where ``--precision fp8`` has no kernels: on other devices, under hooks per operation, for odd sizes."""
    config, shape = job.config, job.shape
    if config.precision != "fp8" or job.plan is None or "fp8" not in job.plan.precisions:
        return
    from commons.ops.fp8 import FIRST_CAPABILITY, MULTIPLE  # imports torch, which takes seconds

    instead = "use --precision bf16"
    if job.device_type != "cuda":
        yield f"--precision fp8 needs a GPU that has it (RTX 40, L40S, H100 or newer), not a CPU: {instead}"
    elif job.gpu_count:
        import torch

        if capability.is_older(FIRST_CAPABILITY):
            name = torch.cuda.get_device_name()
            yield f"--precision fp8 needs a GPU that has it (RTX 40, L40S, H100 or newer), not {name}: {instead}"
    if config.tp_degree > 1 or config.gemini_hooks == "operation":
        yield f"--precision fp8 takes whole blocks: use --tp_degree 1 and --gemini_hooks block, or {instead}"
    tokens = config.batch_size * config.seq_len
    for what, size in (("--hidden_size", shape.hidden if shape else 0), ("--batch_size x --seq_len", tokens)):
        if size % MULTIPLE:
            fits = (size // MULTIPLE + 1) * MULTIPLE
            yield f"--precision fp8 needs a {what} that is a multiple of {MULTIPLE}, got {size}: use {fits}"


def gpus(job: Job) -> Iterator[str]:
    if job.device_type != "cuda":
        return
    if job.gpu_count == 0:
        cause, cure = why_no_gpu()
        because = f" ({cause})" if cause else ""
        yield f"--device cuda needs a GPU, and none is seen{because}: use --device cpu, or run {cure or DOCTOR}"
    elif job.local_world_size > job.gpu_count:
        yield (
            f"{job.local_world_size} ranks on this machine, but {count(job.gpu_count, 'visible GPU')}:"
            f" use {_fewer_ranks(job)}, or --device cpu"
        )


def _fewer_ranks(job: Job) -> str:
    """As many ranks as the GPUs are and the degrees allow; where they are too few for one copy, smaller degrees too."""
    nodes, counts = job.node_count, range(job.gpu_count, 0, -1)
    number = next((count for count in counts if nodes * count % job.config.model_parallel_size == 0), None)
    if number is None:
        return f"GPUNUM={job.gpu_count} {smaller_degrees(job, nodes * job.gpu_count)}"
    return f"GPUNUM={number} (torchrun --nproc_per_node {number})"


def no_gpu_notice(config: ResolvedConfig, world_size: int) -> str:
    """Why a run that may choose trains on the CPU. The command that cures it has a line of its own, to be copied."""
    cause, cure = why_no_gpu()
    end = f"; try:\n    {cure}\n" if cure else ". "
    return (
        f"No GPU seen{cause and f': {cause}'}{end}Training {config.model_type} on {count(world_size, 'CPU rank')} with"
        " gloo instead; more in docs/troubleshooting.md and from: bash run_gemini.sh --doctor"
    )


def why_no_gpu() -> tuple[str, str]:
    """The doctor's cause and the command that cures it, each empty where it knows none."""
    try:
        from commons.doctor import why_no_gpu as ask_the_doctor

        return ask_the_doctor()
    except Exception:  # a diagnosis must never be what keeps a run from starting
        return "", ""
