"""The layer norm that begins a residual branch: the same as torch's, with the sums for the biases around it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional

from commons.model.gpt2 import BLOCK_PARAMETERS, gpt2_functions
from commons.ops.activation_checkpointing import MODES
from commons.ops.layer_norm import norm_and_residual, strip_rows
from model_zoo import MODEL_SIZES, build_model

EPS = 1e-5
GPU = pytest.param("cuda", marks=pytest.mark.gpu)
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def operands(dtype: torch.dtype, device: str, rows: int, width: int) -> list[torch.Tensor]:
    """Hidden states, what is added to them before its bias, weight and bias of the norm, and both biases around it."""
    generator = torch.Generator(device).manual_seed(0)
    states = 2, rows // 2, width
    shapes = states, states, (width,), (width,), (width,), (width,)
    return [torch.randn(shape, generator=generator, device=device).to(dtype).requires_grad_() for shape in shapes]


def suites(hidden, added, weight, bias, before, later):
    normed, residual = norm_and_residual(hidden, added + before.detach(), weight, bias, before, later, eps=EPS)
    return normed * 2, residual + later.detach() + functional.silu(normed)


def torchs(hidden, added, weight, bias, before, later):
    residual = hidden + added + before
    normed = functional.layer_norm(residual, weight.shape, weight, bias, EPS)
    return normed * 2, residual + later + functional.silu(normed)


def outcome(function: Any, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """Both results and the gradient of every argument."""
    outs = function(*arguments)
    generator = torch.Generator(outs[0].device).manual_seed(1)
    slopes = [torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype) for out in outs]
    return [*outs, *torch.autograd.grad(outs, arguments, slopes)]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("rows, width", [(64, 64), (70, 48), (34, 1600), (10, 4096), (6, 5120)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_those_of_the_written_out_norm(device, dtype, rows, width):
    arguments = operands(dtype, device, rows, width)
    exact = outcome(torchs, [argument.detach().double().requires_grad_() for argument in arguments])
    for got, wanted in zip(outcome(suites, arguments), exact, strict=True):
        assert got.dtype == dtype
        assert ((got.double() - wanted).norm() / wanted.norm()).item() < BOUNDS[dtype]


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_without_biases_only_its_own_are_given_gradients(device):
    hidden, _, weight, bias, *_ = operands(torch.float32, device, 32, 64)
    arguments = [hidden, weight, bias]

    def plain(hidden, weight, bias):
        return functional.layer_norm(hidden, weight.shape, weight, bias, EPS), hidden

    def ours(hidden, weight, bias):
        return norm_and_residual(hidden, None, weight, bias, eps=EPS)

    for got, wanted in zip(outcome(ours, arguments), outcome(plain, arguments), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_operators_are_what_they_declare():
    hidden, added, weight, *_ = (tensor.detach() for tensor in operands(torch.float32, "cpu", 40, 16))
    hidden, added = hidden.flatten(0, 1), added.flatten(0, 1)
    for other in (None, added):
        torch.library.opcheck(
            torch.ops.gemini_gpt2.norm.default,
            (hidden, other, weight, weight, EPS),
            test_utils=("test_schema", "test_faketensor"),
        )
    _, _, mean, scale = torch.ops.gemini_gpt2.norm(hidden, None, weight, weight, EPS)
    for sums in (2, 4):
        arguments = hidden, hidden, mean, scale, weight, hidden, sums
        torch.library.opcheck(
            torch.ops.gemini_gpt2.norm_gradient.default, arguments, test_utils=("test_schema", "test_faketensor")
        )
        assert torch.ops.gemini_gpt2.norm_gradient(*arguments)[1].shape == (-(-40 // strip_rows(16)), sums, 16)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_a_block_is_the_same_with_it(backend, recompute, dropout):
    shape = MODEL_SIZES["gpt2_tiny"]
    torch._dynamo.reset()
    options: Any = {"transform": functools.partial(torch.compile, backend=backend, fullgraph=True)} if backend else {}
    plain, ours = (
        gpt2_functions(shape, recompute=recompute, dropout=dropout, kernels=kernels, fused_gelu=kernels, **options)
        for kernels in (False, True)
    )
    torch.manual_seed(0)
    block: Any = build_model(shape).transformer.h[0]  # pyright: ignore
    parameters = [block.get_parameter(name) for name in BLOCK_PARAMETERS]
    for parameter in parameters:  # biases too: new ones are zero
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() == 2 else 1.0)
    hidden = torch.randn(2, 8, shape.hidden, requires_grad=True)

    def block_outcome(functions: Any) -> list[torch.Tensor]:
        torch.manual_seed(3)  # of the dropout
        return outcome(lambda *arguments: (functions.block(*arguments),), [hidden, *parameters])

    for got, wanted in zip(block_outcome(ours), block_outcome(plain), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
