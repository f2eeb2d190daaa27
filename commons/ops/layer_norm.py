"""The layer norm at the head of a residual branch, one kernel each way on GPUs.

In the forward pass the last branch's result is added in the same kernel. The compiler does so too, in kernels whose
tile sizes it chooses by timing: for gpt2_xl's width that choice was up to four times slower in one run than in another.

The norm's input goes two ways, through the norm and on as the residual, so the backward pass has two gradients to
be added to one. The compiler does that and begins the sums for the norm's weight and bias in the same pass, but ends
each of these sums with a kernel that takes longer than its data would. Here one kernel begins all sums over the rows,
and one ends them. Two more come with them: the gradient of a bias is the sum over the rows of that of what it was added
to, and through the kernel pass those for both biases around the norm, the last one added to its input and the one that
will be added to the residual.
"""

from __future__ import annotations

from typing import Any

import torch

OPERATORS = torch.library.Library("gemini_gpt2", "FRAGMENT")
OPERATORS.define(
    "norm(Tensor hidden, Tensor? added, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor, Tensor)"
)
OPERATORS.define(
    "norm_gradient(Tensor gradient, Tensor hidden, Tensor mean, Tensor scale, Tensor weight, Tensor passed, int sums)"
    " -> (Tensor, Tensor)"
)


WIDE = 1024  # columns


def strip_rows(width: int) -> int:
    """Rows whose sums are one strip: few enough that every multiprocessor has several strips at a time."""
    return 16 if width <= WIDE else 32


def _strips(hidden: torch.Tensor) -> int:
    rows, width = hidden.shape
    return -(-rows // strip_rows(width))


def norm_and_residual(
    hidden: torch.Tensor,
    added: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    added_before: torch.Tensor | None = None,
    added_later: torch.Tensor | None = None,
    *,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layer_norm(hidden + added)`` and ``hidden + added``, which goes on as the residual: use that one for it.

    Args:
        hidden, added: [..., width]; None adds nothing.
        weight, bias: of the norm, [width].
        added_before, added_later: both or none: a bias that was added to every row of ``hidden`` or ``added``, and one
            that will be added to every row of the residual; [width]. Their gradients come from here, so detach them
            there.

    Returns:
        Two tensors like ``hidden``.
    """
    flat: Any = _NormAndResidual.apply(
        hidden.flatten(0, -2),
        None if added is None else added.flatten(0, -2),
        weight,
        bias,
        eps,
        added_before,
        added_later,
    )
    normed, residual = (each.view(hidden.shape) for each in flat)
    return normed, residual


class _NormAndResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        added: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        added_before: torch.Tensor | None,
        added_later: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        normed, residual, mean, scale = torch.ops.gemini_gpt2.norm(hidden, added, weight, bias, eps)
        if added is None:
            residual = hidden.view_as(hidden)
        ctx.save_for_backward(hidden if added is None else residual, mean, scale, weight)
        ctx.adds = added is not None
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias, added_before, added_later)]
        return normed, residual

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, passed = gradients
        hidden, mean, scale, weight = ctx.saved_tensors
        count = 2 if ctx.dtypes[2] is None else 4
        hidden_gradient, strips = torch.ops.gemini_gpt2.norm_gradient(
            gradient, hidden, mean, scale, weight, passed, count
        )
        sums = strips.sum(0)
        of_weight, of_bias, *of_biases = (
            part.to(dtype) for part, dtype in zip(sums.unbind(), ctx.dtypes[:count], strict=True)
        )
        added_gradient = hidden_gradient if ctx.adds else None
        return hidden_gradient, added_gradient, of_weight, of_bias, None, *(of_biases or (None, None))


def _norm(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The layer norm of ``hidden + added``, the sum (empty without ``added``), and every row's mean and one over its
    standard deviation, fp32.

    Args:
        hidden, added: [rows, width].
        weight, bias: [width].
    """
    total = hidden if added is None else hidden + added
    normed, mean, scale = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    return normed, hidden.new_empty(0) if added is None else total, mean.float().view(-1), scale.float().view(-1)


def _norm_on_gpu(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    from commons.ops import triton_kernels as gpu_kernels

    if added is not None and added.shape != hidden.shape:
        raise ValueError(f"{tuple(added.shape)} cannot be added to {tuple(hidden.shape)}")
    return gpu_kernels.norm(hidden.contiguous(), None if added is None else added.contiguous(), weight, bias, eps)


@torch.library.register_fake("gemini_gpt2::norm", lib=OPERATORS)
def _norm_shapes(
    hidden: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_rows = [hidden.new_empty(len(hidden), dtype=torch.float32) for _ in range(2)]
    total = hidden.new_empty(0) if added is None else hidden.new_empty(hidden.shape)
    return hidden.new_empty(hidden.shape), total, of_rows[0], of_rows[1]


def _norm_gradient(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    passed: torch.Tensor,
    sums: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``hidden``, like it, and fp32 [strips, sums, width].

    Summed up over the strips the latter are the gradients of the norm's weight and bias, and, if ``sums`` is 4, the
    sums over the rows of the gradient of ``hidden`` and of ``passed``.

    Args:
        gradient: of the norm's result, [rows, width].
        hidden: the norm's input, [rows, width].
        mean, scale: every row's mean and one over its standard deviation, fp32 [rows].
        weight: [width].
        passed: the gradient of the residual, [rows, width].
    """
    mean, scale = (each.view(-1, 1).to(weight.dtype) for each in (mean, scale))
    through, of_weight, of_bias = torch.ops.aten.native_layer_norm_backward(
        gradient, hidden, weight.shape, mean, scale, weight, weight, [True, True, True]
    )
    out = through + passed
    rows = (of_weight, of_bias, out.sum(0, dtype=torch.float32), passed.sum(0, dtype=torch.float32))
    strips = torch.zeros(_strips(hidden), sums, hidden.shape[1])
    strips[0] = torch.stack([row.float() for row in rows[:sums]])
    return out, strips


def _norm_gradient_on_gpu(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    passed: torch.Tensor,
    sums: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    from commons.ops import triton_kernels as gpu_kernels

    gradient, hidden, passed = (tensor.contiguous() for tensor in (gradient, hidden, passed))
    return gpu_kernels.norm_gradient(gradient, hidden, mean, scale, weight, passed, sums, strip_rows(hidden.shape[1]))


@torch.library.register_fake("gemini_gpt2::norm_gradient", lib=OPERATORS)
def _norm_gradient_shapes(
    gradient: torch.Tensor,
    hidden: torch.Tensor,
    mean: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    passed: torch.Tensor,
    sums: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(hidden), hidden.new_empty(_strips(hidden), sums, hidden.shape[1], dtype=torch.float32)


OPERATORS.impl("norm", _norm, "CPU")
OPERATORS.impl("norm", _norm_on_gpu, "CUDA")
OPERATORS.impl("norm_gradient", _norm_gradient, "CPU")
OPERATORS.impl("norm_gradient", _norm_gradient_on_gpu, "CUDA")
