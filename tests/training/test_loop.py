"""A step's record, the header, the learning rate and the data order, against numbers that were worked out by hand.

None of the expected values comes from the suite: no comparison of a run with its reference can judge what both share.
"""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from suite_runs import REPOSITORY, torchrun

from commons.config.schema import TrainConfig
from commons.distributed.device import Device
from commons.distributed.layout import place
from commons.model.initial_weights import decay_groups
from commons.plans.registry import PLANS
from commons.plans.trainable import Update
from commons.reporting.console_layout import header_lines
from commons.reporting.record import StepRecord
from commons.training.loop import RankStep, batches, make_record
from commons.training.schedule import learning_rate
from commons.training.session import MOST_PLACE_LINES, Session, place_lines
from model_zoo import MODEL_SIZES, ModelShape, build_model

NAN, INF = math.nan, math.inf


def session_of(
    world_size: int, rank: int = 0, peak_flops: float | None = None, shape: ModelShape | None = None, **settings: Any
) -> Session:
    """A session whose model nobody asks for."""
    config = TrainConfig(distplan="CAI_Hybrid", precision="fp32", **settings).resolve("cpu")
    device = Device("cpu", "a CPU", rank, rank, world_size)
    shape = shape or config.shape()
    return Session(config, device, PLANS["CAI_Hybrid"], shape, cast("Any", None), peak_flops)


# --- The record of invented ranks -------------------------------------------------------------------------

# Parameters that count for FLOPs, with hidden size 64: 2 blocks of 12 x 64 x 64 weights and 13 x 64 biases and norms,
# the last norm's 2 x 64, 1,000 tokens of 64: 99,968 + 128 + 64,000 = 164,096.
SHAPE = ModelShape(layers=2, hidden=64, heads=4, positions=128, vocab=1000)
LAYOUT: dict[str, Any] = {"tp_degree": 2, "pp_degree": 2, "batch_size": 3, "grad_accum": 5, "seq_len": 64}
TOKENS = 3 * 5 * 64 * 2  # two data-parallel copies of four ranks each
MODEL_FLOPS = 6 * 164_096 + 12 * 2 * 64 * 64
# blocks 24 x 64 x 64 and the head of 1,024 columns three times; attention 4 x 64 x 64, backward two and a half times
HARDWARE_FLOPS = 3 * (2 * 98_304 + 2 * 64 * 1024) + 2 * (16_384 + 40_960)


def rank_step(**seen: float) -> RankStep:
    zeros = dict.fromkeys(RankStep._fields, 0.0) | {"step_seconds": 0.25}
    return RankStep(**{**zeros, **seen})


def eight_ranks() -> list[RankStep]:
    """Two copies of two stages of two parts: ranks 2, 3, 6 and 7 are last stages. Rank 5 is the slowest."""
    losses = [9.0, 9.0, 4.0, 4.0, 9.0, 9.0, 6.0, 6.0]
    ranks = [
        rank_step(
            loss=loss,
            step_seconds=0.25 + rank / 100,
            forward_seconds=0.1,
            backward_seconds=0.2,
            optimizer_seconds=0.01 * (rank + 1),
            device_allocated_mib=100.0 + rank,
            device_reserved_mib=300.0 - rank,
            device_peak_mib=200.0 - abs(rank - 3),
            host_mib=1000.0 - abs(rank - 6),
        )
        for rank, loss in enumerate(losses)
    ]
    ranks[5] = ranks[5]._replace(step_seconds=0.5, optimizer_seconds=0.002)
    return ranks


