"""Gemini's chunks without needless copies, without needless pointer updates, and without freeing what is
still being sent.

A chunk is whole (gathered) in ``cuda_global_chunk`` or a rank's part in ``cuda_shard``. On one rank the part
is the whole, but upstream allocates, copies and frees at every turn from one to the other: at each release,
at each access, and at the reduction of gradients. Here, on one rank, ``cuda_shard`` is the same memory as
``cuda_global_chunk``. The accounting stays right by itself: ``Chunk.memory_usage`` counts the one or the
other. Of a replicated chunk (commons.plans.colossal.peer_chunks) it counts the part although all of it is there; only
placement auto would read that, which has none.

https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/chunk.py
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import Chunk
from colossalai.zero.gemini.chunk.chunk import TensorState, alloc_storage, free_storage, is_storage_empty

_gather = Chunk._Chunk__gather  # pyright: ignore[reportAttributeAccessIssue]
_update_tensors_ptr = Chunk._Chunk__update_tensors_ptr  # pyright: ignore[reportAttributeAccessIssue]
_shard_move = Chunk.shard_move
_close_chunk = Chunk.close_chunk


def _is_alone(chunk: Chunk) -> bool:
    return chunk.pg_size == 1 and not chunk.keep_gathered


def scatter(self: Any) -> None:
    """``Chunk.__scatter``: on one rank the part is the whole; on several the whole is freed only after the part has
    been copied from it.

    Under gradient accumulation Gemini does this on its stream for reductions, and upstream frees at once: the next
    allocation on the computing stream wrote into parameters that were still to be copied. Seen on two H100s on
    2026-11-25, as losses that differed from run to run.
    """
    if self.keep_gathered or not self.is_gathered:
        return
    if _is_alone(self):
        self.cuda_shard = self.cuda_global_chunk.detach()
    elif self.parts:
        self.cuda_shard = self.parts[self.pg_rank]  # it has stayed there, and no one writes to what is gathered
        _free(self)
    else:
        self.cuda_shard = self.cuda_global_chunk[self.shard_begin : self.shard_end].clone()
        _free(self)
    self.is_gathered = False


def _free(chunk: Any) -> None:
    """Free what was gathered, once the current stream has done what it was given."""
    if chunk.replicated:
        return
    if _computes_here(chunk.cuda_global_chunk):
        free_storage(chunk.cuda_global_chunk)
    else:
        _free_after_this_stream(chunk.cuda_global_chunk, chunk.allocated_on)


def _computes_here(tensor: torch.Tensor) -> bool:
    """Whether the current stream is the computing one, behind which whatever is gathered or reduced next waits."""
    return not tensor.is_cuda or get_accelerator().current_stream() == get_accelerator().default_stream()


def gather(self: Any, async_op: bool = False) -> Any:
    """``Chunk.__gather``: on one rank the part is the whole already, or comes from the host and takes its place; by
    copies from the other ranks' memory where there are any (commons.plans.colossal.peer_chunks).
    """
    if self.is_gathered:
        return None
    self.allocated_on = get_accelerator().current_stream() if async_op else None
    if not (_is_alone(self) or self.parts):
        return _gather(self, async_op)
    if self.replicated:
        pass  # it is gathered where a pass begins, and nowhere else: see peer_chunks
    elif self.parts:
        alloc_storage(self.cuda_global_chunk)
        self.copies.gather(self.parts, self.cuda_global_chunk)
    elif is_storage_empty(self.cuda_global_chunk):
        alloc_storage(self.cuda_global_chunk)
        self.cuda_global_chunk.copy_(self.cuda_shard)
    self.cuda_shard = None
    self.is_gathered = True
    return _Arrival() if async_op and self.cuda_global_chunk.is_cuda else None


class _Arrival:
    """What Gemini waits for after a prefetch: everything given to the stream that was current when this was
    made.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        self._event.wait()


