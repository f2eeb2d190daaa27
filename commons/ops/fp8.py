"""Linear layers whose three matrix products run in fp8: ``--precision fp8``.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning": values and weights in e4m3, gradients in e5m2, each tensor
scaled so that its largest magnitude is the largest number of its format. Scales are taken from the tensors themselves
(dynamic, one per tensor); products are summed up in fp32 and given out in bf16. Everything else of the model, the head
and its loss among it, stays in bf16, the master weights in fp32.

The tensor cores read fp8 along the dimension that is summed over, so that each tensor is wanted twice: as it lies, and
transposed for the other product that it is a factor of. One operator casts it both ways, and begins the sum that is the
bias's gradient, in one pass over it: a cast, two transposes and a sum of their own took gpt2_xl 80 ms beside 113 of
matrix products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of every dimension, asked for by the tensor cores' kernels
FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is 9.0
SMALLEST = 1e-12  # a tensor of zeros has no scale of its own
STRIP_ROWS = 64  # whose sums the cast begins

OPERATORS = torch.library.Library("gemini_gpt2", "FRAGMENT")
OPERATORS.define(
    "cast_both_ways(Tensor tensor, Tensor factor, ScalarType dtype, bool sums) -> (Tensor, Tensor, Tensor)"
)


class Quantized(NamedTuple):
    """A matrix in fp8, as it lies and transposed.

    Attributes:
        rows: [m, n] in fp8, contiguous.
        columns: [n, m], the same numbers.
        scale: fp32 scalar to multiply them with to have the tensor back.
        strips: fp32 [strips, n], the tensor's sums over ``STRIP_ROWS`` rows each; empty where none were asked for.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    strips: torch.Tensor


def quantize(tensor: torch.Tensor, dtype: torch.dtype, *, sums: bool = False, kernel: bool = False) -> Quantized:
    """``tensor`` [m, n] in the fp8 of ``dtype``.

    Args:
        sums: sum up strips of rows, too.
        kernel: cast by the operator, on GPUs a kernel of commons.ops.triton_kernels.
    """
    cast = torch.ops.gemini_gpt2.cast_both_ways if kernel else _cast_both_ways
    largest = tensor.abs().amax().float().clamp_min(SMALLEST)
    limit = torch.finfo(dtype).max
    rows, columns, strips = cast(tensor, limit / largest, dtype, sums)
    return Quantized(rows, columns, largest / limit, strips)


def _product(
    left: torch.Tensor, right_columns: torch.Tensor, scales: tuple[torch.Tensor, torch.Tensor], **options: Any
) -> torch.Tensor:
    """``left @ right`` in bf16, of fp8 [m, k] and [n, k]: the kernels want the right factor column by column."""
    return torch._scaled_mm(
        left, right_columns.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=torch.bfloat16, **options
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, kernel: bool) -> torch.Tensor:
        values, weights = (quantize(tensor, E4M3, kernel=kernel) for tensor in (hidden, weight))
        ctx.save_for_backward(values.columns, values.scale, weights.rows, weights.scale)
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype
        ctx.kernel = kernel
        # fast_accum: sums of fewer bits, which the forward pass bears; the gradients' are whole
        return _product(
            values.rows,
            weights.columns,
            (values.scale, weights.scale),
            bias=bias.to(torch.bfloat16),
            use_fast_accum=True,
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (out_gradient,) = gradients
        value_columns, value_scale, weight_rows, weight_scale = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        of_bias = ctx.needs_input_grad[2]
        slopes = quantize(out_gradient, E5M2, sums=of_bias, kernel=ctx.kernel)
        hidden_gradient = _product(slopes.rows, weight_rows, (slopes.scale, weight_scale))
        weight_gradient = _product(value_columns, slopes.columns, (value_scale, slopes.scale))
        bias_gradient = slopes.strips.sum(0).to(bias_dtype) if of_bias else None
        return hidden_gradient.to(hidden_dtype), weight_gradient.to(weight_dtype), bias_gradient, None


def fp8_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, kernel: bool = False) -> torch.Tensor:
    """``hidden @ weight + bias`` in fp8.

    Args:
        hidden: [..., in], any floating dtype; the leading dimensions' product and ``in`` multiples of ``MULTIPLE``.
        weight: [in, out], ``out`` a multiple of it too.
        bias: [out].
        kernel: as ``quantize`` takes it.

    Returns:
        bf16 [..., out].
    """
    return _Linear.apply(hidden.flatten(0, -2), weight, bias, kernel).unflatten(0, hidden.shape[:-1])


def _cast_both_ways(
    tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``tensor`` [m, n] times the scalar ``factor`` in ``dtype``, as it lies and transposed, and with ``sums`` the sums
    over strips of its rows.
    """
    limit = torch.finfo(dtype).max
    # the clamp catches what rounding lifts over the limit: e4m3 has no infinity, it would become NaN
    rows = (tensor.float() * factor).clamp(-limit, limit).to(dtype)
    return rows, rows.t().contiguous(), _sums_of_strips(tensor) if sums else tensor.new_empty(0, dtype=torch.float32)


def _sums_of_strips(tensor: torch.Tensor) -> torch.Tensor:
    padded = functional.pad(tensor.float(), (0, 0, 0, -len(tensor) % STRIP_ROWS))
    return padded.unflatten(0, (-1, STRIP_ROWS)).sum(1)


def _cast_both_ways_on_gpu(
    tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from commons.ops import triton_kernels as gpu_kernels

    return gpu_kernels.cast_both_ways(tensor.contiguous(), factor, dtype, STRIP_ROWS, sums)


@torch.library.register_fake("gemini_gpt2::cast_both_ways", lib=OPERATORS)
def _cast_both_ways_shapes(
    tensor: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, sums: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = tensor.shape
    strips = (-(-rows // STRIP_ROWS), columns) if sums else (0,)
    return (
        tensor.new_empty(rows, columns, dtype=dtype),
        tensor.new_empty(columns, rows, dtype=dtype),
        tensor.new_empty(strips, dtype=torch.float32),
    )


OPERATORS.impl("cast_both_ways", _cast_both_ways, "CPU")
OPERATORS.impl("cast_both_ways", _cast_both_ways_on_gpu, "CUDA")
