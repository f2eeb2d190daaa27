"""What a plan keeps between two steps: parameters, gradients, master weights and optimizer states of one rank, tensor
by tensor, from the rules by which the plan itself cuts them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from commons.config.resolved import ResolvedConfig
from commons.distributed.layout import place
from commons.distributed.peer_copies import ALIGNED_ELEMENTS, SLOTS
from commons.plans.colossal.chunks import Cut, chunk_configuration, cut_into_chunks, first_that_fit
from model_zoo import ModelShape

FP32, MASTER, MOMENTS = 4, 4, 2
ITEM_BYTES = {"bf16": 2, "fp8": 2, "fp16": 2, "fp32": 4}
# What commons.distributed.peer_memory shares beside: six flags of every pair, and the pages of its trial.
FLAGS, FLAG_BYTES, TRIAL_BYTES = 6, 4, 1 << 20


class Parameter(NamedTuple):
    """One tensor of one rank.

    Attributes:
        block: number of its transformer block; None outside of them.
    """

    name: str
    shape: tuple[int, ...]
    block: int | None = None

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


class Held(NamedTuple):
    """A tensor that a rank keeps.

    Attributes:
        kind: one of commons.planner.memory's.
        place: "device", "host", "pinned" (on the host too) or "shared" (memory that ranks read from each other).
        nbytes: what it was asked for with, before any allocator rounds it up.
    """

    kind: str
    place: str
    nbytes: int


def block_parameters(hidden: int, tp: int = 1, block: int | None = 0) -> list[Parameter]:
    """One block's, of one tensor-parallel rank, in the module's order."""
    wide, inner = 3 * hidden // tp, 4 * hidden // tp
    shapes = {
        "ln_1.weight": (hidden,),
        "ln_1.bias": (hidden,),
        "attn.c_attn.weight": (hidden, wide),
        "attn.c_attn.bias": (wide,),
        "attn.c_proj.weight": (hidden // tp, hidden),
        "attn.c_proj.bias": (hidden,),
        "ln_2.weight": (hidden,),
        "ln_2.bias": (hidden,),
        "mlp.c_fc.weight": (hidden, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, hidden),
        "mlp.c_proj.bias": (hidden,),
    }
    return [Parameter(f"transformer.h.{block}.{name}", shape, block) for name, shape in shapes.items()]


def model_parameters(shape: ModelShape, tp: int = 1, blocks: Iterable[int] | None = None) -> list[Parameter]:
    """All parameters of one tensor-parallel rank in the module's order, the tied head once.

    Args:
        blocks: which of the blocks (default: all).
    """
    hidden = shape.hidden
    inside = [
        parameter
        for block in (range(shape.layers) if blocks is None else blocks)
        for parameter in block_parameters(hidden, tp, block)
    ]
    return [
        Parameter("transformer.wte.weight", (shape.padded_vocab // tp, hidden)),
        Parameter("transformer.wpe.weight", (shape.positions, hidden)),
        *inside,
        Parameter("transformer.ln_f.weight", (hidden,)),
        Parameter("transformer.ln_f.bias", (hidden,)),
    ]


# --- Gemini ---------------------------------------------------------------------------------------------------------


class Chunks(NamedTuple):
    """Gemini's chunks of one rank.

    Attributes:
        cuts: in their order; ``parameters`` are what their indices mean.
        offloaded: numbers of the chunks whose gradients and optimizer are on the host.
        waiting: numbers of the chunks whose parameters wait there for their next use.
        zero_size: ranks that share a chunk.
    """

    cuts: list[Cut]
    parameters: list[Parameter]
    offloaded: frozenset[int]
    waiting: frozenset[int]
    zero_size: int

    def of(self, names: Iterable[str]) -> list[int]:
        """Numbers of the chunks that hold these parameters."""
        wanted = set(names)
        return [
            number
            for number, cut in enumerate(self.cuts)
            if any(self.parameters[index].name in wanted for index in cut.tensors)
        ]


def gemini_chunks(config: ResolvedConfig, world_size: int) -> Chunks:
    """The chunks of a run, which are the same on every rank."""
    shape, tp = config.shape(), config.tp_degree
    zero_size = world_size // tp
    everything = model_parameters(shape, tp)
    if config.placement != "auto":  # blocks first, of each the matrices first: commons.plans.colossal.chunks
        inside = [parameter for parameter in everything if parameter.block is not None]
        inside.sort(key=lambda parameter: (parameter.block or 0, -len(parameter.shape)))
        everything = inside + [parameter for parameter in everything if parameter.block is None]
    configuration = chunk_configuration(shape, zero_size, tp, config.blocks_per_chunk)
    cuts = cut_into_chunks([p.elements for p in everything], configuration[zero_size]["chunk_size"], zero_size)
    sizes, numbers = [cut.size for cut in cuts], list(range(len(cuts)))
    optimizer, weights = config.offload_optim_frac, config.offload_param_frac
    if config.placement == "auto":
        optimizer, weights = 1.0, 0.0
    return Chunks(
        cuts,
        everything,
        frozenset(first_that_fit(numbers, sizes, sum(sizes) * optimizer)),
        frozenset(first_that_fit(numbers, sizes, sum(sizes) * weights)),
        zero_size,
    )


def _runs(chunks: Chunks, cut: Cut, rank: int) -> list[int]:
    """Elements of the runs of memory that a rank updates in one chunk; see commons.plans.colossal.chunk_adam."""
    part = cut.size // chunks.zero_size
    begin, end = part * rank, part * (rank + 1)
    runs: list[int] = []
    at, decays = 0, None
    for index in cut.tensors:
        parameter = chunks.parameters[index]
        length = min(at + parameter.elements, end) - max(at, begin)
        at += parameter.elements
        if length <= 0:
            continue
        if decays == (len(parameter.shape) >= 2):
            runs[-1] += length
        else:
            runs.append(length)
        decays = len(parameter.shape) >= 2
    return runs


def gemini(config: ResolvedConfig, world_size: int, rank: int, *, copies: bool) -> list[Held]:
    """Gemini's states between steps. ``copies``: parts lie where other ranks read them (commons.plans.colossal.
    peer_chunks).
    """
    chunks = gemini_chunks(config, world_size)
    pins = config.device == "cuda" and (config.placement == "auto" or config.offload_optim_frac > 0)
    host = "pinned" if pins else "host"
    held: list[Held] = []
    zero_rank = place(rank, tp_degree=config.tp_degree, pp_degree=1).data
    for number, cut in enumerate(chunks.cuts):
        part = cut.size // chunks.zero_size
        away = number in chunks.offloaded
        # an offloaded optimizer leaves the new weights where it wrote them, on the host
        parameters = "shared" if copies else host if away else "device"
        if not copies:
            held.append(Held("parameters", parameters, 2 * part))
        if config.grad_accum > 1:
            held.append(Held("gradients", "host" if away else "device", 2 * part))
        held.append(Held("master weights", host if away else "device", MASTER * part))
        moments = [
            Held("optimizer states", "host" if away else "device", FP32 * run) for run in _runs(chunks, cut, zero_rank)
        ]
        held += moments * MOMENTS
    return held + (_shared(config, chunks) if copies else [])


def _shared(config: ResolvedConfig, chunks: Chunks) -> list[Held]:
    """What commons.distributed.peer_copies takes of memory that ranks share."""

    def aligned(elements: int) -> int:
        return elements + -elements % ALIGNED_ELEMENTS

    ranks = chunks.zero_size
    parts = [cut.size // ranks for cut in chunks.cuts]
    replicated = config.shard_param_frac == 0
    weights = sum(aligned(part * (ranks if replicated else 1)) for part in parts)
    inboxes = SLOTS * (ranks - 1) * aligned(max(parts))
    pages = FLAGS * ranks * FLAG_BYTES
    if config.device == "cuda":
        pages += ranks * TRIAL_BYTES
    return [
        Held("parameters", "shared", 2 * weights),
        Held("inboxes", "shared", 2 * inboxes),
        Held("inboxes", "shared", pages),
    ]


# --- the others -----------------------------------------------------------------------------------------------------


def low_level_zero(parameters: Sequence[Parameter], precision: str, size: int) -> list[Held]:
    """ZeRO-1 and ZeRO-2 between steps: working parameters padded to a multiple of the ranks, a rank's part of the fp32
    masters, which fp32 training has too, and of the moments.
    """
    held = []
    for parameter in parameters:
        padded = parameter.elements + -parameter.elements % size
        held.append(Held("parameters", "device", ITEM_BYTES[precision] * padded))
        held.append(Held("master weights", "device", MASTER * (padded // size)))
        held += [Held("optimizer states", "device", FP32 * (padded // size))] * MOMENTS
    return held


def replicated(parameters: Sequence[Parameter], precision: str) -> list[Held]:
    """Everything whole: Colossal-AI's mixed precision without ZeRO; fp32 training has no masters beside."""
    held = []
    for parameter in parameters:
        held.append(Held("parameters", "device", ITEM_BYTES[precision] * parameter.elements))
        if precision != "fp32":
            held.append(Held("master weights", "device", MASTER * parameter.elements))
        held += [Held("optimizer states", "device", FP32 * parameter.elements)] * MOMENTS
    return held