def test_the_record_of_eight_ranks() -> None:
    session = session_of(8, peak_flops=MODEL_FLOPS * TOKENS, shape=SHAPE, **LAYOUT)
    record = make_record(session, 7, 3e-4, Update(grad_norm=1.5, skipped=False), 2, eight_ranks())
    assert TOKENS == 1920 and MODEL_FLOPS == 1_082_880 and HARDWARE_FLOPS == 1_097_728
    assert dataclasses.asdict(record) == {
        "step": 7,
        "loss": 5.0,
        "lr": 3e-4,
        "grad_norm": 1.5,
        "step_seconds": 0.5,
        "forward_seconds": None,
        "backward_seconds": None,
        "optimizer_seconds": 0.002,
        "tokens_per_second": 3840.0,
        "model_tflops_per_device": pytest.approx(1_082_880 * 1920 / 0.5 / 8 / 1e12, rel=1e-12),
        "hardware_tflops_per_device": pytest.approx(1_097_728 * 1920 / 0.5 / 8 / 1e12, rel=1e-12),
        "mfu": pytest.approx(2 / 8, rel=1e-12),  # all ranks together do two peaks of one
        "skipped_steps": 2,
        "device_memory_allocated_mib": 107.0,
        "device_memory_reserved_mib": 300.0,
        "device_memory_peak_mib": 200.0,
        "device_memory_peak_rank": 3,
        "host_memory_mib": 1000.0,
        "host_memory_peak_rank": 6,
        "nonfinite_loss_ranks": [],
        "tokens_seen": 7 * 1920,
        "eval_loss": None,  # nothing was evaluated after this step
        "eval_perplexity": None,
        "eval_seconds": None,
    }


def test_the_record_without_a_pipeline_has_the_slowest_rank_s_phases() -> None:
    session = session_of(2, shape=SHAPE, batch_size=3, seq_len=64)
    ranks = [
        rank_step(step_seconds=0.3, forward_seconds=0.1, backward_seconds=0.15, optimizer_seconds=0.05),
        rank_step(step_seconds=0.4, forward_seconds=0.05, backward_seconds=0.05, optimizer_seconds=0.3),
    ]
    record = make_record(session, 1, 1e-3, Update(None, skipped=True), 1, ranks)
    phases = (record.forward_seconds, record.backward_seconds, record.optimizer_seconds)
    assert (record.step_seconds, *phases) == (0.4, 0.05, 0.05, 0.3)
    assert record.tokens_per_second == pytest.approx(2 * 3 * 64 / 0.4)
    assert (record.mfu, record.grad_norm, record.skipped_steps) == (None, None, 1)


def test_the_record_on_cpus_knows_no_device_memory() -> None:
    unknown = dict.fromkeys(("device_allocated_mib", "device_reserved_mib", "device_peak_mib"), NAN)
    ranks = [rank_step(host_mib=mib, **unknown) for mib in (10.0, 30.0, 20.0)]
    record = make_record(session_of(3, shape=SHAPE), 1, 0.0, Update(None, False), 0, ranks)
    assert {getattr(record, name) for name in StepRecord.__annotations__ if name.startswith("device_")} == {None}
    assert (record.host_memory_mib, record.host_memory_peak_rank) == (30.0, 1)


def test_the_record_blames_the_ranks_whose_loss_is_not_finite() -> None:
    session = session_of(8, shape=SHAPE, **LAYOUT)
    losses = [NAN, 1.0, 1.0, NAN, 1.0, 1.0, INF, 1.0]
    ranks = [seen._replace(loss=loss) for seen, loss in zip(eight_ranks(), losses, strict=True)]
    record = make_record(session, 1, 0.0, Update(None, False), 0, ranks)
    assert record.nonfinite_loss_ranks == [3, 6], "rank 0 is a first stage and has no loss"
    assert math.isnan(record.loss)


# --- A real record ----------------------------------------------------------------------------------------

TINY_PARAMETERS = 1000 * 64 + 4 * (12 * 64 * 64 + 13 * 64) + 2 * 64  # without positions
FLAGS = (
    "--distplan CAI_Hybrid --tp_degree 2 --pp_degree 2 --batch_size 6 --num_microbatches 3 --grad_accum 2 --seq_len 32"
    " --device cpu --model_type gpt2_tiny --precision fp32 --attention eager --train_step 3 --warmup_step 1"
)


