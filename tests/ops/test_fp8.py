"""fp8 linear layers against bf16 ones, and a model that still learns the same. The kernel is torch's on any device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from commons.model.gpt2 import BLOCK_PARAMETERS, gpt2_functions
from commons.ops.fp8 import E4M3, E5M2, STRIP_ROWS, fp8_linear, quantize
from model_zoo import MODEL_SIZES, build_model


class Called(TorchDispatchMode):
    """The names of all operators called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize(("dtype", "step"), [(E4M3, 2**-3), (E5M2, 2**-2)])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_quantize_keeps_numbers_of_any_size(dtype: torch.dtype, step: float, size: float) -> None:
    tensor = torch.randn(20, 50, generator=torch.Generator().manual_seed(0)) * size
    values, columns, scale, strips = quantize(tensor, dtype)
    assert torch.equal(columns.float(), values.float().t()) and columns.is_contiguous() and not strips.numel()
    assert values.float().abs().max() == torch.finfo(dtype).max or size < 1e-12
    if size > 1e-12:
        large = tensor.abs() > tensor.abs().max() * 2**-5  # smaller ones lose bits
        error = ((values.float() * scale - tensor) / tensor)[large].abs().max().item()
        assert error <= step / 2 * 1.01


def test_quantize_zeros() -> None:
    quantized = quantize(torch.zeros(16, 16), E4M3)
    assert quantized.rows.float().eq(0).all() and quantized.scale.isfinite()


@pytest.mark.parametrize("rows", [STRIP_ROWS - 1, STRIP_ROWS, STRIP_ROWS + 1, 2 * STRIP_ROWS])
def test_sums_over_strips_of_rows(rows: int) -> None:
    tensor = torch.randn(rows, 32, dtype=torch.bfloat16)
    strips = quantize(tensor, E5M2, sums=True).strips
    assert strips.shape == (-(-rows // STRIP_ROWS), 32)
    assert torch.equal(strips[0], tensor[:STRIP_ROWS].float().sum(0))
    torch.testing.assert_close(strips.sum(0), tensor.float().sum(0))


def test_what_cannot_be_cast_is_seen() -> None:
    """A gradient that has overflowed must not become the largest number of fp8."""
    for bad in (float("inf"), float("nan")):
        tensor = torch.ones(16, 16)
        tensor[3, 4] = bad
        assert quantize(tensor, E5M2).rows.float().isnan().any()
        assert quantize(tensor, E5M2).columns.float().isnan().any()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 64), (80, 208), (1024, 1600), (4096, 6400)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.gpu
def test_the_kernel_casts_as_torch_does(rows: int, columns: int, dtype: torch.dtype) -> None:
    tensor = torch.randn(rows, columns).bfloat16()
    tensor[0, 1] = 1000
    for sums in (False, True):
        wanted, got = quantize(tensor, dtype, sums=sums), quantize(tensor.cuda(), dtype, sums=sums, kernel=True)
        assert torch.equal(got.rows.cpu().view(torch.uint8), wanted.rows.view(torch.uint8))
        assert torch.equal(got.columns.cpu().view(torch.uint8), wanted.columns.view(torch.uint8))
        torch.testing.assert_close(got.strips.cpu(), wanted.strips, rtol=1e-5, atol=1e-4)
    tensor[2, 3] = float("inf")
    assert quantize(tensor.cuda(), dtype, kernel=True).columns.float().isnan().any()


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear_and_its_gradients(dtype: torch.dtype, kernel: bool) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 32, 64).to(dtype).requires_grad_()
    weight = (torch.randn(64, 128) * 0.02).to(dtype).requires_grad_()
    bias = torch.randn(128).to(dtype).requires_grad_()
    out = fp8_linear(hidden, weight, bias, kernel=kernel)
    slope = torch.randn_like(out)
    got = torch.autograd.grad(out, (hidden, weight, bias), slope)
    exact = hidden @ weight + bias
    wanted = torch.autograd.grad(exact, (hidden, weight, bias), slope.to(dtype))
    assert out.dtype == torch.bfloat16 and [each.dtype for each in got] == [dtype] * 3
    # about half a step of e4m3 (2**-4) and of e5m2 (2**-3), averaged over random factors
    assert relative(out, exact) < 0.05
    assert [relative(*pair) < 0.08 for pair in zip(got[:2], wanted[:2], strict=True)] == [True, True]
    assert relative(got[2], wanted[2]) < 0.01


@pytest.mark.parametrize("kernels", [False, True])
def test_no_kernel_where_none_is_wanted(kernels: bool) -> None:
    """Triton's need a C compiler, which a machine may lack: fp8 trains there without them."""
    shape = MODEL_SIZES["gpt2_tiny"]
    block = build_model(shape).transformer.h[0]
    parameters = [block.get_parameter(name) for name in BLOCK_PARAMETERS]
    with Called() as called:
        out = gpt2_functions(shape, fp8=True, kernels=kernels).block(torch.randn(2, 32, shape.hidden), *parameters)
        out.float().sum().backward()
    # four layers, each with its input and weight, and in the backward pass the gradient
    assert called.names.count("gemini_gpt2::cast_both_ways") == (12 if kernels else 0)


def test_block_in_fp8_is_the_block_but_for_rounding() -> None:
    shape = MODEL_SIZES["gpt2_tiny"]
    torch.manual_seed(0)
    block = build_model(shape).transformer.h[0]
    parameters = [block.get_parameter(name) for name in BLOCK_PARAMETERS]
    hidden = torch.randn(2, 32, shape.hidden)
    exact, rounded = (gpt2_functions(shape, fp8=fp8).block(hidden, *parameters) for fp8 in (False, True))
    assert 0 < relative(rounded - hidden, exact - hidden) < 0.1
