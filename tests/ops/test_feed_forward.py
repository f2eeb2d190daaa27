"""The feed-forward layer whose GELU and residual are part of its matrix products: the same arithmetic, wherever it
runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from commons.config.schema import TrainConfig
from commons.model.compile import functions_for
from commons.model.gpt2 import BLOCK_PARAMETERS, gpt2_functions
from commons.ops import feed_forward as suite
from commons.ops.activation_checkpointing import MODES
from commons.ops.cublaslt import ALIGNED_BYTES, alignment
from commons.ops.feed_forward import feed_forward
from model_zoo import MODEL_SIZES, build_model

ROWS, WIDTH = 24, 16
gpu = pytest.mark.gpu


def operands(dtype: torch.dtype, device: str = "cpu", rows: int = ROWS, width: int = WIDTH) -> list[torch.Tensor]:
    """Hidden states, both weights and biases, and a residual; no part of the result is small beside another."""
    generator = torch.Generator(device).manual_seed(0)
    states = 2, rows // 2, width
    shapes = states, (width, 4 * width), (4 * width,), (4 * width, width), (width,), states
    factors = 1, width**-0.5, 1, width**-0.5, 1, 1
    return [
        (torch.randn(shape, generator=generator, device=device) * factor).to(dtype).requires_grad_()
        for shape, factor in zip(shapes, factors, strict=True)
    ]


def written_out(hidden, up_weight, up_bias, down_weight, down_bias, residual):
    return residual + functional.gelu(hidden @ up_weight + up_bias, approximate="tanh") @ down_weight + down_bias


def outcome(function: Callable, arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradient of every argument."""
    out = function(*arguments)
    slope = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device)
    return [out, *torch.autograd.grad(out, arguments, slope.to(out.dtype))]


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def exact_outcome(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
    wide = [argument.detach().double().requires_grad_() for argument in arguments]
    return outcome(written_out, wide)


def test_gradients_are_those_of_the_function():
    assert torch.autograd.gradcheck(feed_forward, operands(torch.float64))


def test_operators_are_what_they_declare():
    """Shapes without data, and nothing that is written in secret."""
    with torch.no_grad():
        hidden, weight, bias, *_ = operands(torch.float32)
        hidden = hidden.flatten(0, -2)
        result, before = torch.ops.gemini_gpt2.linear_gelu(hidden, weight, bias)
        residual = torch.randn(len(hidden), 4 * WIDTH)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.gemini_gpt2.linear_residual.default, (hidden, weight, bias, residual), test_utils=checks
        )
        torch.library.opcheck(torch.ops.gemini_gpt2.linear_gelu.default, (hidden, weight, bias), test_utils=checks)
        slope = torch.randn(len(hidden), WIDTH)
        down = torch.randn(4 * WIDTH, WIDTH)
        torch.library.opcheck(
            torch.ops.gemini_gpt2.linear_gelu_gradient.default, (slope, down, before), test_utils=checks
        )
    assert result.shape == before.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_the_same_as_written_out(backend, dtype):
    run = feed_forward if backend is None else torch.compile(feed_forward, backend=backend, fullgraph=True)
    arguments = operands(dtype)
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for got, exact in zip(outcome(run, arguments), exact_outcome(arguments), strict=True):
        assert got.dtype == dtype and error(got, exact) < bound


