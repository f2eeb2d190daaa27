"""Gemini's chunks gathered and reduced by copies between the memories of the ranks; see commons.peer_copies.

A rank's part of a chunk gets a place in memory that the other ranks read, and stays there: while the chunk is gathered,
when its gradients take the weights' place, and when the optimizer writes the new weights over them.
"""

from __future__ import annotations

from typing import Any

import torch
from colossalai.zero.gemini.gemini_ddp import GeminiDDP

from commons.peer_copies import PeerCopies, Peers


def share_parts(gemini: GeminiDDP, peers: Peers) -> PeerCopies:
    """Move this rank's parts of the chunks of ``gemini``, none of them gathered, to where the other ranks reach them
    (collective).
    """
    chunks: list[Any] = list(dict.fromkeys(gemini.chunk_manager.get_chunk(param) for param in gemini.fp16_params))
    copies = PeerCopies(peers, [chunk.shard_size for chunk in chunks], chunks[0].dtype)
    for chunk, parts in zip(chunks, copies.parts, strict=True):
        place = parts[chunk.pg_rank]
        place.copy_(chunk.cuda_shard)
        chunk.cuda_shard, chunk.parts, chunk.copies = place, parts, copies
    _meet_at_passes(gemini, copies)
    return copies


def _meet_at_passes(gemini: Any, copies: PeerCopies) -> None:
    """Have the ranks meet before every call of the model, when the optimizer, a checkpoint, or whatever has written the
    parts, is through, and after one without gradients, so that the parts may be written again.
    """
    forward = gemini.forward

    def met(*arguments: Any, **options: Any) -> Any:
        copies.meet()
        out = forward(*arguments, **options)
        if not torch.is_grad_enabled():
            copies.meet()
        return out

    gemini.forward = met