def adamw(elements: Iterable[int]) -> list[Held]:
    """torch's fused AdamW: two moments and a counter for each tensor of so many ``elements``."""
    return [
        Held("optimizer states", "device", size) for count in elements for size in (FP32 * count, FP32 * count, FP32)
    ]


def ddp(parameters: Sequence[Parameter], optimized: Iterable[Parameter]) -> list[Held]:
    """DistributedDataParallel: fp32 parameters, their gradients in buckets that stay, and the states of those that this
    rank updates (all, or its part under ZeroRedundancyOptimizer).
    """
    held = [
        Held(kind, "device", FP32 * parameter.elements)
        for kind in ("parameters", "gradients")
        for parameter in parameters
    ]
    return held + adamw(parameter.elements for parameter in optimized)


@functools.lru_cache(maxsize=8)
def zero_redundancy_parts(parameters: tuple[Parameter, ...], size: int) -> list[list[Parameter]]:
    """The parameters that each rank updates under torch's ZeroRedundancyOptimizer, by its own rule."""
    import torch
    from torch.distributed.optim import ZeroRedundancyOptimizer

    tensors = [torch.nn.Parameter(torch.empty(p.shape, device="meta")) for p in parameters]
    of = dict(zip(map(id, tensors), parameters, strict=True))
    matrices = [tensor for tensor in tensors if tensor.ndim >= 2]
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    asked: Any = object.__new__(ZeroRedundancyOptimizer)  # which a process group would have to be there for
    asked.world_size, asked._partition_parameters_cache = size, []
    asked.param_groups = [{"params": matrices}, {"params": vectors}]
    groups = asked._partition_parameters()
    return [[of[id(tensor)] for group in rank for tensor in group["params"]] for rank in groups]


