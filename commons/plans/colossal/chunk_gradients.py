"""Gradients of regions, collected until a chunk has all of its own, then put into it and averaged over the ranks.

``GeminiDDP.grad_handle`` does so for one parameter at a time, whenever autograd has its gradient:
https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/gemini_ddp.py
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import TensorState
from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.plans.colossal.suite_chunk import SuiteChunk

# Tokens whose backward pass through the whole model takes as long as all averages and a third more: 25 and 19 ms for
# gpt2_xl on two H100s. A copy takes 0.09 ms, but each mean waits until a matrix product leaves the multiprocessors.
AVERAGED_BESIDE = 2048
SLEEPING_LINK = 64e9  # bytes per second: PCIe 5.0 has fewer, NVLink of every GPU with bf16 has more


class ChunkGradients:
    """Collects gradients of parameters and hands each chunk all of its own at once.

    A chunk gets its gradients in the memory that holds its parameters (or, under accumulation, in a second
    chunk), so none may be written before the last region that reads them is through: the embedding serves two,
    and a chunk may reach over two blocks.

    Chunks that stay whole (commons.plans.colossal.peer_chunks) can wait for their average without taking memory. They
    do, so that what goes between GPUs goes at one time, the end of the backward pass: NVLink sleeps when it rests for
    50 ms, and awake it takes power from the matrix products (benchmarks.links). Slower links need all the time there
    is.

    Args:
        gemini: the wrapped model.
        uses: how many gradients each chunk will be given in one backward pass: one per parameter and region.
    """

    def __init__(self, gemini: GeminiDDP, uses: dict[SuiteChunk, int]) -> None:
        self._gemini = gemini
        self._manager = gemini.chunk_manager
        self._uses = uses
        self._missing = dict(uses)
        self._gradients: dict[int, torch.Tensor] = {}
        self._slices: dict[SuiteChunk, list[torch.Tensor]] = {}
        self._reductions = {chunk: chunk.mean_or_sum() for chunk in uses}
        # only fp16 looks for infinities, and each look is a pass over all gradients
        self._checks_overflow = gemini.mixed_precision is torch.float16
        self._can_wait = self._manager.reuse_fp16_chunk and all(
            chunk.replicated and chunk.copies is not None and chunk.copies.link_rate > SLEEPING_LINK for chunk in uses
        )
        self._waiting: list[tuple[SuiteChunk, SuiteChunk]] = []
        self._waits = 0
        self._delivered = 0

    def begin(self, tokens: int) -> None:
        """A pass over ``tokens`` of this rank begins."""
        self._delivered = 0
        self._waits = int(len(self._uses) * (1 - AVERAGED_BESIDE / tokens)) if self._can_wait else 0

    def add(
        self, parameters: Iterable[torch.Tensor], gradients: Iterable[torch.Tensor], chunks: dict[SuiteChunk, int]
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
                self.deliver(chunk)

    def deliver(self, chunk: SuiteChunk) -> None:
        """Put a chunk's gradients, which are all there, into its place for them, and reduce it, now or later (see
        :meth:`begin`; collective).
        """
        gradients = []
        for parameter in chunk.tensors_info:
            parameter._gemini_reduced = True  # pyright: ignore  (GeminiDDP's check after the backward pass asks for it)
            gradients.append(self._gradients.pop(id(parameter)))
        target = chunk
        if not self._manager.reuse_fp16_chunk:
            target = self._accumulator(chunk)
            chunk.set_states(TensorState.HOLD)
        if self._manager.accumulating_grads:
            torch._foreach_add_(self._slices_of(target), gradients)
        else:
            torch._foreach_copy_(self._slices_of(target), gradients)
        target.set_states(TensorState.READY_FOR_REDUCE)
        self._waiting.append((chunk, target))
        self._delivered += 1
        if self._delivered > self._waits:
            for ready in self._waiting:
                self._reduce(*ready)
            self._waiting.clear()

    def _accumulator(self, chunk: SuiteChunk) -> SuiteChunk:
        """The second chunk that gradients are accumulated in, gathered."""
        manager: Any = self._manager
        if not manager.accumulating_grads:
            return manager.init_grad_chunk(chunk)
        return manager.rearrange_accumulated_grad_chunk(chunk)

    def _slices_of(self, chunk: SuiteChunk) -> list[torch.Tensor]:
        """The chunk's memory as tensors of its parameters' shapes. They stay valid: chunks free and refill
        one storage.
        """
        whole: Any = chunk.cuda_global_chunk
        if chunk not in self._slices:
            self._slices[chunk] = [
                whole[info.offset : info.end].view(parameter.shape) for parameter, info in chunk.tensors_info.items()
            ]
        return self._slices[chunk]

    def _reduce(self, chunk: SuiteChunk, target: SuiteChunk) -> None:
        """Average ``target``, the gradients of ``chunk``, over the ranks, beside the computation where there
        is a stream for it.
        """
        gemini, manager = self._gemini, self._manager
        accelerator: Any = get_accelerator()
        stream = gemini.async_reduce_stream
        device = gemini.grads_device[next(iter(chunk.tensors_info))]
        if chunk.pg_size == 1 and device.type != "cpu":
            stream = None  # nothing is sent
        if stream is not None:
            stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(stream):
            target.reduction = self._reductions[chunk]
            target.copies = chunk.copies
            manager.reduce_chunk(target, async_op=stream is not None)
            target.wait_async_reduce()
            # without labels upstream's hooks divide the sum themselves
            target.reduction = dist.ReduceOp.SUM
            if target is not chunk:
                manager.release_chunk(chunk)
            if chunk.pg_size > 1 and self._reductions[chunk] == dist.ReduceOp.SUM:
                target.payload.div_(chunk.pg_size)
            if self._checks_overflow:
                manager.overflow_counter += target.has_inf_or_nan
            if chunk.l2_norm_flag:
                target.set_l2_norm()
            for moved in (target, *([chunk] if gemini.enable_gradient_accumulation else [])):
                manager.move_chunk(moved, device, force_copy=True, async_move=stream is not None)
