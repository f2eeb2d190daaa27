"""The size of a gradient against float64, and clipping against torch's."""

from __future__ import annotations

import pytest
import torch

from commons.ops.gradient_norm import clip_, sum_of_squares

CPU = torch.device("cpu")


def embedding_gradient(rows: int, device: str = "cpu") -> torch.Tensor:
    """Few rows that were looked up, and many that are almost nothing."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(rows, 768, generator=generator).mul_(1e-3)
    gradient[-16:] *= 1000
    return gradient.to(device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rows", [1, 3, 1024, 50304])
def test_every_size_is_as_float64_has_it(rows: int, device: str) -> None:
    gradient = embedding_gradient(rows, device)
    truth = gradient.double().square().sum()
    found = sum_of_squares([gradient], gradient.device)
    assert found.dtype == torch.float64
    assert abs(found - truth) < 1e-6 * truth


def test_one_sum_in_fp32_would_not_do() -> None:
    """What this module is for: on a CPU the same numbers at once are wrong in the fifth digit."""
    gradient = embedding_gradient(50304)
    truth = gradient.double().square().sum()
    assert abs(gradient.norm().double().square() - truth) > 1e-5 * truth


def test_of_many_tensors_none_and_empty_ones() -> None:
    tensors = [torch.full((5, 300), 2.0), torch.zeros(0, 7), torch.ones(3).bfloat16(), torch.tensor(4.0)]
    assert sum_of_squares(tensors, CPU).item() == pytest.approx(4 * 1500 + 3 + 16, rel=1e-6)
    assert sum_of_squares([tensors[0].t()], CPU).item() == pytest.approx(6000, rel=1e-6)  # not contiguous
    assert sum_of_squares([], CPU) == 0 and sum_of_squares([tensors[1]], CPU) == 0


@pytest.mark.parametrize("max_norm", [0.5, 1e30])
def test_clips_as_torch_does(max_norm: float) -> None:
    gradients = [torch.randn(40, 50), torch.randn(7)]
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    clip_(gradients, sum_of_squares(gradients, CPU).sqrt(), max_norm)
    assert sum_of_squares([parameter.grad for parameter in parameters], CPU).sqrt() <= min(norm, max_norm) * 1.00001  # pyright: ignore
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_an_infinite_norm_hides_nothing() -> None:
    """The infinity stays where it was, as NaN: whoever looks at the loss will see it."""
    gradients = [torch.tensor([1.0, float("inf")])]
    norm = sum_of_squares(gradients, CPU).sqrt()
    clip_(gradients, norm, 1.0)
    assert norm.isinf() and gradients[0].isnan().any()
