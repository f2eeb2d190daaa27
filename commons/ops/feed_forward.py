"""The feed-forward layer of a block with GELU and the residual inside of its two matrix products, on GPUs.

GELU is cheap to compute and expensive to move: its input and result are four times as wide as the hidden states, and a
pass over them reads and writes what the product before has just had on the chip. cuBLASLt applies it there: the first
product gives GELU's input and its result, and in the backward pass the product that gives the gradient of the result
multiplies it by GELU's derivative at once. Input and result are kept, as the compiler keeps them too: 60,849 MiB of
gpt2_xl either way. The second product adds the residual before it rounds, so that no pass of its own does.

Three operators, which torch.compile leaves as they are; on a CPU, and where the library has no kernel, they are the
same arithmetic in torch's own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from commons.lifecycle.notices import say
from commons.ops.cublaslt import CublasLtError, Epilogue, Product, alignment, library

OPERATORS = torch.library.Library("gemini_gpt2", "DEF")
OPERATORS.define("linear_gelu(Tensor hidden, Tensor weight, Tensor bias) -> (Tensor, Tensor)")
OPERATORS.define("linear_gelu_gradient(Tensor gradient, Tensor weight, Tensor before) -> Tensor")
OPERATORS.define("linear_residual(Tensor hidden, Tensor weight, Tensor bias, Tensor residual) -> Tensor")

MULTIPLE = 8  # of both widths: cuBLASLt's auxiliary matrix, GELU's input, has to be aligned
INNER_WIDTHS = 4  # of GPT-2's feed-forward layers, in widths of the hidden states


class _Kind(NamedTuple):
    """Two of the arguments of commons.ops.cublaslt.Product."""

    right_is_transposed: bool
    epilogue: Epilogue


WITH_GELU = _Kind(right_is_transposed=False, epilogue=Epilogue.GELU_AUX_BIAS)
WITH_GELU_GRADIENT = _Kind(right_is_transposed=True, epilogue=Epilogue.DGELU)
WITH_RESIDUAL = _Kind(right_is_transposed=False, epilogue=Epilogue.BIAS)


def fits(rows: int, width: int, dtype: torch.dtype) -> bool:
    """Whether cuBLASLt is there for hidden states [rows, width] of this dtype on the current GPU; where only its kernel
    is missing, that is said.
    """
    if library() is None or dtype not in (torch.bfloat16, torch.float16) or width % MULTIPLE:
        return False
    inner = INNER_WIDTHS * width
    where = dtype, MULTIPLE * dtype.itemsize, torch.cuda.current_device()
    products = ((width, inner, WITH_GELU), (width, inner, WITH_GELU_GRADIENT), (inner, width, WITH_RESIDUAL))
    return all(_prepared(rows, left, right, *kind, *where) is not None for left, right, kind in products)


def feed_forward(
    hidden: torch.Tensor,
    up_weight: torch.Tensor,
    up_bias: torch.Tensor,
    down_weight: torch.Tensor,
    down_bias: torch.Tensor,
    residual: torch.Tensor,
    *,
    dropout: float = 0.0,
) -> torch.Tensor:
    """``residual + dropout(gelu(hidden @ up_weight + up_bias) @ down_weight + down_bias)`` with GELU's tanh form.

    Args:
        hidden, residual: [..., width].
        up_weight, up_bias: [width, inner] and [inner].
        down_weight, down_bias: [inner, width] and [width].

    Returns:
        [..., width] in the dtype of all arguments; under autocast the products are in its, and the residual and the
        result in the residual's own.
    """
    layer = hidden.flatten(0, -2), up_weight, up_bias, down_weight, down_bias
    if torch.is_autocast_enabled(hidden.device.type):
        # it knows torch's own products, and would leave these in fp32
        dtype = torch.get_autocast_dtype(hidden.device.type)
        layer = tuple(argument.to(dtype) for argument in layer)
    if not dropout and residual.dtype == layer[0].dtype:
        fed: Any = _FeedForward.apply(*layer, residual.flatten(0, -2))
        return fed.unflatten(0, hidden.shape[:-1])
    fed = _FeedForward.apply(*layer, None)
    return residual + functional.dropout(fed.unflatten(0, hidden.shape[:-1]), dropout)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        up_weight: torch.Tensor,
        up_bias: torch.Tensor,
        down_weight: torch.Tensor,
        down_bias: torch.Tensor,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        inner, before = torch.ops.gemini_gpt2.linear_gelu(hidden, up_weight, up_bias)
        ctx.save_for_backward(hidden, up_weight, before, inner, down_weight)
        if residual is None:
            return torch.addmm(down_bias, inner, down_weight)
        return torch.ops.gemini_gpt2.linear_residual(inner, down_weight, down_bias, residual)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (out_gradient,) = gradients
        hidden, up_weight, before, inner, down_weight = ctx.saved_tensors
        before_gradient = torch.ops.gemini_gpt2.linear_gelu_gradient(out_gradient, down_weight, before)
        return (
            before_gradient @ up_weight.t(),
            hidden.t() @ before_gradient,
            before_gradient.sum(0),
            inner.t() @ out_gradient,
            out_gradient.sum(0) if ctx.needs_input_grad[4] else None,
            out_gradient if ctx.needs_input_grad[5] else None,
        )


def _linear_gelu(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``gelu(hidden @ weight + bias)``, [rows, out], and what GELU was applied to, of hidden [rows, in], weight [in,
    out] and bias [out].
    """
    before = torch.addmm(bias, hidden, weight)
    return functional.gelu(before, approximate="tanh"), before