@pytest.mark.timeout(200)
def test_a_real_record_is_what_was_counted_from_outside() -> None:
    """Two tensor-parallel parts of two stages, two micro-batches accumulated: one copy of the model on four ranks."""
    worker = REPOSITORY / "tests" / "workers" / "record_worker.py"
    returncode, console = torchrun(worker, 4, *FLAGS.split())
    assert returncode == 0, console
    (line,) = [line for line in console.splitlines() if line.startswith("SEEN ")]
    seen = json.loads(line.removeprefix("SEEN "))
    record = seen["record"]
    tokens, flops, seconds = (list(column) for column in zip(*seen["ranks"], strict=True))
    assert sum(tokens) == 6 * 2 * 32
    assert record["tokens_per_second"] * record["step_seconds"] == pytest.approx(6 * 2 * 32)
    assert 0 < record["step_seconds"] <= max(seconds)
    device_seconds = 4 * record["step_seconds"]
    model, hardware = (record[f"{kind}_tflops_per_device"] * 1e12 * device_seconds for kind in ("model", "hardware"))
    assert model == pytest.approx((6 * TINY_PARAMETERS + 12 * 4 * 64 * 32) * 384)
    assert hardware == pytest.approx(sum(flops), rel=1e-6)
    assert record["host_memory_peak_rank"] == 2, "the one that holds the ballast"


# --- The learning rate ------------------------------------------------------------------------------------

# lr 1e-3, four steps of warm-up, eight of a cosine: its values by hand, cos(k x 22.5 degrees)
COSINE = [1.0, 0.9238795325, 0.7071067812, 0.3826834324, 0.0, -0.3826834324, -0.7071067812, -0.9238795325, -1.0]


@pytest.mark.parametrize(
    ("schedule", "warmup", "steps", "expected"),
    [
        ("constant", 0, 3, [1e-3, 1e-3, 1e-3]),
        ("constant", 4, 6, [0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3]),
        ("constant", 1, 2, [1e-3, 1e-3]),
        ("cosine", 4, 12, [0.25e-3, 0.5e-3, 0.75e-3] + [1e-4 + 0.45e-3 * (1 + cosine) for cosine in COSINE]),
        ("cosine", 0, 2, [0.55e-3, 1e-4]),
        ("cosine", 2, 3, [0.5e-3, 1e-3, 1e-4]),
        ("cosine", 3, 3, [1e-3 / 3, 2e-3 / 3, 1e-3]),
    ],
)
def test_learning_rate_by_hand(schedule: Any, warmup: int, steps: int, expected: list[float]) -> None:
    config = TrainConfig(lr=1e-3, lr_schedule=schedule, lr_warmup_step=warmup, train_step=steps).resolve("cpu")
    assert [learning_rate(config, step) for step in range(1, steps + 1)] == pytest.approx(expected, rel=1e-8)


# --- The data order ---------------------------------------------------------------------------------------


def first_batches(rank: int, **settings: Any) -> list[torch.Tensor]:
    stream = batches(session_of(8, rank, batch_size=2, seq_len=4, tp_degree=2, pp_degree=2, **settings))
    return [next(stream) for _ in range(3)]


def test_every_copy_draws_its_own_tokens_and_all_its_ranks_the_same() -> None:
    """Ranks 0 to 3 are one copy of the model, 4 to 7 the other: of each four samples they have the first and last two,
    and a rank alone has them all, wherever it begins.
    """
    alone = batches(session_of(1, 0, batch_size=4, seq_len=4, model_type="gpt2_tiny"))
    expected = [next(alone) for _ in range(3)]
    for rank in range(8):
        own = slice(2, 4) if rank >= 4 else slice(0, 2)
        for drawn, wanted in zip(first_batches(rank, model_type="gpt2_tiny"), expected, strict=True):
            assert torch.equal(drawn, wanted[own]), rank
    later = batches(session_of(1, 0, batch_size=4, seq_len=4, model_type="gpt2_tiny"), start=8)
    assert torch.equal(next(later), expected[2])


