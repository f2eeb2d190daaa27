"""Gemini with one hook a region of the model instead of one an operation, so that a region can be compiled.

Gemini has to know when a parameter is needed and when no longer. Colossal-AI finds out through
``__torch_function__`` of every operation that a parameter takes part in: some twenty interruptions a block,
each way, which keep a GPU waiting and which ``torch.compile`` cannot see through. Here the model is run as
regions: embedding, each block, and final norm with head and loss. Before a region its chunks are gathered and
after it they are released, once each way, and in between runs a pure function of plain tensors. Its gradients
are written into the chunks together, when the last one of a chunk is there.

``ColoParamOpHookManager``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/tensor/param_op_hook.py
``GeminiZeROHook``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_hook.py
``GeminiDDP.grad_handle``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_ddp.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import Chunk, TensorState
from colossalai.zero.gemini.gemini_ddp import GeminiDDP
from torch import nn

from commons.config.resolved import ResolvedConfig
from commons.lifecycle.notices import say
from commons.model.compile import CompiledFunction, announced, functions_for
from commons.model.cuda_graph import join
from commons.model.gpt2 import (
    BLOCK_PARAMETERS,
    EMBEDDING_PARAMETERS,
    HEAD_PARAMETERS,
    GPT2Functions,
    attention_backend,
)
from commons.plans.colossal.chunk_memory import mean_or_sum

# Tokens whose backward pass through the whole model takes as long as all averages and a third more: 25 and 19 ms for
# gpt2_xl on two H100s. A copy takes 0.09 ms, but each mean waits until a matrix product leaves the multiprocessors.
AVERAGED_BESIDE = 2048
SLEEPING_LINK = 64e9  # bytes a second: PCIe 5.0 has fewer, NVLink of every GPU with bf16 has more

# ColoParameter answers every operation, even a look at its .grad, in Python; nothing here needs to hear of it
plain_tensors = torch._C.DisableTorchFunctionSubclass


def _accelerator() -> Any:
    """Colossal-AI's, whose annotations promise less than it has."""
    return get_accelerator()


