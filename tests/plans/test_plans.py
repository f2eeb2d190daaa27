"""Every plan end to end, through the launcher, on real ranks: it trains, it logs what it says, and it trains
the same model.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from suite_runs import REPOSITORY, FinishedRun, launch, torchrun

from commons.cli.flags import read_config
from commons.plans.registry import PLANS
from commons.training.parity import Bound, reference_steps

STEPS = 4
# The same sizes on every device, so that the bounds mean the same.
FLAGS = (
    *("--model_type", "gpt2_tiny", "--batch_size", "4", "--seq_len", "64", "--lr", "1e-3"),
    *("--train_step", str(STEPS), "--warmup_step", "1", "--clip_grad_norm", "1.0"),
)

# Largest relative differences from the fp32 reference, by precision of compute. They are tighter than those of
# --check_parity, which hold for any size and number of steps: measured here were 1e-5, 2e-6 and 1e-7.
BOUNDS = {"bf16": Bound(1e-4, 5e-3), "fp16": Bound(2e-5, 2e-3), "fp32": Bound(1e-6, 1e-5)}

DATA_PARALLEL_PLANS = [name for name, plan in PLANS.items() if not plan.pipeline]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory):
    """Runs by (device, plan, ranks, precision), each trained once for all tests of this module."""
    finished: dict[tuple, FinishedRun] = {}

    def run(device: str, plan: str, ranks: int, precision: str) -> FinishedRun:
        key = (device, plan, ranks, precision)
        if key not in finished:
            if device == "cuda" and ranks > torch.cuda.device_count():
                pytest.skip(f"needs {ranks} GPUs, this machine has {torch.cuda.device_count()}")
            folder = tmp_path_factory.mktemp("-".join(map(str, key)))
            flags = ("--distplan", plan, "--precision", precision, "--device", device, *FLAGS)
            finished[key] = launch(folder, *flags, ranks=ranks)
            assert finished[key].returncode == 0, finished[key].console
        return finished[key]

    return run


@functools.cache
def reference(device: str, ranks: int, precision: str) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of plain transformers and torch in one process in fp32, on all ranks' batches."""
    config = read_config([*FLAGS, "--precision", precision, "--distplan", "Pytorch_DDP", "--device", device])
    steps, _ = reference_steps(config, ranks, torch.device(device))
    return [step.loss for step in steps], [step.grad_norm for step in steps]


def check_against_reference(run: FinishedRun, device: str, ranks: int, precision: str) -> None:
    losses, norms = reference(device, ranks, precision)
    bound = BOUNDS[precision]
    assert run.losses == pytest.approx(losses, rel=bound.loss)
    assert [record["grad_norm"] for record in run.records] == pytest.approx(norms, rel=bound.grad_norm)
    # the bounds can tell models apart: a step more or less is outside of them
    assert run.losses[1:] != pytest.approx(losses[:-1], rel=bound.loss)
    assert [record["grad_norm"] for record in run.records[1:]] != pytest.approx(norms[:-1], rel=bound.grad_norm)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
@pytest.mark.parametrize("device", DEVICES)
def test_trains_the_reference_model(runs, device: str, plan: str, ranks: int) -> None:
    check_against_reference(runs(device, plan, ranks, "bf16"), device, ranks, "bf16")


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
@pytest.mark.parametrize("device", DEVICES)
def test_other_precisions(runs, device: str, plan: str, precision: str) -> None:
    if precision not in PLANS[plan].precisions:
        pytest.skip(f"{plan} has no {precision}; test_config shows that it is refused")
    check_against_reference(runs(device, plan, 2, precision), device, 2, precision)


@pytest.mark.parametrize("plan", DATA_PARALLEL_PLANS)
def test_records(runs, plan: str) -> None:
    """A record a step, each with numbers that agree with one another."""
    run = runs("cpu", plan, 2, "bf16")
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
    run = runs("cpu", plan, 2, "bf16")
    names = {path.name for path in run.run_dir.iterdir()}
    assert names == {"config.json", "env.json", "metrics.jsonl", "summary.json", "console.log"}
    assert run.file("config.json")["distplan"] == plan
    assert plan in (run.run_dir / "console.log").read_text()


def test_every_data_parallel_rank_draws_its_own_batch(runs) -> None:
    """The first loss is a mean over the ranks' batches: were they equal, one rank's and two ranks' would be
    too.
    """
    one, two = (runs("cpu", "Pytorch_DDP", ranks, "bf16").losses[0] for ranks in (1, 2))
    assert one != two


def test_gemini_shards(tmp_path: Path) -> None:
    """Counts collectives and moves in a worker: a Gemini that silently shards nothing makes none."""
    returncode, console = torchrun(REPOSITORY / "tests" / "workers" / "chunk_traffic_worker.py", 2)
    assert returncode == 0, console


@pytest.mark.parametrize("ranks", [1, 2])
def test_gemini_moves_chunks_where_memory_is_short(ranks: int) -> None:
    """Placement auto, in a worker: to the bit what static trains, and its two ratios say how much is moved."""
    returncode, console = torchrun(REPOSITORY / "tests" / "workers" / "pressure_worker.py", ranks)
    assert returncode == 0, console
