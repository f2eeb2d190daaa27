"""The language-model head and its loss in one, without the logits of the whole batch.

Written out, the last layer of a GPT-2 is its largest. For T tokens and a padded vocabulary of V it takes 12 T
V bytes at its peak (measured, bf16: logits, their fp32 copy, log-softmax, and the gradients of two of them):
9.4 GiB for 16 x 1024 tokens of GPT-2. Here tokens are taken c at a time. The gradient of a cross-entropy is
known up to one factor as soon as its loss is, so each piece gives its logits, its loss and its gradients at
once and is forgotten: 9 c V bytes (measured, eager) or 4 c V (compiled: bf16 logits in, bf16 gradients out),
and 4 V h for the weight's gradient, which is summed up over the pieces in fp32. Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

IGNORED_LABEL = -100  # what torch's cross_entropy leaves out by default

# logits a piece: 512 MiB in bf16; 4 pieces of 4096 tokens for GPT-2's vocabulary and 16 x 1024 tokens. Large
# enough for matrix products at full speed, and few enough that adding up the weight's gradient costs little.
PIECE_ELEMENTS = 2**28
PIECE_TOKENS_MULTIPLE = 128

# The gradients wait for the number of tokens and the loss scale until they are asked for. Divided by the
# tokens at once, the nearly equal gradients of all targets would be rounded to bf16 in the same direction
# (3.5e-3 off instead of 2.5e-3, measured), and fp16 would underflow. A power of two rounds nothing and keeps
# fp16 sums over tokens from overflowing.
HEADROOM = 2.0**-4

Kernel = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def softmax_gradient(logits: torch.Tensor, targets: torch.Tensor, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of one piece, computed in fp32. Made of operations that a compiler fuses into one
    pass a row.

    Args:
        logits: [tokens, padded vocabulary], any floating dtype.
        targets: int64 [tokens]; ``IGNORED_LABEL`` where nothing is predicted.
        vocab: columns that are token ids; the others get probability and gradient zero, exactly.

    Returns:
        The sum of -log p(target), fp32 scalar, and its gradient times ``HEADROOM``, like ``logits``.
    """
    columns = torch.arange(logits.shape[1], device=logits.device)
    predicted = targets != IGNORED_LABEL
    index = targets.clamp_min(0).unsqueeze(1)
    # in place from here on: eager mode holds one fp32 buffer
    scores = logits.to(torch.float32, copy=True).masked_fill_(columns >= vocab, float("-inf"))
    log_total = torch.logsumexp(scores, dim=1, keepdim=True)
    losses = (log_total - scores.gather(1, index)).squeeze(1)
    gradient = scores.sub_(log_total).exp_().add_(columns == index, alpha=-1)
    gradient = gradient.mul_((predicted * HEADROOM).unsqueeze(1))
    return torch.where(predicted, losses, 0.0).sum(), gradient.to(logits.dtype)


def softmax_gradient_kernel(
    logits: torch.Tensor, targets: torch.Tensor, vocab: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in one kernel of a GPU; the gradient takes the place of the logits."""
    from commons.ops.triton_kernels import softmax_gradient_

    return softmax_gradient_(logits, targets, vocab, ignored=IGNORED_LABEL, factor=HEADROOM).sum(), logits


def piece_tokens(tokens: int, padded_vocab: int) -> int:
    """Tokens a piece: equal pieces, but for the last, of at most ``PIECE_ELEMENTS`` logits each."""
    pieces = -(-tokens * padded_vocab // PIECE_ELEMENTS)
    share = -(-tokens // pieces)
    return min(tokens, share + -share % PIECE_TOKENS_MULTIPLE)


def _add_product_(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``total += left @ right`` with an fp32 ``total`` and factors of a lower precision, in one kernel where
    there is one.
    """
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # torch 2.8 on
        torch.ops.aten.addmm.dtype_out(total, left, right, torch.float32, out=total)
    else:
        total.add_(left @ right)


def _times(tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``tensor`` times an fp32 scalar, rounded once, without an fp32 copy in between."""
    return torch.mul(tensor, factor, out=torch.empty_like(tensor, dtype=dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        vocab: int,
        dtype: torch.dtype,
        kernel: Kernel,
    ) -> torch.Tensor:
        wants_gradient = any(ctx.needs_input_grad)
        factors, table = hidden.to(dtype), weight.to(dtype)
        loss = hidden.new_zeros((), dtype=torch.float32)
        mean = 1.0 / (targets != IGNORED_LABEL).sum()
        if wants_gradient:
            ctx.hidden_gradient = torch.empty_like(factors)
            ctx.weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        size = piece_tokens(hidden.shape[0], weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            piece = slice(start, start + size)
            piece_loss, gradient = kernel(factors[piece] @ table.t(), targets[piece], vocab)
            loss += piece_loss
            if wants_gradient:
                torch.mm(gradient, table, out=ctx.hidden_gradient[piece])
                _add_product_(ctx.weight_gradient, gradient.t(), factors[piece])
            del gradient
        ctx.scale, ctx.dtypes = mean / HEADROOM, (hidden.dtype, weight.dtype)
        return loss * mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = loss_gradient * ctx.scale
        hidden_dtype, weight_dtype = ctx.dtypes
        hidden_gradient = _times(ctx.hidden_gradient, factor, hidden_dtype)
        weight_gradient = _times(ctx.weight_gradient, factor, weight_dtype)
        del ctx.hidden_gradient, ctx.weight_gradient  # the graph may outlive its one backward pass
        return hidden_gradient, weight_gradient, None, None, None, None


def next_token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    vocab: int,
    kernel: Kernel = softmax_gradient,
) -> torch.Tensor:
    """Mean cross-entropy of every position's prediction of the next token, from the hidden states before the
    head.

    The same as ``model_zoo.next_token_loss(hidden @ weight.T, tokens, vocab=vocab)``, in less memory. Under
    autocast the matrix products are in its dtype and the gradients in those of the arguments.

    Args:
        hidden: [batch, sequence, width].
        weight: [padded vocabulary, width], the tied embedding.
        tokens: int64 [batch, sequence]; -100 is not predicted.
        vocab: rows of ``weight`` that are token ids; the gradient of the others is exactly zero.
        kernel: :func:`softmax_gradient`, or that compiled, or :func:`softmax_gradient_kernel`.

    Returns:
        An fp32 scalar; the mean over all predicted positions of the batch.
    """
    targets = functional.pad(tokens[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    device_type = hidden.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else hidden.dtype
    with torch.autocast(device_type, enabled=False):
        return _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight, targets, vocab, dtype, kernel)