class ChunkGradients:
    """Collects gradients of parameters and hands each chunk all of its own at once.

    A chunk gets its gradients in the memory that holds its parameters (or, under accumulation, in a second
    chunk), so none may
    be written before the last region that reads them is through: the embedding serves two, and a chunk may
    reach over two blocks.

    Chunks that stay whole (commons.plans.colossal.peer_chunks) can wait for their average without taking memory. They
    do, so
    that what goes between GPUs goes at one time, the end of the backward pass: NVLink sleeps when it rests for 50 ms,
    and awake it takes power from the matrix products (benchmarks.links). Slower links need all the time there is.

    Args:
        gemini: the wrapped model.
        uses: how many gradients each chunk will be given in one backward pass: one a parameter and region.
    """

    def __init__(self, gemini: GeminiDDP, uses: dict[Chunk, int]) -> None:
        self._gemini = gemini
        self._manager = gemini.chunk_manager
        self._uses = uses
        self._missing = dict(uses)
        self._gradients: dict[int, torch.Tensor] = {}
        self._slices: dict[Chunk, list[torch.Tensor]] = {}
        self._reductions = {chunk: mean_or_sum(chunk) for chunk in uses}
        # only fp16 looks for infinities, and each look is a pass over all gradients
        self._checks_overflow = gemini.mixed_precision is torch.float16
        chunks: list[Any] = [*uses]
        self._can_wait = self._manager.reuse_fp16_chunk and all(
            chunk.replicated and chunk.copies.link_rate > SLEEPING_LINK for chunk in chunks
        )
        self._waiting: list[tuple[Chunk, Chunk]] = []
        self._waits = self._delivered = 0

    def begin(self, tokens: int) -> None:
        """A pass over ``tokens`` of this rank begins."""
        self._delivered = 0
        self._waits = int(len(self._uses) * (1 - AVERAGED_BESIDE / tokens)) if self._can_wait else 0

    def add(
        self, parameters: Iterable[torch.Tensor], gradients: Iterable[torch.Tensor], chunks: dict[Chunk, int]
    ) -> None:
        """Take one region's gradients; reduce the chunks that are complete with them.

        Args:
            chunks: the region's chunks, which are gathered, and how many of its parameters each holds.
        """
        for parameter, gradient in zip(parameters, gradients, strict=True):
            earlier = self._gradients.setdefault(id(parameter), gradient)
            if earlier is not gradient:
                earlier.add_(gradient)
        for chunk, count in chunks.items():
            self._missing[chunk] -= count
            if self._missing[chunk] == 0:
                self._missing[chunk] = self._uses[chunk]
                self._deliver(chunk)

    def _deliver(self, chunk: Chunk) -> None:
        gradients = []
        for parameter in chunk.tensors_info:
            parameter._gemini_reduced = True  # pyright: ignore  (GeminiDDP's check after the backward pass asks for it)
            gradients.append(self._gradients.pop(id(parameter)))
        target = chunk
        if not self._manager.reuse_fp16_chunk:
            target = self._accumulator(chunk)
            set_state(chunk, TensorState.HOLD)
        if self._manager.accumulating_grads:
            torch._foreach_add_(self._slices_of(target), gradients)
        else:
            torch._foreach_copy_(self._slices_of(target), gradients)
        set_state(target, TensorState.READY_FOR_REDUCE)
        self._waiting.append((chunk, target))
        self._delivered += 1
        if self._delivered > self._waits:
            for ready in self._waiting:
                self._reduce(*ready)
            self._waiting.clear()

    def _accumulator(self, chunk: Chunk) -> Chunk:
        """The second chunk that gradients are accumulated in, gathered."""
        if not self._manager.accumulating_grads:
            return self._manager.init_grad_chunk(chunk)
        return self._manager.rearrange_accumulated_grad_chunk(chunk)

    def _slices_of(self, chunk: Chunk) -> list[torch.Tensor]:
        """The chunk's memory as tensors of its parameters' shapes. They stay valid: chunks free and refill
        one storage.
        """
        whole: Any = chunk.cuda_global_chunk
        if chunk not in self._slices:
            self._slices[chunk] = [
                whole[info.offset : info.end].view(parameter.shape) for parameter, info in chunk.tensors_info.items()
            ]
        return self._slices[chunk]

    def _reduce(self, chunk: Chunk, target: Chunk) -> None:
        """Average ``target``, the gradients of ``chunk``, over the ranks, beside the computation where there
        is a stream for it.
        """
        gemini, manager = self._gemini, self._manager
        stream = gemini.async_reduce_stream
        device = gemini.grads_device[next(iter(chunk.tensors_info))]
        if chunk.pg_size == 1 and device.type != "cpu":
            stream = None  # nothing is sent
        if stream is not None:
            stream.wait_stream(_accelerator().current_stream())
        with _accelerator().stream(stream):
            target.reduction = self._reductions[chunk]  # pyright: ignore[reportAttributeAccessIssue]
            target.copies = chunk.copies  # pyright: ignore[reportAttributeAccessIssue]
            manager.reduce_chunk(target, async_op=stream is not None)
            target.wait_async_reduce()
            # without labels upstream's hooks divide the sum themselves
            target.reduction = dist.ReduceOp.SUM  # pyright: ignore[reportAttributeAccessIssue]
            if target is not chunk:
                manager.release_chunk(chunk)
            if chunk.pg_size > 1 and self._reductions[chunk] == dist.ReduceOp.SUM:
                target.payload.div_(chunk.pg_size)
            if self._checks_overflow:
                manager.overflow_counter += target.has_inf_or_nan
            if chunk.l2_norm_flag:
                target.l2_norm = squared_norm(target)
            for moved in (target, *([chunk] if gemini.enable_gradient_accumulation else [])):
                manager.move_chunk(moved, device, force_copy=True, async_move=stream is not None)


def squared_norm(chunk: Chunk) -> torch.Tensor:
    """Sum of squares of this rank's part of a chunk, an fp64 scalar on the device.

    Upstream makes a Python number of it, which waits for the device once a chunk; the optimizer only adds
    them up.
    ``Chunk.set_l2_norm``: https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/chunk.py
    """
    return chunk.payload[: chunk.get_valid_length()].float().norm(2).double().square()


def set_state(chunk: Chunk, state: TensorState, infos: Iterable[Any] | None = None) -> None:
    """Put the tensors of ``infos`` (default: all) of one chunk into ``state``, and count them there."""
    counter = chunk.tensor_state_cnter
    previous, count = state, 0
    for info in chunk.tensors_info.values() if infos is None else infos:
        if info.state is not previous:
            # neighbours are in the same state nearly always; looking a state up takes longer than the rest
            counter[previous] -= count
            counter[state] += count
            previous, count = info.state, 0
        info.state = state
        count += 1
    counter[previous] -= count
    counter[state] += count


