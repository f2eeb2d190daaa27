"""All of --seed counts: numbers that are drawn on the host from seeds 2**32 apart differ, and both ends work."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from commons.cli.limits import LIMITS
from commons.data.random_tokens import random_tokens
from commons.data.seeds import folded
from commons.distributed.layout import Place
from commons.distributed.seeding import seed_generators
from commons.model.initial_weights import seeded_init_
from model_zoo import MODEL_SIZES, build_model

CPU = torch.device("cpu")
LAST = int(LIMITS["seed"].below or 0) - 1
SEEDS = (0, 42, 42 + 2**32, 42 + 2**33, 42 + 2**62, LAST - 1, LAST)


def tokens(seed: int, rank: int = 0) -> torch.Tensor:
    ranks: Any = {"data_parallel_rank": rank, "data_parallel_size": 2}
    return next(random_tokens(batch_size=2, seq_len=16, vocab=50257, seed=seed, device=CPU, **ranks))


def weights(seed: int) -> torch.Tensor:
    model = build_model(dataclasses.replace(MODEL_SIZES["gpt2_tiny"], layers=1))
    seeded_init_(model, seed, CPU)
    return model.get_parameter("transformer.h.0.attn.c_attn.weight").detach().clone()


def drawn(seed: int) -> torch.Tensor:
    seed_generators(seed, Place(data=0, pipeline=0, tensor=0))
    return torch.rand(8)


@pytest.mark.parametrize("draw", [tokens, weights, drawn])
def test_no_two_seeds_draw_the_same(draw) -> None:
    found = [draw(seed) for seed in SEEDS]
    for (one, first), (other, second) in itertools.combinations(zip(SEEDS, found, strict=True), 2):
        assert not torch.equal(first, second), (one, other)
    assert torch.equal(found[0], draw(SEEDS[0]))


def test_the_last_seed_serves_every_rank() -> None:
    assert not torch.equal(tokens(LAST, 0), tokens(LAST, 100_000))


def test_seeds_of_32_bits_draw_what_they_always_did() -> None:
    assert [folded(seed) for seed in (0, 42, 2**32 - 1)] == [0, 42, 2**32 - 1]
    assert all(0 <= folded(seed) < 2**63 for seed in SEEDS)