class Watched(TorchDispatchMode):
    """Which operators run, and of which dtypes their arguments are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gemini_gpt2":
            self.names.add(func._schema.name.partition("::")[2])
            self.dtypes |= {argument.dtype for argument in args}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_narrow_and_gives_wide_gradients(residual_dtype):
    """The residual stays what it is: where it is wide, so is the sum."""
    arguments = operands(torch.float32)
    arguments[-1] = arguments[-1].detach().to(residual_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), Watched() as watched:
        out, *gradients = outcome(feed_forward, arguments)
    assert watched.dtypes == {torch.bfloat16}
    assert ("linear_residual" in watched.names) == (residual_dtype == torch.bfloat16)
    assert out.dtype == residual_dtype
    assert [gradient.dtype for gradient in gradients] == [argument.dtype for argument in arguments]
    for got, exact in zip([out, *gradients], exact_outcome(arguments), strict=True):
        assert error(got, exact) < 1e-2


def test_dropout_spares_the_residual():
    arguments = operands(torch.float32)
    with Watched() as watched:
        out = feed_forward(*arguments, dropout=0.5)
    kept = (out - arguments[-1]).detach()
    assert "linear_residual" not in watched.names
    assert 0.3 < (kept == 0).float().mean() < 0.7
    fed = written_out(*arguments) - arguments[-1]
    torch.testing.assert_close(kept[kept != 0], 2 * fed[kept != 0])


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_block_is_the_same_with_it(backend, recompute):
    shape = MODEL_SIZES["gpt2_tiny"]
    options: Any = {"transform": functools.partial(torch.compile, backend=backend, fullgraph=True)} if backend else {}
    plain, fused = (
        gpt2_functions(shape, recompute=recompute, fused_gelu=fused, **options).block for fused in (False, True)
    )
    torch.manual_seed(0)
    block: Any = build_model(shape).transformer.h[0]  # pyright: ignore
    parameters = [block.get_parameter(name) for name in BLOCK_PARAMETERS]
    for parameter in parameters:  # biases too: new ones are zero
        torch.nn.init.normal_(parameter, std=0.05 if parameter.dim() == 2 else 1.0)
    hidden = torch.randn(2, 8, shape.hidden, requires_grad=True)
    for got, wanted in zip(outcome(fused, [hidden, *parameters]), outcome(plain, [hidden, *parameters]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_only_compiled_blocks_on_gpus_with_the_library_have_it(monkeypatch):
    monkeypatch.setattr("commons.config.resolved.compile_problem", lambda device_type: None)
    monkeypatch.setattr("commons.model.compile.keep_cache", lambda: None)
    asked = []
    monkeypatch.setattr("commons.model.gpt2.gpt2_functions", lambda _, **options: asked.append(options))

    monkeypatch.setattr("commons.model.compile._kernels_fit", lambda: True)

    def has(device_type: str = "cuda", option: str = "fused_gelu", **settings) -> bool:
        config = TrainConfig(model_type="gpt2_tiny", batch_size=2, seq_len=8, **settings).resolve(device_type)
        functions_for(config, device_type)
        return asked[-1].get(option, False)

    prepared = []
    monkeypatch.setattr(suite, "_prepared", lambda *wanted: prepared.append(wanted) or kernel)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    kernel = None
    monkeypatch.setattr(suite, "library", lambda: None)
    assert not has()
    monkeypatch.setattr(suite, "library", object)
    assert not has() and prepared
    kernel = object()
    assert has() and has(precision="fp16") and has(activation_checkpointing="on")
    assert not has("cpu") and not has(compile="off") and not has(precision="fp32") and not has(precision="fp8")
    assert not has(activation_checkpointing="selective")
    assert not has(hidden_size=36, num_heads=4)  # no multiple of 8
    assert (
        has(option="kernels", precision="fp8")
        and not has("cpu", "kernels")
        and not has(option="kernels", compile="off")
    )
    monkeypatch.setattr("commons.model.compile._kernels_fit", lambda: False)
    assert has() and not has(option="kernels")


def test_alignment_is_what_all_addresses_share():
    whole = torch.empty(1024, dtype=torch.uint8)
    shift = -whole.data_ptr() % (2 * ALIGNED_BYTES)
    assert alignment(whole[shift:]) == ALIGNED_BYTES
    assert alignment(whole[shift:], whole[shift + 16 :]) == 16
    assert alignment(whole[shift + 32 :], whole[shift + 2 :]) == 2


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, width", [(2048, 512), (510, 1600), (64, 48)])
def test_on_a_gpu_it_is_as_exact_as_torch(rows, width, dtype, monkeypatch):
    said = []
    monkeypatch.setattr(suite, "say", said.append)
    arguments = operands(dtype, "cuda", rows, width)
    exact = exact_outcome(arguments)
    ours, torchs = outcome(feed_forward, arguments), outcome(written_out, arguments)
    for got, other, wanted in zip(ours, torchs, exact, strict=True):
        assert error(got, wanted) < 1.05 * error(other, wanted) + 1e-5
    assert not said


@gpu
@pytest.mark.parametrize("shift", [1, 4, 8])
def test_on_a_gpu_operands_may_lie_anywhere(shift):
    """As in a chunk: a parameter begins where the one before it ends."""
    aligned = operands(torch.bfloat16, "cuda", 256, 64)
    shifted = []
    for number, argument in enumerate(aligned):
        memory = torch.empty(argument.numel() + 64, dtype=argument.dtype, device="cuda")
        place = memory[shift * (number + 1) :][: argument.numel()].view(argument.shape)
        shifted.append(place.copy_(argument.detach()).requires_grad_())
    for got, exact in zip(outcome(feed_forward, shifted), exact_outcome(aligned), strict=True):
        assert error(got, exact) < 1e-2


@gpu
def test_on_a_gpu_what_the_library_cannot_do_is_done_by_torch(monkeypatch):
    def refuse(*_: object) -> None:
        raise suite.CublasLtError("no kernel for this product")

    said = []
    monkeypatch.setattr(suite, "say", said.append)
    monkeypatch.setattr(suite, "Product", refuse)
    arguments = operands(torch.bfloat16, "cuda", 32, 24)  # a size of its own: what was prepared is kept
    for got, exact in zip(outcome(feed_forward, arguments), exact_outcome(arguments), strict=True):
        assert error(got, exact) < 1e-2
    assert len(said) == 3 and all("falling back to separate passes" in line for line in said)
