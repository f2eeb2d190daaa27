"""Adam for Colossal-AI's optimizers: against torch's own AdamW in double precision, and how few launches it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from commons.colossal.runtime import prepare

prepare("cpu")

from colossalai.kernel.kernel_loader import CPUAdamLoader, FusedOptimizerLoader  # noqa: E402

from commons.colossal import adam_kernels  # noqa: E402
from commons.colossal.adam_kernels import (  # noqa: E402
    AdamSettings,
    CompiledAdam,
    SuiteAdam,
    TensorQuad,
    fused_adam,
    merge_neighbours,
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


def quads(dtype: torch.dtype) -> list[TensorQuad]:
    """Parameters, gradients and moments, each side by side in one piece of memory."""
    generator = torch.Generator().manual_seed(1)
    param, grad, exp_avg, exp_avg_sq = (torch.randn(sum(SIZES), generator=generator) for _ in range(4))
    pieces = (tensor.split(SIZES) for tensor in (param, grad.to(dtype), exp_avg, exp_avg_sq.abs()))
    return list(zip(*pieces, strict=True))


def expected(settings: AdamSettings, dtype: torch.dtype) -> torch.Tensor:
    """The parameters after torch's AdamW or Adam in double precision, from the same start."""
    kind = torch.optim.AdamW if settings.decoupled_weight_decay else torch.optim.Adam
    updated = []
    for param, grad, exp_avg, exp_avg_sq in quads(dtype):
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
@pytest.mark.parametrize("update", [fused_adam, CompiledAdam()], ids=["fused", "compiled"])
def test_update(update: Callable, dtype: torch.dtype) -> None:
    given = quads(dtype)
    update(given, SETTINGS)
    torch.testing.assert_close(
        torch.cat([quad[0] for quad in given]).double(), expected(SETTINGS, dtype), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("change", [{"div_scale": -1.0}, {"decoupled_weight_decay": False}, {"step": 1000}])
def test_settings(change: dict) -> None:
    settings = AdamSettings(**{**vars(SETTINGS), **change})
    given = quads(torch.bfloat16)
    fused_adam(given, settings)
    torch.testing.assert_close(
        torch.cat([quad[0] for quad in given]).double(), expected(settings, torch.bfloat16), rtol=1e-6, atol=1e-6
    )


def test_conversion_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result does not depend on how the converted gradients are cut."""
    whole, cut = quads(torch.bfloat16), quads(torch.bfloat16)
    fused_adam(whole, SETTINGS)
    monkeypatch.setattr(adam_kernels, "CONVERSION_ELEMENTS", 1000)
    fused_adam(cut, SETTINGS)
    for one, other in zip(whole, cut, strict=True):
        assert torch.equal(one[0], other[0])


def test_neighbours_become_one_run() -> None:
    given = quads(torch.bfloat16)
    assert [quad[0].numel() for quad in merge_neighbours(given)] == [sum(SIZES)]
    # a gap in any of the four is a border
    first, second, *rest = given
    apart = [first, (second[0], second[1].clone(), second[2], second[3]), *rest]
    assert [quad[0].numel() for quad in merge_neighbours(apart)] == [SIZES[0], SIZES[1], SIZES[2] + SIZES[3]]


def test_neighbours_by_chance_stay_apart() -> None:
    """Side by side in memory but of two storages, as a GPU's allocator places tensors: no view spans both."""
    whole = torch.arange(8.0)
    storage = whole.untyped_storage()
    parts = [torch.frombuffer(whole.numpy().data, dtype=torch.float32, count=4, offset=at) for at in (0, 16)]
    assert parts[0].data_ptr() + parts[0].nbytes == parts[1].data_ptr() and storage.nbytes() == 32
    quads_of_one = [(part, part, part, part) for part in parts]
    assert [quad[0].numel() for quad in merge_neighbours(quads_of_one)] == [4, 4]


def test_bf16_gradients_on_the_host_are_divided() -> None:
    """The fault that SuiteAdam mends: upstream ignores clipping where bf16 gradients lie on the host."""

    def updated(optimizer_type: type, div_scale: float) -> torch.Tensor:
        param = torch.nn.Parameter(torch.ones(64))
        optimizer = optimizer_type([param], lr=0.1, eps=1.0, weight_decay=0.0)
        param.grad = torch.full((64,), 4.0)
        param.grad.data = param.grad.data.bfloat16()  # as Gemini sets it, past torch's check of the dtype
        optimizer.step(div_scale=div_scale)
        return param.detach()

    assert not torch.equal(updated(SuiteAdam, -1), updated(SuiteAdam, 4.0))
    from colossalai.nn.optimizer import HybridAdam

    if not torch.equal(updated(HybridAdam, -1), updated(HybridAdam, 4.0)):
        pytest.fail("Colossal-AI divides them itself now: SuiteAdam.torch_adam_update can go")


def test_states_lie_side_by_side() -> None:
    params = [torch.nn.Parameter(torch.randn(size)) for size in (8, 16)]
    optimizer = SuiteAdam(params, lr=0.1)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    first, second = (optimizer.state[param]["exp_avg"] for param in params)
    assert first.data_ptr() + first.nbytes == second.data_ptr()
    assert optimizer.updates == 1 and all(optimizer.state[param]["step"] == 1 for param in params)


def test_loaders_hand_out_torch_kernels() -> None:
    """Nothing there could look for nvcc or a compiler."""
    for loader in (FusedOptimizerLoader, CPUAdamLoader):
        assert [extension.__module__ for extension in loader.REGISTRY] == ["commons.colossal.adam_kernels"]
        assert loader().load() is not None


def test_numbers_of_the_compiled_kernel() -> None:
    numbers = CompiledAdam._numbers(SETTINGS, torch.device("cpu")).tolist()
    assert numbers[0] == pytest.approx(1 / 7)
    assert numbers[1] == pytest.approx(1e-2 / (1 - 0.9**3))
    assert numbers[5] == pytest.approx(math.sqrt(1 - 0.95**3))
