"""Seeds against values that were written down once: the same settings draw the same numbers tomorrow."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from commons.distributed.layout import Place
from commons.distributed.seeding import own_part, seed_generators, seed_of


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seeds_are_of_63_bits_and_differ_by_seed_and_purpose() -> None:
    seeds = [seed_of(seed, purpose) for seed in (0, 1, 42, 2**63 - 1) for purpose in ("copy 0, stage 0", "shuffling")]
    assert len(set(seeds)) == 8 and all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60, "the upper bits are used"


def test_the_seed_of_42_is_this() -> None:
    """blake2b of 8 bytes over "42: copy 0, stage 0", its first byte the lowest, without the lowest bit."""
    assert seed_of(42, "copy 0, stage 0") == 6_128_984_271_788_935_333


@pytest.mark.parametrize("other", [Place(1, 0, 0), Place(0, 1, 0)])
def test_copies_and_stages_draw_their_own_numbers(other: Place) -> None:
    seed_generators(42, Place(0, 0, 0))
    here = drawn()
    seed_generators(42, other)
    assert all(one != another for one, another in zip(here, drawn(), strict=True))


def test_parts_of_one_matrix_draw_the_same_numbers_and_a_second_time_too() -> None:
    seen = []
    for part in (0, 1, 0):
        seed_generators(42, Place(3, 1, part))
        seen.append(drawn())
    assert seen[0] == seen[1] == seen[2]
    derived = seed_of(42, "copy 3, stage 1")
    expected = random.Random(derived).random(), float(np.random.RandomState(derived % 2**32).rand())
    assert seen[0][:2] == expected
    assert seen[0][2] == float(torch.rand((), generator=torch.Generator().manual_seed(derived)))


def test_own_parts_seeds_use_62_bits() -> None:
    torch.manual_seed(0)
    expected = torch.randint(2**62, (2,), generator=torch.Generator().manual_seed(0))
    for part in (0, 1):
        torch.manual_seed(0)
        with own_part(part, 2, torch.device("cpu")):
            found = torch.rand(3)
        assert torch.equal(found, torch.rand(3, generator=torch.Generator().manual_seed(int(expected[part]))))
