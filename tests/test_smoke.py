"""The smoke test, `bash run_tests.sh --smoke`: every plan on two CPU ranks through the real launcher, one run after
another, in under two minutes on two cores.

The rest of the suite asks more of each plan; this says quickly whether any of them is broken, on a machine without a
GPU. It is left out of the whole suite, whose tests/test_plans.py trains the same plans.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from suite_runs import FinishedRun, launch

from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES

pytestmark = pytest.mark.smoke

STEPS = 3
FLAGS = ("--device", "cpu", "--model_type", "gpt2_tiny", "--train_step", str(STEPS), "--warmup_step", "1")
RUN_FILES = {"config.json", "env.json", "metrics.jsonl", "summary.json", "console.log", "parity.json"}


def train(folder: Path, *flags: str) -> FinishedRun:
    return launch(folder, *FLAGS, *flags, ranks=2)


@pytest.mark.parametrize("plan", PLANS)
def test_trains(plan: str, tmp_path: Path) -> None:
    """Losses are the fp32 reference's (--check_parity), the records are whole, and the exit code is 0."""
    split = ("--tp_degree", "2") if PLANS[plan].pipeline else ()
    run = train(tmp_path, "--distplan", plan, *split, "--check_parity", "true")
    assert run.returncode == 0, run.console
    assert {path.name for path in run.run_dir.iterdir()} == RUN_FILES
    assert [record["step"] for record in run.records] == list(range(1, STEPS + 1))
    # random tokens under random weights: the loss is that of guessing
    assert run.losses == pytest.approx([math.log(MODEL_SIZES["gpt2_tiny"].vocab)] * STEPS, rel=0.02)
    tokens = 4 * 64 * (1 if split else 2)
    for record in run.records:
        assert record["tokens_per_second"] == pytest.approx(tokens / record["step_seconds"])
        assert record["host_memory_mib"] > 0
    summary = run.file("summary.json")
    assert (summary["ended"], summary["steps"], summary["steps_measured"]) == ("finished", STEPS, STEPS - 1)
    assert plan in run.console and run.file("config.json")["distplan"] == plan


def test_wrong_settings_start_nothing(tmp_path: Path) -> None:
    run = train(tmp_path, "--tp_degree", "3")
    assert run.returncode == 2 and "--tp_degree" in run.console, run.console
    assert not run.run_dir.exists()


def test_a_loss_that_is_lost_ends_the_run(tmp_path: Path) -> None:
    run = train(tmp_path, "--lr", "1e6", "--weight_decay", "1e6", "--max_bad_steps", "1")
    assert run.returncode == 1, run.console
    summary = run.file("summary.json")
    assert summary["ended"] == "bad steps" and summary["steps"] == len(run.records) < STEPS
