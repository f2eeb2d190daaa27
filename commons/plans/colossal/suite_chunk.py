"""Gemini's chunks without needless copies, without needless pointer updates, and without freeing what is
still being sent.

A chunk is whole (gathered) in ``cuda_global_chunk`` or a rank's part in ``cuda_shard``. On one rank the part
is the whole, but upstream allocates, copies and frees at every turn from one to the other: at each release,
at each access, and at the reduction of gradients. Here, on one rank, ``cuda_shard`` is the same memory as
``cuda_global_chunk``. The accounting stays right by itself: ``Chunk.memory_usage`` counts the one or the
other. Of a replicated chunk (commons.plans.colossal.peer_chunks) it counts the part although all of it is there; only
placement auto would read that, which has none.

Colossal-AI constructs its chunks at two places, by the global name ``Chunk`` of two modules, where :func:`install` puts
:class:`SuiteChunk`. Three of the methods are private to upstream's class, so that they carry its name: Python has
written ``self.__gather`` there as ``self._Chunk__gather``.

https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/chunk.py
https://github.com/hpcaitech/ColossalAI/blob/v0.5.0/colossalai/zero/gemini/chunk/manager.py (``register_tensor``)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.chunk import Chunk, TensorState
from colossalai.zero.gemini.chunk.chunk import alloc_storage, free_storage, is_storage_empty

from commons.distributed.peer_copies import PeerCopies
from commons.ops.gradient_norm import sum_of_squares
from commons.ops.pinned_memory import pinned_empty

CONSTRUCTED_IN = ("colossalai.zero.gemini.chunk.manager", "colossalai.zero.gemini.chunk.chunk")


class SuiteChunk(Chunk):
    """One chunk; the arguments are upstream's.

    Attributes:
        reduction: how :meth:`reduce` combines the ranks' gradients, a sum as upstream does or a mean.
        copies: gathers and averages by copies from the other ranks' memory; None where NCCL or gloo does.
        parts: every rank's part by rank, where ``copies`` finds them; None for chunks that only hold gradients.
        replicated: the whole chunk stays in memory.
        allocated_on: the stream that it was gathered on, None for the computing one.
    """

    def __init__(
        self,
        chunk_size: int,
        zero_group: dist.ProcessGroup,
        dtype: torch.dtype,
        init_device: torch.device | None = None,
        cpu_shard_init: bool = False,
        keep_gathered: bool = False,
        pin_memory: bool = False,
        extra_dp_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            chunk_size,
            zero_group,
            dtype,
            init_device=init_device,
            cpu_shard_init=cpu_shard_init,
            keep_gathered=keep_gathered,
            pin_memory=pin_memory,
            extra_dp_group=extra_dp_group,  # pyright: ignore[reportArgumentType]  (None is its default)
        )
        self.reduction: Any = dist.ReduceOp.SUM
        self.copies: PeerCopies | None = None
        self.parts: list[torch.Tensor] | None = None
        self.replicated = False
        self.allocated_on: Any = None

    @property
    def _is_alone(self) -> bool:
        return self.pg_size == 1 and not self.keep_gathered

    # --- from the whole to the part and back

    def _Chunk__scatter(self) -> None:
        """On one rank the part is the whole; on several the whole is freed only after the part has been copied from
        it.

        Under gradient accumulation Gemini does this on its stream for reductions, and upstream frees at once: the next
        allocation on the computing stream wrote into parameters that were still to be copied. Seen on two H100s on
        2026-11-25, as losses that differed from run to run.
        """
        if self.keep_gathered or not self.is_gathered:
            return
        whole: Any = self.cuda_global_chunk
        if self._is_alone:
            self.cuda_shard = whole.detach()
        elif self.parts:
            self.cuda_shard = self.parts[self.pg_rank]  # it has stayed there, and no one writes to what is gathered
            self._free_whole()
        else:
            self.cuda_shard = whole[self.shard_begin : self.shard_end].clone()
            self._free_whole()
        self.is_gathered = False

    def _Chunk__gather(self, async_op: bool = False) -> Any:
        """On one rank the part is the whole already, or comes from the host and takes its place; by copies from the
        other ranks' memory where there are any (commons.plans.colossal.peer_chunks).
        """
        if self.is_gathered:
            return None
        self.allocated_on = get_accelerator().current_stream() if async_op else None
        if not (self._is_alone or self.parts):
            return super()._Chunk__gather(async_op)  # pyright: ignore[reportAttributeAccessIssue]
        whole: Any = self.cuda_global_chunk
        if self.replicated:
            pass  # it is gathered where a pass begins, and nowhere else: see peer_chunks
        elif self.parts:
            alloc_storage(whole)
            self.copies.gather(self.parts, whole)  # pyright: ignore[reportOptionalMemberAccess]
        elif is_storage_empty(whole):
            alloc_storage(whole)
            whole.copy_(self.cuda_shard)
        self.cuda_shard = None
        self.is_gathered = True
        return _Arrival() if async_op and whole.is_cuda else None

    def _Chunk__update_tensors_ptr(self) -> None:
        """Parameters are views of the chunk's one storage, which is freed and refilled but never replaced.

        So they need to be pointed at it only once; upstream does it at every gather, for a microsecond or ten per
        parameter.
        """
        first = next(iter(self.tensors_info), None)
        with torch._C.DisableTorchFunctionSubclass():
            if first is None or _storage(first) == _storage(self.cuda_global_chunk):
                return
            super()._Chunk__update_tensors_ptr()  # pyright: ignore[reportAttributeAccessIssue]

    # --- between device and host

    def shard_move(self, device: torch.device, force_copy: bool = False, non_blocking: bool = False) -> None:
        """What has moved to the host no longer takes device memory. A chunk that is pinned gets its place on the host
        when it first moves there, and keeps it; upstream gives one to every chunk, also to those that never move.
        """
        if self.pin_memory and device.type == "cpu" and self.cuda_shard is not None and self.cpu_shard is None:
            self.cpu_shard = pinned_empty(self.shard_size, self.dtype)
            self.cpu_vis_flag = False  # nothing is in it yet
        super().shard_move(device, force_copy, non_blocking)
        self._free_if_away()

    def close_chunk(self) -> None:
        """The same for a chunk that begins its life on the host."""
        with self._unpinned():
            super().close_chunk()
        if self.pin_memory and self.cpu_shard is not None:
            pageable: Any = self.cpu_shard
            self.cpu_shard = pinned_empty(self.shard_size, self.dtype)
            self.cpu_shard.copy_(pageable)
        self._free_if_away()

    def init_grad_chunk(self) -> Chunk:
        """Upstream's, without memory on the host before the gradients move there."""
        with self._unpinned():
            gradients = super().init_grad_chunk()
        gradients.pin_memory = self.pin_memory
        return gradients

    @contextmanager
    def _unpinned(self) -> Iterator[None]:
        """Inside, upstream pins nothing for this chunk: torch would round it up to a power of two."""
        pins, self.pin_memory = self.pin_memory, False
        try:
            yield
        finally:
            self.pin_memory = pins

    def _free_if_away(self) -> None:
        if not self._is_alone or self.cuda_shard is not None or self.is_gathered:
            return
        shard: Any = self.cpu_shard
        if _storage(shard) == _storage(self.cuda_global_chunk):  # where the host is the device too
            self.cpu_shard = shard.clone()
        _free_after_this_stream(self.cuda_global_chunk)

    def _free_whole(self) -> None:
        """Free what was gathered, once the current stream has done what it was given."""
        if self.replicated:
            return
        whole: Any = self.cuda_global_chunk
        if _computes_here(whole):
            free_storage(whole)
        else:
            _free_after_this_stream(whole, self.allocated_on)

    # --- gradients

    def mean_or_sum(self) -> Any:
        """What :meth:`reduce` can do for gradients: copies and NCCL have a mean, gloo and a rank alone do not."""
        on_gpus = self.pg_size > 1 and not self.keep_gathered and dist.get_backend(self.torch_pg) == "nccl"
        return dist.ReduceOp.AVG if self.copies or on_gpus else dist.ReduceOp.SUM

    def reduce(self, async_op: bool = False) -> None:
        """Combine the ranks' gradients; those that are sent are freed only after they are sent (collective).

        Upstream frees them as soon as an asynchronous reduction has been launched, and relies on NCCL's process
        group to keep the memory from being given out again. Since torch 2.8 that group holds on to the tensor and
        no longer to its storage (seen in the code, not on a GPU), so that the next allocation on the computing
        stream may be written into gradients that are still being read. The current stream, which is Gemini's for
        reductions, waits here; the host does not.
        """
        if self.copies is None and (
            self.pg_size == 1 or self.keep_gathered or self.extra_dp_group is not None or not async_op
        ):
            super().reduce(async_op)
            return
        assert self.is_gathered and self.grad_reduce_work is None
        whole: Any = self.cuda_global_chunk
        if self.parts:
            shard = self.parts[self.pg_rank]
        else:
            shard = torch.empty(self.shard_size, dtype=self.dtype, device=get_accelerator().get_current_device())
        self.cuda_shard = shard
        if self.copies:
            self.copies.average(whole, shard)
            if self.reduction == dist.ReduceOp.SUM:
                shard.mul_(self.pg_size)
        else:
            work = dist.reduce_scatter_tensor(shard, whole, op=self.reduction, group=self.torch_pg, async_op=True)
            work.wait()  # pyright: ignore[reportOptionalMemberAccess]
        self._free_whole()
        self.is_gathered = False
        self.set_states(TensorState.HOLD)

    def set_l2_norm(self) -> None:
        """Keep the sum of squares of this rank's part for the optimizer, an fp64 scalar on the device.

        Upstream makes a Python number of it, which waits for the device once per chunk, though the optimizer only adds
        them up; and on a CPU one fp32 sum over a large chunk loses digits (commons.ops.gradient_norm).
        """
        payload = self.payload[: self.get_valid_length()]
        self.l2_norm = sum_of_squares([payload], payload.device)

    def set_states(self, state: TensorState, infos: Iterable[Any] | None = None) -> None:
        """Put the tensors of ``infos`` (default: all) into ``state``, and count them there."""
        counter = self.tensor_state_cnter
        previous, count = state, 0
        for info in self.tensors_info.values() if infos is None else infos:
            if info.state is not previous:
                # neighbours are in the same state nearly always; looking a state up takes longer than the rest
                counter[previous] -= count
                counter[state] += count
                previous, count = info.state, 0
            info.state = state
            count += 1
        counter[previous] -= count
        counter[state] += count


class _Arrival:
    """What Gemini waits for after a prefetch: everything given to the stream that was current when this was
    made.
    """

    def __init__(self) -> None:
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> None:
        self._event.wait()


def _computes_here(tensor: torch.Tensor) -> bool:
    """Whether the current stream is the computing one, behind which whatever is gathered or reduced next waits."""
    return not tensor.is_cuda or get_accelerator().current_stream() == get_accelerator().default_stream()


def _storage(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


def _free_after_this_stream(tensor: Any, allocated_on: Any = None) -> None:
    """Free a tensor's storage that work already given to the current stream still reads, though another stream
    allocated it: ``allocated_on``, which waits then, or the computing one, which is not to wait.
    """
    if is_storage_empty(tensor):
        return
    if tensor.is_cuda and allocated_on is None:
        tensor.record_stream(get_accelerator().current_stream())
    elif tensor.is_cuda:
        allocated_on.wait_stream(get_accelerator().current_stream())
    free_storage(tensor)


def install() -> None:
    """Have Colossal-AI construct :class:`SuiteChunk` wherever it constructs a chunk in this process."""
    for name in CONSTRUCTED_IN:
        module: Any = importlib.import_module(name)
        module.Chunk = SuiteChunk