def test_the_tokens_of_seed_42_are_these() -> None:
    """As torch draws them on every machine: a run of today repeats one of last year."""
    drawn = first_batches(0, model_type="gpt2_tiny")
    assert drawn[0].tolist() == [[190, 323, 161, 796], [41, 361, 415, 518]]


# --- Weight decay -----------------------------------------------------------------------------------------


def test_what_decays_and_what_does_not() -> None:
    """Written down from the GPT-2 paper's layers: matrices and embeddings decay, biases and norms do not."""
    with torch.device("meta"):
        model = build_model(MODEL_SIZES["gpt2_tiny"])
    names = {id(param): name for name, param in model.named_parameters()}
    decayed, spared = decay_groups(model, 0.3)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    block = [f"transformer.h.{index}" for index in range(4)]
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert {names[id(param)] for param in decayed["params"]} == {
        "transformer.wte.weight",
        "transformer.wpe.weight",
        *(f"{at}.{name}.weight" for at in block for name in matrices),
    }
    assert {names[id(param)] for param in spared["params"]} == {
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        *(f"{at}.{name}.bias" for at in block for name in (*matrices, "ln_1", "ln_2")),
        *(f"{at}.{name}.weight" for at in block for name in ("ln_1", "ln_2")),
    }


# --- The header -------------------------------------------------------------------------------------------


def places(world_size: int, tp: int, pp: int) -> list[str]:
    return place_lines([place(rank, tp_degree=tp, pp_degree=pp) for rank in range(world_size)])


def test_sixteen_ranks_are_placed_one_by_one() -> None:
    lines = places(16, 2, 2)
    assert MOST_PLACE_LINES == 16 == len(lines)
    assert (lines[0], lines[15]) == ("rank 0: dp 0, tp 0, pp 0", "rank 15: dp 3, tp 1, pp 1")


def test_seventeen_ranks_and_more_are_summed_up() -> None:
    assert places(17, 17, 1) == ["tp groups: 17 ranks next to each other, the first 0, 1, ..., 16"]
    assert places(64, 2, 4) == [
        "tp groups: 2 ranks next to each other, the first 0, 1",
        "pp groups: 4 ranks 2 apart, the first 0, 2, 4, 6",
        "dp groups: 8 ranks 8 apart, the first 0, 8, ..., 56",
    ]
    assert len(places(4096, 8, 8)) == 3


@pytest.mark.parametrize("world_size", [1, 16, 17, 4096])
def test_copies_of_whole_models_need_no_places(world_size: int) -> None:
    assert places(world_size, 1, 1) == []


@pytest.mark.parametrize(("world_size", "lines"), [(16, 16), (32, 3)])
def test_a_session_s_header(world_size: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_shared = cast("Any", SimpleNamespace(shared_bytes=None))
    session = session_of(world_size, peak_flops=2.5e12, model_type="gpt2_tiny", **LAYOUT)
    session = dataclasses.replace(session, trainable=nothing_shared)
    header = session.header()
    assert (header.model, header.layers, header.hidden, header.heads) == ("gpt2_tiny", 4, 64, 4)
    assert header.parameters == TINY_PARAMETERS + 128 * 64 and header.padded_parameters == header.parameters + 24 * 64
    assert (header.dp, header.tp, header.pp, header.world_size) == (world_size // 4, 2, 2, world_size)
    assert (header.micro_batch_size, header.grad_accum, header.seq_len) == (3, 5, 64)
    assert header.global_batch_size == 3 * 5 * world_size // 4
    assert (header.plan, header.placement, header.peer_copies, header.cuda_graph) == ("CAI_Hybrid", None, False, False)
    assert header.peak_tflops_per_device == 2.5
    assert len(header.places) == lines and header.notes == ()
    assert max(len(line.plain) for line in header_lines(header, "logs/run")) <= 80
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert session.header().notes == ("attempt 2 of 3",)