class Region:
    """A part of the model that Gemini is told of once each way.

    Attributes:
        parameters: in the order of the function's arguments.
        chunks: those that hold the parameters, and how many of them each.
    """

    def __init__(
        self, gemini: GeminiDDP, function: Callable[..., torch.Tensor], parameters: list[torch.Tensor]
    ) -> None:
        self.function, self.parameters = function, parameters
        self._gemini_manager = gemini.gemini_manager
        self._chunk_manager = gemini.chunk_manager
        self._infos: dict[Chunk, list[Any]] = {}
        for parameter in parameters:
            chunk = self._chunk_manager.get_chunk(parameter)
            self._infos.setdefault(chunk, []).append(chunk.tensors_info[parameter])
        self.chunks = {chunk: len(infos) for chunk, infos in self._infos.items()}
        self._ordered = tuple(self._infos)

    def rehearse(self, arguments: tuple[torch.Tensor, ...]) -> None:
        """Call the function on ``arguments`` and parameters of zeros, forward and backward."""
        leaves = [item.requires_grad_() for item in arguments if item.is_floating_point()]
        leaves += [torch.zeros_like(parameter, requires_grad=True) for parameter in self.parameters]
        out = self.function(*arguments, *leaves[-len(self.parameters) :])
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def gather(self) -> None:
        """Make the parameters usable: ``GeminiZeROHook.pre_op``, with the states of all parameters set
        together.
        """
        gemini, chunks = self._gemini_manager, self._chunk_manager
        missing = gemini.wait_chunks(self._ordered)
        self._set_states(TensorState.COMPUTE)
        gemini.sample_overall_data()
        gemini.adjust_layout(self._ordered, record_anyway=gemini.placement_policy.max_prefetch > 0)
        for chunk in missing:
            chunks.access_chunk(chunk)
        self._prefetch()
        gemini.record_model_data_volume()

    def _prefetch(self) -> None:
        """Start to gather the chunks of the regions to come."""
        gemini, chunks = self._gemini_manager, self._chunk_manager
        stream = chunks._prefetch_stream
        if stream is None:
            return
        upcoming = gemini.placement_policy.get_prefetch_chunks(
            is_warmup=gemini.is_warmup(),
            compute_list=gemini.compute_list,  # pyright: ignore[reportArgumentType]
            compute_idx=gemini.compute_idx,
            async_works=gemini.async_works,
        )
        if not upcoming:
            return
        # what is gathered may still be written by the optimizer
        stream.wait_stream(_accelerator().current_stream())
        with _accelerator().stream(stream):
            for chunk in upcoming:
                work = chunks.access_chunk(chunk, async_access=True)
                if work is not None:
                    gemini.add_work(chunk, work)

    def release(self, backward: bool) -> None:
        """Tell that the parameters are not needed for now: ``GeminiZeROHook.post_op``."""
        self._set_states(TensorState.HOLD_AFTER_BWD if backward else TensorState.HOLD)

    def _set_states(self, state: TensorState) -> None:
        for chunk, infos in self._infos.items():
            set_state(chunk, state, infos)