def _linear_gelu_gradient(gradient: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The gradient of ``before`` [rows, in] from that of ``gelu(before) @ weight`` [rows, out]; weight [in, out]."""
    return torch.ops.aten.gelu_backward(gradient @ weight.t(), before, approximate="tanh")


def _linear_residual(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    """``hidden @ weight + bias + residual``: hidden [rows, in], weight [in, out], bias [out], residual [rows, out]."""
    return torch.addmm(bias, hidden, weight) + residual


@torch.library.register_fake("gemini_gpt2::linear_gelu", lib=OPERATORS)
def _linear_gelu_shapes(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    result, before = (hidden.new_empty(hidden.shape[0], weight.shape[1]) for _ in range(2))
    return result, before


@torch.library.register_fake("gemini_gpt2::linear_gelu_gradient", lib=OPERATORS)
def _linear_gelu_gradient_shape(gradient: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    return before.new_empty(before.shape)


@torch.library.register_fake("gemini_gpt2::linear_residual", lib=OPERATORS)
def _linear_residual_shape(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    return residual.new_empty(residual.shape)


def _linear_gelu_on_gpu(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
    (rows, inner), out = hidden.shape, weight.shape[1]
    result, before = (hidden.new_empty(rows, out) for _ in range(2))
    run = _product(WITH_GELU, rows, inner, out, hidden, weight, bias)
    if run is None:
        return _linear_gelu(hidden, weight, bias)
    run(hidden, weight, result, before, bias)
    return result, before


def _linear_gelu_gradient_on_gpu(gradient: torch.Tensor, weight: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    gradient, weight, before = gradient.contiguous(), weight.contiguous(), before.contiguous()
    (rows, inner), out = gradient.shape, weight.shape[0]
    run = _product(WITH_GELU_GRADIENT, rows, inner, out, gradient, weight, before)
    if run is None:
        return _linear_gelu_gradient(gradient, weight, before)
    result = torch.empty_like(before)
    run(gradient, weight, result, before)
    return result


def _linear_residual_on_gpu(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, residual: torch.Tensor
) -> torch.Tensor:
    hidden, weight, bias, residual = (operand.contiguous() for operand in (hidden, weight, bias, residual))
    (rows, inner), out = hidden.shape, weight.shape[1]
    run = _product(WITH_RESIDUAL, rows, inner, out, hidden, weight, bias, residual)
    if run is None:
        return _linear_residual(hidden, weight, bias, residual)
    result = torch.empty_like(residual)
    run(hidden, weight, result, residual, bias)
    return result


def _product(kind: _Kind, rows: int, inner: int, out: int, left: torch.Tensor, *others: torch.Tensor) -> Product | None:
    """The product for operands of this size, as they lie in memory; None where cuBLASLt has none."""
    aligned = alignment(left, *others)
    return _prepared(rows, inner, out, *kind, left.dtype, aligned, left.device.index)


@functools.cache
def _prepared(*wanted: Any) -> Product | None:
    """A step has a handful of shapes, so what is prepared for them is kept."""
    try:
        product = Product(*wanted)
        if not torch.cuda.is_current_stream_capturing():
            product.tune()
        return product
    except CublasLtError as error:
        say(f"falling back to separate passes for GELU and residuals: {error}")
        return None


OPERATORS.impl("linear_gelu", _linear_gelu, "CPU")
OPERATORS.impl("linear_gelu_gradient", _linear_gelu_gradient, "CPU")
OPERATORS.impl("linear_residual", _linear_residual, "CPU")
OPERATORS.impl("linear_gelu", _linear_gelu_on_gpu, "CUDA")
OPERATORS.impl("linear_gelu_gradient", _linear_gelu_gradient_on_gpu, "CUDA")
OPERATORS.impl("linear_residual", _linear_residual_on_gpu, "CUDA")
