"""The next-token loss where every tensor-parallel rank holds the logits of its own part of the vocabulary.

The same number as ``model_zoo.next_token_loss`` on the gathered logits, which nobody ever gathers: two small
all-reduces of a few numbers a token take their place. Padding columns are left out exactly, and everything is
computed in fp32, a few thousand tokens at a time, so that no fp32 copy of the logits exists at once.

Shoeybi et al. 2019, "Megatron-LM", section 3, describes fusing the parallel head with the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from commons.ops.cross_entropy import IGNORED_LABEL

# fp32 numbers a piece: 256 MiB
PIECE_ELEMENTS = 2**26


def _pieces(rows: int, columns: int) -> Iterator[slice]:
    size = max(1, PIECE_ELEMENTS // max(1, columns))
    return (slice(start, start + size) for start in range(0, rows, size))


def _all_reduce(tensor: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None:
        dist.all_reduce(tensor, op=op, group=group)


def _exponentials(logits: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """exp(logits - offsets of the rows), a new fp32 tensor."""
    return logits.to(torch.float32, copy=True).sub_(offsets[:, None]).exp_()


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Arguments: logits [tokens, own columns], targets [tokens], the first column's token id, vocabulary,
    group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        first: int,
        vocab: int,
        group: dist.ProcessGroup | None,
    ) -> torch.Tensor:
        rows, columns = logits.shape
        own = min(max(vocab - first, 0), columns)  # columns that are token ids; the rest is padding
        highest = logits.new_full((rows,), float("-inf"), dtype=torch.float32)
        if own:
            highest.copy_(logits[:, :own].amax(1))
        _all_reduce(highest, dist.ReduceOp.MAX, group)

        # row 0: sum of exponentials, row 1: the target's score, both from the ranks that have them
        sums = logits.new_zeros((2, rows), dtype=torch.float32)
        for piece in _pieces(rows, own):
            sums[0, piece] = _exponentials(logits[piece, :own], highest[piece]).sum(1)
        here = (targets >= first) & (targets < first + own)
        index = torch.where(here, targets - first, 0)
        if own:
            sums[1] = logits.gather(1, index[:, None])[:, 0].float() * here
        _all_reduce(sums, dist.ReduceOp.SUM, group)

        log_total = highest + sums[0].log()
        predicted = targets != IGNORED_LABEL
        weight = predicted / predicted.sum()
        ctx.save_for_backward(logits, index, here, log_total, weight)
        ctx.own = own
        return ((log_total - sums[1]) * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, index, here, log_total, weight = ctx.saved_tensors
        own, factor = ctx.own, (weight * loss_gradient)[:, None]
        gradient = torch.zeros_like(logits) if own < logits.shape[1] else torch.empty_like(logits)
        for piece in _pieces(logits.shape[0], own):
            probability = _exponentials(logits[piece, :own], log_total[piece])
            probability.scatter_add_(1, index[piece, None], -here[piece, None].float())
            gradient[piece, :own] = probability.mul_(factor[piece])
        return gradient, None, None, None, None


def vocab_parallel_loss(
    logits: torch.Tensor, tokens: torch.Tensor, vocab: int, group: dist.ProcessGroup | None = None
) -> torch.Tensor:
    """Mean cross-entropy of every position's prediction of the next token, over a vocabulary spread over
    ``group``.

    Args:
        logits: [batch, sequence, padded vocabulary / ranks of ``group``]; rank r holds the r-th part, all of
            one width.
        tokens: int64 [batch, sequence], equal on all ranks of ``group``; -100 is not predicted.
        vocab: token ids in all; columns from there on are padding and get gradient zero, exactly.
        group: the tensor-parallel ranks, or None for a whole vocabulary.

    Returns:
        An fp32 scalar, equal on all ranks of ``group``; nats a token.
    """
    targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    first = 0 if group is None else dist.get_rank(group) * logits.shape[-1]
    return _VocabParallelCrossEntropy.apply(logits.flatten(0, 1), targets, first, vocab, group)
