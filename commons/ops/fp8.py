"""Linear layers whose three matrix products run in fp8: ``--precision fp8``.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning": values and weights in e4m3, gradients in e5m2, each tensor
scaled so that its largest magnitude is the largest number of its format. Scales are taken from the tensors themselves
(dynamic, one a tensor); products are summed up in fp32 and given out in bf16. Everything else of the model, the head
and its loss among it, stays in bf16, the master weights in fp32.
"""

from __future__ import annotations

from typing import Any

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every dimension, asked for by the tensor cores' kernels
FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
SMALLEST = 1e-12  # a tensor of zeros has no scale of its own


def quantize(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """``tensor`` in ``dtype`` and the fp32 scalar to multiply it with to have the tensor back."""
    largest = tensor.abs().amax().float().clamp_min(SMALLEST)
    limit = torch.finfo(dtype).max
    # the clamp catches what rounding lifts over the limit: e4m3 has no infinity, it would become NaN
    scaled = (tensor.float() * (limit / largest)).clamp(-limit, limit)
    return scaled.to(dtype), largest / limit


def _product(
    left: torch.Tensor, right_columns: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor], **options: Any
) -> torch.Tensor:
    """``left @ right`` in bf16, of fp8 [m, k] and [n, k]: the kernels want the right factor column by column."""
    return torch._scaled_mm(
        left, right_columns.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, **options
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        values, value_scale = quantize(hidden, E4M3)
        weights, weight_scale = quantize(weight, E4M3)
        ctx.save_for_backward(values, value_scale, weights, weight_scale)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        # fast_accum: sums of fewer bits, which the forward pass bears; the gradients' are whole
        out = _product(values, weights.t().contiguous(), (value_scale, weight_scale), use_fast_accum=True)
        return out + bias.to(out.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (out_gradient,) = gradients
        values, value_scale, weights, weight_scale = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        slopes, slope_scale = quantize(out_gradient, E5M2)
        hidden_gradient = _product(slopes, weights, (slope_scale, weight_scale))
        weight_gradient = _product(values.t().contiguous(), slopes.t().contiguous(), (value_scale, slope_scale))
        bias_gradient = out_gradient.float().sum(0)
        return hidden_gradient.to(hidden_dtype), weight_gradient.to(weight_dtype), bias_gradient.to(bias_dtype)


def fp8_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """``hidden @ weight + bias`` in fp8.

    Args:
        hidden: [..., in], any floating dtype; the leading dimensions' product and ``in`` multiples of ``MULTIPLE``.
        weight: [in, out], ``out`` a multiple of it too.
        bias: [out].

    Returns:
        bf16 [..., out].
    """
    return _Linear.apply(hidden.flatten(0, -2), weight, bias).unflatten(0, hidden.shape[:-1])
