"""Every plan end to end, through the launcher, on real ranks: it trains, it logs what it says, and it trains
the same model.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from suite_runs import FinishedRun, launch, torchrun

from commons.plans import PLANS

STEPS = 4
# Largest relative difference of a step's loss from the single-process fp32 reference, by precision of
# compute. On gpt2_tiny rounding to bf16 (8 bits) moves a loss by 3e-5 and rounding to fp16 (11 bits) by 5e-6;
# fp32 differs in the order of sums.
LOSS_BOUNDS = {"bf16": 2e-4, "fp16": 2e-5, "fp32": 1e-6}
FLAGS = ("--train_step", str(STEPS), "--warmup_step", "1", "--clip_grad_norm", "1.0", "--lr", "1e-3")

DATA_PARALLEL_PLANS = [name for name, plan in PLANS.items() if not plan.pipeline]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Runs by (plan, ranks, precision), each trained once for all tests of this module."""
    finished: dict[tuple[str, int, str], FinishedRun] = {}

    def run(plan: str, ranks: int, precision: str) -> FinishedRun:
        key = (plan, ranks, precision)
        if key not in finished:
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            finished[key] = launch(folder, "--distplan", plan, "--precision", precision, *FLAGS, ranks=ranks)
            assert finished[key].returncode == 0, finished[key].console
        return finished[key]

    return run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory):
    """Losses of plain transformers and torch in one process in fp32, by (data-parallel ranks, precision of
    the start).
    """
    losses: dict[tuple[int, str], list[float]] = {}

    def get(ranks: int, precision: str) -> list[float]:
        if (ranks, precision) not in losses:
            losses[ranks, precision] = _reference_losses(ranks, precision)
        return losses[ranks, precision]

    return get


def _reference_losses(ranks: int, precision: str) -> list[float]:
    """One process, one plain model, the gradients of all ranks' batches averaged by hand."""
    import torch

    from commons.data import random_tokens
    from commons.weights import decay_groups, seeded_init_
    from model_zoo import MODEL_SIZES, build_model

    shape = MODEL_SIZES["gpt2_tiny"]
    model = build_model(shape)
    seeded_init_(
        model,
        42,
        torch.device("cpu"),
        {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision],
    )
    optimizer = torch.optim.AdamW(decay_groups(model, 0.01), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    streams = [
        random_tokens(
            batch_size=4,
            seq_len=64,
            vocab=shape.vocab,
            seed=42,
            data_parallel_rank=rank,
            device=torch.device("cpu"),
        )
        for rank in range(ranks)
    ]
    losses = []
    for _ in range(STEPS):
        step_losses = []
        for stream in streams:
            tokens = next(stream)
            loss = model(input_ids=tokens, labels=tokens).loss
            (loss / ranks).backward()
            step_losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(step_losses) / ranks)
    return losses


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
def test_trains_the_reference_model(runs, reference, plan: str, ranks: int) -> None:
    run = runs(plan, ranks, "bf16")
    expected = reference(ranks, "bf16")
    assert run.losses == pytest.approx(expected, rel=LOSS_BOUNDS["bf16"])
    # the bound must be able to tell models apart: another step's loss is outside it
    assert run.losses[0] != pytest.approx(expected[1], rel=LOSS_BOUNDS["bf16"])


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
def test_other_precisions(runs, reference, plan: str, precision: str) -> None:
    if precision not in PLANS[plan].precisions:
        pytest.skip(f"{plan} has no {precision}; test_config shows that it is refused")
    assert runs(plan, 2, precision).losses == pytest.approx(
        reference(2, precision), rel=LOSS_BOUNDS[precision]
    )


@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
def test_records(runs, plan: str) -> None:
    """A record a step, each with numbers that agree with one another."""
    run = runs(plan, 2, "bf16")
    assert [record["step"] for record in run.records] == list(range(1, STEPS + 1))
    for record in run.records:
        assert record["tokens_per_second"] == pytest.approx(2 * 4 * 64 / record["step_seconds"])
        phases = sum(record[f"{phase}_seconds"] for phase in ("forward", "backward", "optimizer"))
        assert 0.5 * record["step_seconds"] < phases <= record["step_seconds"] * 1.001
        assert 0 < record["model_tflops_per_device"] < record["hardware_tflops_per_device"]
        assert record["grad_norm"] > 0 and record["skipped_steps"] == 0
        assert record["mfu"] is None and record["device_memory_peak_mib"] is None
        assert 50 < record["host_memory_mib"] < 4096 and record["host_memory_peak_rank"] in (0, 1)
    assert all(math.isfinite(loss) for loss in run.losses)


@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
def test_run_folder(runs, plan: str) -> None:
    run = runs(plan, 2, "bf16")
    names = {path.name for path in run.run_dir.iterdir()}
    assert names == {"config.json", "env.json", "metrics.jsonl", "summary.json", "console.log"}
    assert run.file("config.json")["distplan"] == plan
    assert plan in (run.run_dir / "console.log").read_text()


def test_every_data_parallel_rank_draws_its_own_batch(runs) -> None:
    """The first loss is a mean over the ranks' batches: were they equal, one rank's and two ranks' would be
    too.
    """
    one, two = (runs("Pytorch_DDP", ranks, "bf16").losses[0] for ranks in (1, 2))
    assert one != two


def test_gemini_shards(tmp_path: Path) -> None:
    """Counts collectives and moves in a worker: a Gemini that silently shards nothing makes none."""
    returncode, console = torchrun(Path(__file__).parent / "chunk_traffic_worker.py", 2)
    assert returncode == 0, console