def fully_sharded(parameters: Sequence[Parameter], size: int, rank: int) -> list[Held]:
    """FSDP2: every parameter is cut along its first dimension into equal parts, the last ones padded; the moments are
    those of the rows that a rank has.
    """
    held, rows_here = [], []
    for parameter in parameters:
        rows = -(-parameter.shape[0] // size)
        width = parameter.elements // parameter.shape[0]
        held.append(Held("parameters", "device", FP32 * rows * width))
        rows_here.append(max(0, min(rows, parameter.shape[0] - rank * rows)) * width)
    return held + adamw(rows_here)


def stage_parameters(config: ResolvedConfig, stage: int) -> list[Parameter]:
    """What one stage of a pipeline holds, of one tensor-parallel rank: its blocks, the embeddings on the first, the
    final norm and the tied table again on the last.
    """
    shape, tp, pp = config.shape(), config.tp_degree, config.pp_degree
    everything = model_parameters(shape, tp, stage_blocks(config, stage))
    table, positions, *inside, weight, bias = everything
    first, last = stage == 0, stage == pp - 1
    return [
        *([table, positions] if first else []),
        *inside,
        *([weight, bias] if last else []),
        *([table] if last and not first else []),
    ]


def stage_blocks(config: ResolvedConfig, stage: int) -> list[int]:
    """The blocks of a stage, by the rule of ``PipelineStageManager.distribute_layers``: what is left over goes to the
    middle.
    https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/pipeline/stage_manager.py
    """
    pieces = config.pp_degree * config.num_model_chunks
    each, rest = divmod(config.shape().layers, pieces)
    first = pieces // 2 - rest // 2
    counts = [each + (rest > 0 and first <= piece < first + rest) for piece in range(pieces)]
    begins = [sum(counts[:piece]) for piece in range(pieces)]
    mine = range(stage, pieces, config.pp_degree)
    return [block for piece in mine for block in range(begins[piece], begins[piece] + counts[piece])]


def states(config: ResolvedConfig, world_size: int, rank: int, *, copies: bool | None = None) -> list[Held]:
    """What ``rank`` keeps between steps.

    Args:
        copies: whether Gemini's ranks reach each other's memory, where that has turned out (default: what
            ``config.peer_copies`` says).
    """
    if config.distplan == "CAI_Gemini":
        return gemini(config, world_size, rank, copies=config.peer_copies == "on" if copies is None else copies)
    if config.distplan == "CAI_Hybrid":
        return hybrid(config, world_size, rank)
    return OTHERS[config.distplan](model_parameters(config.shape()), config, world_size, rank)


def hybrid(config: ResolvedConfig, world_size: int, rank: int) -> list[Held]:
    """One stage of a pipeline and part of every matrix, with ZeRO over the copies."""
    parameters = stage_parameters(config, place(rank, tp_degree=config.tp_degree, pp_degree=config.pp_degree).pipeline)
    size = config.data_parallel_size(world_size)
    if size > 1 and config.zero_stage:
        return low_level_zero(parameters, config.precision, size)
    held = replicated(parameters, config.precision)
    if size > 1 and config.pp_degree == 1:  # which Colossal-AI wraps with DDP: gradients stay in buckets
        held += [Held("gradients", "device", ITEM_BYTES[config.precision] * p.elements) for p in parameters]
    return held


def _zero_redundancy(parameters: Sequence[Parameter], _: ResolvedConfig, size: int, rank: int) -> list[Held]:
    return ddp(parameters, zero_redundancy_parts(tuple(parameters), size)[rank])


OTHERS: dict[str, Callable[[Sequence[Parameter], ResolvedConfig, int, int], list[Held]]] = {
    "CAI_ZeRO1": lambda parameters, config, size, _: low_level_zero(parameters, config.precision, size),
    "CAI_ZeRO2": lambda parameters, config, size, _: low_level_zero(parameters, config.precision, size),
    "Pytorch_DDP": lambda parameters, *_: ddp(parameters, parameters),
    "Pytorch_ZeRO": _zero_redundancy,
    "Pytorch_FSDP": lambda parameters, _, size, rank: fully_sharded(parameters, size, rank),
}
