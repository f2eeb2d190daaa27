"""What is said to be sharded is: elements held per rank and sent per step, counted on two ranks for every plan and
placement, against the table of plans (which tests/test_docs.py holds to the README's).

A plan that shards nothing, or sends gradients twice, trains the same model: no loss can tell.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

import pytest
from suite_runs import REPOSITORY, torchrun
from workers.sharding_worker import Seen

from commons.config.schema import PLACEMENTS
from commons.plans.registry import MODEL_STATES, PLANS

pytestmark = pytest.mark.timeout(200)  # the first test waits for the one run of all cases

RANKS = 2
# gpt2_tiny by hand: 1,000 tokens padded to 1,024 and 128 positions of 64, four blocks, the last norm
WHOLE = (1024 + 128) * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 2 * 64
# Gemini's chunks, one per block, are as large as a block; those of the embedding and the rest are padded
CHUNKS = 315_456
GEMINI = "--distplan CAI_Gemini --blocks_per_chunk 1 --max_prefetch"


@dataclass(frozen=True)
class Claim:
    """What one case is to hold and to send.

    Attributes:
        sharded: which of MODEL_STATES.
        reduced: elements of gradients that go into all-reduces, or into reduce-scatters where they are sharded.
        spread: elements of parameters, gathered or broadcast, at least and at most.
        on_host: elements of optimizer states on the host, at least and at most.
        ahead: most gathers begun ahead at one time.
    """

    sharded: tuple[str, ...]
    reduced: int
    spread: tuple[int, int] = (0, 0)
    on_host: tuple[int, int] = (0, 0)
    ahead: int = 0


def of(plan: str) -> tuple[str, ...]:
    return PLANS[plan].sharded


# ZeroRedundancyOptimizer's broadcasts of 64 elements and fewer are not counted: 26 of norms and biases
BROADCAST = WHOLE - 26 * 64
# every chunk for either pass but the last one of the first, the embedding's for the head too
GATHERED = (2 * CHUNKS - 73_856, 3 * CHUNKS)
ALL_GATHERED = (WHOLE, WHOLE)
ALL_OF_THE_CHUNKS = (CHUNKS // RANKS, CHUNKS // RANKS)
HALF_OF_THE_CHUNKS = (CHUNKS // RANKS * 2 // 5, CHUNKS // RANKS // 2)  # whole chunks, half of the bytes at most

# Two micro-batches are accumulated where a plan can keep gradients to itself until the last one.
CASES: dict[str, Claim] = {
    "--distplan Pytorch_DDP --grad_accum 2": Claim(of("Pytorch_DDP"), WHOLE),
    "--distplan Pytorch_ZeRO --grad_accum 2": Claim(of("Pytorch_ZeRO"), WHOLE, (BROADCAST, BROADCAST)),
    # the blocks are gathered for both passes of both micro-batches, the rest once and kept
    "--distplan Pytorch_FSDP --grad_accum 2": Claim(of("Pytorch_FSDP"), WHOLE, (3 * WHOLE, 4 * WHOLE)),
    "--distplan CAI_ZeRO1 --grad_accum 2": Claim(of("CAI_ZeRO1"), WHOLE, ALL_GATHERED),
    # nobody has room for a whole gradient to wait in
    "--distplan CAI_ZeRO2 --grad_accum 2": Claim(of("CAI_ZeRO2"), 2 * WHOLE, ALL_GATHERED),
    "--distplan CAI_Hybrid --zero_stage 0": Claim((), WHOLE, (0, WHOLE // 4)),  # torch's DDP sends a buffer
    "--distplan CAI_Hybrid --grad_accum 2": Claim(of("CAI_Hybrid"), WHOLE, ALL_GATHERED),
    "--distplan CAI_Hybrid --zero_stage 2": Claim(("gradients", "optimizer states"), WHOLE, ALL_GATHERED),
    f"{GEMINI} 0": Claim(of("CAI_Gemini"), CHUNKS, GATHERED),
    f"{GEMINI} 1 --placement cuda": Claim(of("CAI_Gemini"), CHUNKS, GATHERED, ahead=1),
    f"{GEMINI} 2 --placement cpu": Claim(of("CAI_Gemini"), CHUNKS, GATHERED, ALL_OF_THE_CHUNKS, ahead=2),
    f"{GEMINI} 2 --placement const": Claim(of("CAI_Gemini"), CHUNKS, GATHERED, HALF_OF_THE_CHUNKS, ahead=2),
    # what fits is not freed after the forward pass, and what the first step kept free begins on the host
    f"{GEMINI} 2 --placement auto": Claim(
        of("CAI_Gemini"), CHUNKS, (CHUNKS, 3 * CHUNKS), (0, CHUNKS // RANKS), ahead=2
    ),
    f"{GEMINI} 2 --shard_param_frac 0": Claim(of("CAI_Gemini"), CHUNKS, (CHUNKS, CHUNKS), ahead=2),
}


@functools.cache
def counted() -> dict[str, list[Seen]]:
    """What both ranks saw, by case; the one run of all of them."""
    code, console = torchrun(REPOSITORY / "tests" / "workers" / "sharding_worker.py", RANKS, *CASES)
    assert code == 0, console
    lines = [line.partition("SEEN ")[2] for line in console.splitlines() if "SEEN " in line]
    seen = sorted((Seen(**json.loads(line)) for line in lines), key=lambda each: each.rank)
    return {flags: [each for each in seen if each.flags == flags] for flags in CASES}


def whole(flags: str) -> int:
    return CHUNKS if "CAI_Gemini" in flags else WHOLE


@pytest.mark.parametrize("flags", CASES)
def test_every_rank_holds_its_part_of_what_is_sharded_and_the_whole_of_the_rest(flags: str) -> None:
    ranks = counted()[flags]
    assert [seen.rank for seen in ranks] == [0, 1]
    for state, name in zip(MODEL_STATES, ("parameters", "gradients", "states"), strict=True):
        held = [getattr(seen, name) for seen in ranks]
        if state not in CASES[flags].sharded:
            assert held == [WHOLE, WHOLE], (name, held)
        elif name == "states" and "CAI_Gemini" in flags:  # of parameters, which may end anywhere in a chunk
            assert sum(held) == WHOLE and max(held) < 0.56 * WHOLE, (name, held)
        else:
            assert held == [whole(flags) // RANKS] * RANKS, (name, held)


@pytest.mark.parametrize("flags", CASES)
def test_gradients_and_parameters_are_sent_as_often_as_they_need_to_be(flags: str) -> None:
    claim = CASES[flags]
    for seen in counted()[flags]:
        scatters = "gradients" in claim.sharded
        assert (seen.scattered, seen.all_reduced) == ((claim.reduced, 0) if scatters else (0, claim.reduced)), seen
        assert claim.spread[0] <= seen.gathered + seen.broadcast <= claim.spread[1], seen


@pytest.mark.parametrize("flags", [flags for flags in CASES if "CAI_Gemini" in flags])
def test_gemini_gathers_ahead_and_offloads_as_it_is_told(flags: str) -> None:
    claim = CASES[flags]
    for seen in counted()[flags]:
        assert seen.most_ahead == claim.ahead and (seen.ahead > 0) == (claim.ahead > 0), seen
        assert claim.on_host[0] <= seen.host_states <= claim.on_host[1], seen


def test_the_cases_have_every_plan_and_every_placement() -> None:
    words = [flags.split() for flags in CASES]
    assert {case[case.index("--distplan") + 1] for case in words} == set(PLANS)
    placed = {case[case.index("--placement") + 1] for case in words if "--placement" in case}
    assert placed | {"static"} == set(PLACEMENTS)