class _RegionCall(torch.autograd.Function):
    """Runs a region's function with a graph of its own inside, so that hooks and gradients are handled once a
    region.

    ``hidden`` is what comes from the region before, or for the first region a scalar that only asks for a
    gradient; ``arguments`` are the function's first arguments, with None as the first to stand for
    ``hidden``.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, arguments: tuple, region: Region, gradients: ChunkGradients
    ) -> torch.Tensor:
        with plain_tensors():
            region.gather()
            leaves = [parameter.detach().requires_grad_() for parameter in region.parameters]
            inner = hidden.detach().requires_grad_()
            with torch.set_grad_enabled(ctx.needs_input_grad[0]):
                head = (inner, *arguments[1:]) if arguments[0] is None else arguments
                out = region.function(*head, *leaves)
            region.release(backward=False)
        ctx.region, ctx.gradients, ctx.out = region, gradients, out
        ctx.inputs = [inner, *leaves] if arguments[0] is None else leaves
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, out_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        region: Region = ctx.region
        with plain_tensors():
            region.gather()
            inner = torch.autograd.grad(ctx.out, ctx.inputs, out_gradient)
            region.release(backward=True)
            parameter_gradients = inner[-len(region.parameters) :]
            hidden_gradient = inner[0] if len(inner) > len(parameter_gradients) else None
            ctx.out = ctx.inputs = None  # the outer graph may live on, its activations must not
            ctx.gradients.add(region.parameters, parameter_gradients, region.chunks)
        return hidden_gradient, None, None, None


class BlockHooks:
    """The regions of one wrapped GPT-2, run in order. Installed by :func:`install_block_hooks`."""

    def __init__(self, gemini: GeminiDDP, functions: GPT2Functions) -> None:
        model: Any = gemini.module

        def region(function: Callable, module: nn.Module, names: Iterable[str]) -> Region:
            return Region(gemini, function, [module.get_parameter(name) for name in names])

        self.embedding = region(functions.embed, model, EMBEDDING_PARAMETERS)
        self.blocks = [region(functions.block, block, BLOCK_PARAMETERS) for block in model.transformer.h]
        self.head = region(functions.loss, model, HEAD_PARAMETERS)
        uses: dict[Chunk, int] = {}
        for each in self.regions:
            for chunk, count in each.chunks.items():
                uses[chunk] = uses.get(chunk, 0) + count
        self.gradients = ChunkGradients(gemini, uses)

    @property
    def regions(self) -> list[Region]:
        return [self.embedding, *self.blocks, self.head]

    def loss(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the next token, fp32 scalar. ``tokens``, ``labels``: int64 [batch, sequence]."""
        start = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        self.gradients.begin(tokens.numel())
        hidden = _RegionCall.apply(start, (tokens,), self.embedding, self.gradients)
        for block in self.blocks:
            hidden = _RegionCall.apply(hidden, (None,), block, self.gradients)
        return _RegionCall.apply(hidden, (None, labels), self.head, self.gradients)

    def warm_up(self, batch_size: int, seq_len: int) -> None:
        """Call every function once, forward and backward, on zeros of the shapes to come, so that compiling
        is done with.

        The regions themselves stay untouched, and no parameter is gathered.
        """
        with plain_tensors():
            some = self.embedding.parameters[0]
            tokens = torch.zeros(batch_size, seq_len, dtype=torch.long, device=_accelerator().get_current_device())
            hidden = torch.zeros(batch_size, seq_len, some.shape[1], dtype=some.dtype, device=tokens.device)
            cases = (self.embedding, (tokens,)), (self.blocks[0], (hidden,)), (self.head, (hidden, tokens))
            for region, arguments in cases:
                try:
                    region.rehearse(arguments)
                except Exception as error:  # of the way back; the way there falls back by itself
                    if not isinstance(region.function, CompiledFunction):
                        raise
                    region.function.fall_back(error)


def install_block_hooks(gemini: GeminiDDP, functions: GPT2Functions) -> BlockHooks:
    """Make a wrapped ``GPT2LMHeadModel`` run as regions whenever it is called with labels.

    Without labels it runs as before, with a hook an operation. Not for tensor parallelism, whose layers
    communicate inside.

    Args:
        gemini: the model as ``Booster.boost`` returns it.
        functions: from ``gpt2_functions``, compiled or not.
    """
    from transformers.modeling_outputs import CausalLMOutput

    model: Any = gemini.module
    hooks = BlockHooks(gemini, functions)
    by_operation = model.forward

    def forward(self: nn.Module, input_ids: Any = None, labels: Any = None, **arguments: Any) -> Any:
        if labels is None:
            return by_operation(input_ids=input_ids, **arguments)
        return CausalLMOutput(loss=hooks.loss(input_ids, labels))  # pyright: ignore[reportArgumentType]

    model.forward = MethodType(forward, model)
    # no parameter ever gets a .grad; looking for it in Python takes milliseconds a step
    model.zero_grad = lambda set_to_none=True: None
    gemini._setup_grads_ptr = lambda: None
    if all(device.type != "cpu" for device in gemini.grads_device.values()):
        _let_the_host_run_ahead(gemini.async_reduce_stream)
    return hooks


def _let_the_host_run_ahead(stream: Any) -> None:
    """After the backward pass let the device wait for the reductions, and not the host too, as upstream does.

    The optimizer's launches then queue up behind the last gradients. An optimizer on the host has to wait itself.
    https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_ddp.py (``_post_backward``)
    """
    stream.synchronize = lambda: join(stream, _accelerator().current_stream())


def run_by_blocks(gemini: GeminiDDP, config: ResolvedConfig, device_type: str) -> BlockHooks | None:
    """Install block hooks, compiled or not, as ``config`` asks; says so where that cannot be.

    Returns:
        The hooks; None where Gemini keeps its hook an operation.
    """
    if config.gemini_hooks == "operation":
        return None
    if config.tp_degree > 1:
        say("tensor parallelism communicates inside of blocks: Gemini runs with a hook an operation, uncompiled")
        return None
    hooks = install_block_hooks(gemini, functions_for(config, device_type))
    if config.compile == "on":
        with announced("the model's blocks, embedding and loss"), attention_backend(config.attention):
            hooks.warm_up(config.batch_size, config.seq_len)
    return hooks