def shard_move(self: Any, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None:
    """``Chunk.shard_move``: what has moved to the host no longer takes device memory."""
    _shard_move(self, device, force_copy, non_blocking)
    _free_if_away(self)


def close_chunk(self: Any) -> None:
    """``Chunk.close_chunk``: the same for a chunk that begins its life on the host."""
    _close_chunk(self)
    _free_if_away(self)


def _free_if_away(chunk: Any) -> None:
    if not _is_alone(chunk) or chunk.cuda_shard is not None or chunk.is_gathered:
        return
    if _storage(chunk.cpu_shard) == _storage(chunk.cuda_global_chunk):  # where the host is the device too
        chunk.cpu_shard = chunk.cpu_shard.clone()
    _free_after_this_stream(chunk.cuda_global_chunk)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _free_after_this_stream(tensor: torch.Tensor, allocated_on: Any = None) -> None:
    """Free a tensor's storage that work already given to the current stream still reads, though another stream
    allocated it: ``allocated_on``, which waits then, or the computing one, which is not to wait.
    """
    if is_storage_empty(tensor):
        return
    if tensor.is_cuda and allocated_on is None:
        tensor.record_stream(get_accelerator().current_stream())  # pyright: ignore[reportArgumentType]
    elif tensor.is_cuda:
        allocated_on.wait_stream(get_accelerator().current_stream())
    free_storage(tensor)


def update_tensors_ptr(self: Any) -> None:
    """``Chunk.__update_tensors_ptr``: parameters are views of the chunk's one storage, which is freed and
    refilled but never replaced.

    So they need to be pointed at it only once; upstream does it at every gather, for a microsecond or ten a
    parameter.
    """
    first = next(iter(self.tensors_info), None)
    with torch._C.DisableTorchFunctionSubclass():
        if first is None or _storage(first) == _storage(self.cuda_global_chunk):
            return
        _update_tensors_ptr(self)


def reduce(self: Any, async_op: bool = False) -> None:
    """``Chunk.reduce``: the gradients that are sent are freed only after they are sent.

    Upstream frees them as soon as an asynchronous reduction has been launched, and relies on NCCL's process
    group to keep the memory from being given out again. Since torch 2.8 that group holds on to the tensor and
    no longer to its storage (seen in the code, not on a GPU), so that the next allocation on the computing
    stream may be written into gradients that are still being read. The current stream, which is Gemini's for
    reductions, waits here; the host does not.
    """
    if self.copies is None and (
        self.pg_size == 1 or self.keep_gathered or self.extra_dp_group is not None or not async_op
    ):
        _reduce(self, async_op)
        return
    assert self.is_gathered and self.grad_reduce_work is None
    if self.parts:
        self.cuda_shard = self.parts[self.pg_rank]
    else:
        self.cuda_shard = torch.empty(self.shard_size, dtype=self.dtype, device=get_accelerator().get_current_device())
    if self.copies:
        self.copies.average(self.cuda_global_chunk, self.cuda_shard)
        if self.reduction == dist.ReduceOp.SUM:
            self.cuda_shard.mul_(self.pg_size)
    else:
        work = dist.reduce_scatter_tensor(
            self.cuda_shard, self.cuda_global_chunk, op=self.reduction, group=self.torch_pg, async_op=True
        )
        work.wait()  # pyright: ignore[reportOptionalMemberAccess]
    _free(self)
    self.is_gathered = False
    for info in self.tensors_info.values():
        self.tensor_state_cnter[info.state] -= 1
        info.state = TensorState.HOLD
        self.tensor_state_cnter[TensorState.HOLD] += 1


_reduce = Chunk.reduce


def mean_or_sum(chunk: Any) -> Any:
    """What :func:`reduce` can do for a chunk's gradients: copies and NCCL have a mean, gloo and a rank alone do not."""
    on_gpus = chunk.pg_size > 1 and not chunk.keep_gathered and dist.get_backend(chunk.torch_pg) == "nccl"
    return dist.ReduceOp.AVG if chunk.copies or on_gpus else dist.ReduceOp.SUM


@functools.cache
def install() -> None:
    """Replace the methods of every chunk in this process."""
    Chunk.reduction = dist.ReduceOp.SUM  # pyright: ignore[reportAttributeAccessIssue]  (what upstream does)
    # the stream that a chunk was gathered on, if not the computing one; peer_chunks gives the others, where ranks copy
    Chunk.allocated_on = Chunk.copies = Chunk.parts = None  # pyright: ignore[reportAttributeAccessIssue]
    Chunk.replicated = False  # pyright: ignore[reportAttributeAccessIssue]  (the whole chunk stays in memory)
    Chunk._Chunk__scatter = scatter  # pyright: ignore[reportAttributeAccessIssue]
    Chunk._Chunk__gather = gather  # pyright: ignore[reportAttributeAccessIssue]
    Chunk._Chunk__update_tensors_ptr = update_tensors_ptr  # pyright: ignore[reportAttributeAccessIssue]
    Chunk.shard_move = shard_move  # pyright: ignore[reportAttributeAccessIssue]
    Chunk.close_chunk = close_chunk
    Chunk.reduce = reduce  # pyright: ignore[reportAttributeAccessIssue]
