"""Adam for Colossal-AI's optimizers: against torch's own AdamW in double precision, and how few launches it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from commons.plans.colossal.runtime import prepare

prepare("cpu")

from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader  # noqa: E402

from commons.plans.colossal import adam_kernels  # noqa: E402
from commons.plans.colossal.adam_kernels import (  # noqa: E402
    AdamSettings,
    AdamSlot,
    CompiledAdam,
    fused_adam,
)

SIZES = [2_000_000, 99_936, 64, 1]
SETTINGS = AdamSettings(
    step=3,
    lr=1e-2,
    beta1=0.9,
    beta2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    decoupled_weight_decay=True,
    div_scale=7.0,
)


def slots(dtype: torch.dtype, weights: str = "none") -> list[AdamSlot]:
    """Parameters, gradients and moments. ``weights``: are written nowhere, over the gradient ("gradient") or
    "apart".
    """
    generator = torch.Generator().manual_seed(1)
    param, grad, exp_avg, exp_avg_sq = (torch.randn(sum(SIZES), generator=generator) for _ in range(4))
    pieces = (tensor.split(SIZES) for tensor in (param, grad.to(dtype), exp_avg, exp_avg_sq.abs()))
    written = {"none": lambda grad: None, "gradient": lambda grad: grad, "apart": torch.empty_like}[weights]
    return [AdamSlot(p, g, m, v, written(g)) for p, g, m, v in zip(*pieces, strict=True)]


def expected(settings: AdamSettings, dtype: torch.dtype) -> torch.Tensor:
    """The parameters after torch's AdamW or Adam in double precision, from the same start."""
    kind = torch.optim.AdamW if settings.decoupled_weight_decay else torch.optim.Adam
    updated = []
    for param, grad, exp_avg, exp_avg_sq, _ in slots(dtype):
        leaf = torch.nn.Parameter(param.double())
        leaf.grad = grad.double() / (settings.div_scale if settings.div_scale > 0 else 1.0)
        optimizer = kind(
            [leaf],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            weight_decay=settings.weight_decay,
        )
        optimizer.state[leaf] = {
            "step": torch.tensor(float(settings.step - 1)),
            "exp_avg": exp_avg.double(),
            "exp_avg_sq": exp_avg_sq.double(),
        }
        optimizer.step()
        updated.append(leaf.detach())
    return torch.cat(updated)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weights", ["none", "gradient", "apart"])
@pytest.mark.parametrize("update", [fused_adam, CompiledAdam()], ids=["fused", "compiled"])
def test_update(update: Callable, weights: str, dtype: torch.dtype) -> None:
    given = slots(dtype, weights)
    update(given, SETTINGS)
    updated = torch.cat([slot.param for slot in given])
    torch.testing.assert_close(updated.double(), expected(SETTINGS, dtype), rtol=1e-6, atol=1e-6)
    if weights != "none":
        assert torch.equal(torch.cat([slot.weights for slot in given]), updated.to(dtype))  # pyright: ignore


@pytest.mark.parametrize("change", [{"div_scale": -1.0}, {"decoupled_weight_decay": False}, {"step": 1000}])
def test_settings(change: dict) -> None:
    settings = AdamSettings(**{**vars(SETTINGS), **change})
    given = slots(torch.bfloat16)
    fused_adam(given, settings)
    torch.testing.assert_close(
        torch.cat([slot.param for slot in given]).double(), expected(settings, torch.bfloat16), rtol=1e-6, atol=1e-6
    )


def test_conversion_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how the converted gradients are cut."""
    whole, cut = slots(torch.bfloat16, "gradient"), slots(torch.bfloat16, "gradient")
    fused_adam(whole, SETTINGS)
    monkeypatch.setitem(adam_kernels.CONVERSION_ELEMENTS, "cpu", 1000)
    fused_adam(cut, SETTINGS)
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one.param, other.param) and torch.equal(one.grad, other.grad)


def test_loaders_hand_out_torch_kernels() -> None:
    """Nothing there could look for nvcc or a compiler."""
    for loader in (FusedOptimizerLoader, CPUAdamLoader):
        assert [extension.__module__ for extension in loader.REGISTRY] == ["commons.plans.colossal.adam_kernels"]
        assert loader().load() is not None


def test_numbers_of_the_compiled_kernel() -> None:
    numbers = CompiledAdam._numbers(SETTINGS, torch.device("cpu")).tolist()
    assert numbers[0] == pytest.approx(1 / 7)
    assert numbers[1] == pytest.approx(1e-2 / (1 - 0.9**3))
    assert numbers[5] == pytest.approx(math.sqrt(1 - 0.95**3))
