"""Initial weights: a function of the seed and the parameter's name, and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from commons.model.initial_weights import decay_groups, seeded_init_
from commons.plans.colossal.runtime import prepare
from model_zoo import MODEL_SIZES, build_model

SHAPE = MODEL_SIZES["gpt2_tiny"]
CPU = torch.device("cpu")


def weights(seed: int = 1, round_to: torch.dtype | None = None, order: int = 1) -> dict[str, torch.Tensor]:
    model = build_model(SHAPE)
    named = list(model.named_parameters())
    if order < 0:  # draw in the opposite order
        model.named_parameters = lambda: reversed(named)  # pyright: ignore
    seeded_init_(model, seed, CPU, round_to)
    return {name: param.detach().clone() for name, param in named}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_depends_on_the_seed_alone() -> None:
    assert equal(weights(), weights())
    assert equal(weights(), weights(order=-1))
    assert not equal(weights(1), weights(2))


def test_no_two_parameters_are_alike() -> None:
    matrices = [param.flatten()[:64] for param in weights().values() if param.ndim == 2]
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == len(matrices) == 2 + 4 * SHAPE.layers


def test_distribution() -> None:
    for name, param in weights().items():
        if param.ndim == 2:
            std = 0.02 / math.sqrt(2 * SHAPE.layers) if name.endswith("c_proj.weight") else 0.02
            assert param.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(param.mean().item()) < 4 * std / math.sqrt(param.numel()), name
        else:
            assert torch.equal(param, torch.full_like(param, float(".ln_" in name and name.endswith("weight")))), name


def test_rounding() -> None:
    rounded = weights(round_to=torch.bfloat16)
    assert all(torch.equal(param, param.bfloat16().float()) for param in rounded.values())
    assert not equal(rounded, weights())


def test_lazy_model_gets_the_same_weights() -> None:
    prepare("cpu")
    from colossalai.lazy import LazyInitContext

    with LazyInitContext(default_device=CPU):
        model = build_model(SHAPE)
    seeded_init_(model, 1, CPU)
    LazyInitContext.materialize(model)
    assert equal(weights(), dict(model.named_parameters()))


def test_biases_and_norms_do_not_decay() -> None:
    decaying, kept = decay_groups(build_model(SHAPE), 0.1)
    assert decaying["weight_decay"] == 0.1 and {param.ndim for param in decaying["params"]} == {2}
    assert kept["weight_decay"] == 0.0 and {param.ndim for param in kept["params"]} == {1}
