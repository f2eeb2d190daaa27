"""Gemini's chunks gathered and reduced by copies between the memories of the ranks; see
commons.distributed.peer_copies.

A rank's part of a chunk gets a place in memory that the other ranks read, and stays there: while the chunk is gathered,
when its gradients take the weights' place, and when the optimizer writes the new weights over them.

Under ``--shard_param_frac 0`` every rank has memory for all of each chunk for good, and its part is a piece of it, so
that no part is copied to where it is gathered. All chunks are gathered when a pass over the model begins, and never
later: the other ranks' gradients may have taken the parts' place by then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from colossalai.accelerator import get_accelerator
from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.distributed.peer_copies import PeerCopies
from commons.distributed.peer_memory import Peers


def share_parts(gemini: GeminiDDP, peers: Peers, replicated: bool) -> PeerCopies:
    """Move this rank's parts of the chunks of ``gemini``, none of them gathered, to where the other ranks reach them
    (collective). ``replicated``: the whole chunks stay in memory.
    """
    chunks: list[Any] = list(dict.fromkeys(map(gemini.chunk_manager.get_chunk, gemini.module.parameters())))
    copies = PeerCopies(peers, [chunk.shard_size for chunk in chunks], chunks[0].dtype, replicated)
    for chunk, parts in zip(chunks, copies.parts, strict=True):
        place = parts[chunk.pg_rank]
        place.copy_(chunk.cuda_shard)
        chunk.cuda_shard, chunk.parts, chunk.copies = place, parts, copies
    if replicated:
        for chunk, whole in zip(chunks, copies.wholes, strict=True):
            chunk.cuda_global_chunk, chunk.replicated = whole, True
    passes = _replicated_passes(gemini, copies, chunks) if replicated else _sharded_passes(gemini, copies)
    gemini.forward = passes  # pyright: ignore[reportAttributeAccessIssue]
    return copies


def _sharded_passes(gemini: Any, copies: PeerCopies) -> Callable[..., Any]:
    """The call of the model with the ranks meeting before it, when the optimizer, a checkpoint, or whatever has written
    the parts, is through, and after one without gradients, so that the parts may be written again.
    """
    forward = gemini.forward

    def met(*arguments: Any, **options: Any) -> Any:
        copies.meet()
        out = forward(*arguments, **options)
        if not torch.is_grad_enabled():
            copies.meet()
        return out

    return met


def _replicated_passes(gemini: Any, copies: PeerCopies, chunks: list[Any]) -> Callable[..., Any]:
    """The call of the model with the ranks meeting before it, and all chunks gathered at its beginning, in their order,
    beside the computation. At its end all ranks have done so, and what is gathered may be written.
    """
    forward, manager, chunk_manager = gemini.forward, gemini.gemini_manager, gemini.chunk_manager
    manager.placement_policy.max_prefetch = 0  # nothing is left to be gathered ahead
    accelerator: Any = get_accelerator()
    stream = chunk_manager._prefetch_stream
    beside = stream is not None

    def met(*arguments: Any, **options: Any) -> Any:
        copies.meet()
        if beside:
            stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(stream):
            for chunk in chunks:
                copies.gather(chunk.parts, chunk.cuda_global_chunk)
                work = chunk_manager.access_chunk(chunk, async_access=beside)
                if work is not None:
                    manager.add_work(chunk, work)
            copies.tell_read()
        try:
            return forward(*arguments, **options)
        finally:
            if beside:
                accelerator.current_stream().wait_stream(stream)  # a wait never comes before what is told, recorded too
            copies.await_read()

    return met
