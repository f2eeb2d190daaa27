"""Gemini's chunks gathered and reduced by copies between the memories of the ranks; see
commons.distributed.peer_copies.

A rank's part of a chunk gets a place in memory that the other ranks read, and stays there: while the chunk is gathered,
when its gradients take the weights' place, and when the optimizer writes the new weights over them.

Under ``--shard_param_frac 0`` every rank has memory for all of each chunk for good, and its part is a piece of it, so
that no part is copied to where it is gathered. All chunks are gathered when a pass over the model begins, and never
later: the other ranks' gradients may have taken the parts' place by then.

What has to happen around a pass is in :class:`ShardedPass` and :class:`ReplicatedPass`, which
``commons.plans.colossal.gemini.SuiteGemini.forward`` calls.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.distributed.peer_copies import PeerCopies
from commons.distributed.peer_memory import Peers
from commons.plans.colossal.suite_chunk import SuiteChunk


class PassAround(Protocol):
    """What ranks that share memory do around the model's forward pass (collective)."""

    def begin(self) -> None:
        """Before the pass."""
        ...

    def end(self) -> None:
        """Behind the pass, also where it failed."""
        ...

    def succeeded(self) -> None:
        """Behind a pass that did not fail."""
        ...


class AlonePass:
    """No memory is shared."""

    def begin(self) -> None: ...

    def end(self) -> None: ...

    def succeeded(self) -> None: ...


class ShardedPass:
    """Every chunk is gathered from the ranks' parts when it is needed, in the forward and in the backward pass."""

    def __init__(self, copies: PeerCopies) -> None:
        self._copies = copies

    def begin(self) -> None:
        """The optimizer, a checkpoint, or whatever has written the parts, is through on all ranks."""
        self._copies.barrier()

    def end(self) -> None: ...

    def succeeded(self) -> None:
        """Without gradients no average follows that waits for the other ranks: the parts may be written again when all
        have read them.
        """
        if not torch.is_grad_enabled():
            self._copies.barrier()


class ReplicatedPass:
    """All chunks are gathered at the beginning, in their order, beside the computation. At the end of the forward pass
    all ranks have done so, and what is gathered may be written.
    """

    def __init__(self, gemini: Any, copies: PeerCopies, chunks: list[SuiteChunk]) -> None:
        self._copies, self._chunks = copies, chunks
        self._manager, self._chunk_manager = gemini.gemini_manager, gemini.chunk_manager
        self._stream = self._chunk_manager._prefetch_stream
        self._accelerator: Any = get_accelerator()
        self._manager.placement_policy.max_prefetch = 0  # nothing is left to be gathered ahead

    def begin(self) -> None:
        stream, beside = self._stream, self._stream is not None
        self._copies.barrier()
        if beside:
            stream.wait_stream(self._accelerator.current_stream())
        with self._accelerator.stream(stream):
            for chunk in self._chunks:
                self._copies.gather(chunk.parts, chunk.cuda_global_chunk)  # pyright: ignore[reportArgumentType]
                work = self._chunk_manager.access_chunk(chunk, async_access=beside)
                if work is not None:
                    self._manager.add_work(chunk, work)
            self._copies.signal_read()

    def end(self) -> None:
        if self._stream is not None:
            # a wait never comes before what is signalled, captured too
            self._accelerator.current_stream().wait_stream(self._stream)
        self._copies.wait_read()

    def succeeded(self) -> None: ...


def share_parts(gemini: GeminiDDP, peers: Peers, *, replicated: bool) -> tuple[PeerCopies, PassAround]:
    """Move this rank's parts of the chunks of ``gemini``, none of them gathered, to where the other ranks reach them
    (collective).

    Args:
        replicated: the whole chunks stay in memory.

    Returns:
        What copies, and what has to happen around each pass from now on.
    """
    chunks: list[Any] = list(dict.fromkeys(map(gemini.chunk_manager.get_chunk, gemini.module.parameters())))
    copies = PeerCopies(peers, [chunk.shard_size for chunk in chunks], chunks[0].dtype, replicated=replicated)
    for chunk, parts in zip(chunks, copies.parts, strict=True):
        place = parts[chunk.pg_rank]
        place.copy_(chunk.cuda_shard)
        chunk.cuda_shard, chunk.parts, chunk.copies = place, parts, copies
    if not replicated:
        return copies, ShardedPass(copies)
    for chunk, whole in zip(chunks, copies.wholes, strict=True):
        chunk.cuda_global_chunk, chunk.replicated = whole, True
    return copies, ReplicatedPass(gemini, copies, chunks)
