"""Forecasts beside real peaks, on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite_runs import launch

from commons.cli import flags
from commons.planner.memory import forecast
from commons.planner.room import gpu_here

MIB = 1 << 20
CASES = [
    "--model_type gpt2_small --batch_size 4",
    "--model_type gpt2_small --batch_size 4 --activation_checkpointing on --cuda_graph off",
    "--model_type gpt2_small --batch_size 4 --distplan CAI_ZeRO2",
    "--model_type gpt2_small --batch_size 4 --distplan Pytorch_FSDP",
    "--model_type gpt2_small --batch_size 4 --distplan Pytorch_DDP",
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_forecast(case: str, tmp_path: Path) -> None:
    words = [*case.split(), "--train_step", "5", "--warmup_step", "2"]
    run = launch(tmp_path, *words, ranks=1)
    assert run.returncode == 0, run.console
    config, _ = flags.judge(flags.read_flags(words), 1, 1)
    planned = forecast(config, 1, 1, gpu_here()).allocated_peak / MIB
    real = run.file("summary.json")["peak_device_memory_mib"]
    assert 0.99 * real <= planned <= 1.12 * real, (planned, real)  # DDP's second set of gradients may not be needed


@pytest.mark.gpu
def test_a_batch_that_cannot_fit_is_refused(tmp_path: Path) -> None:
    run = launch(tmp_path, "--model_type", "gpt2_xl", "--batch_size", "2048", "--train_step", "3", ranks=1)
    assert run.returncode == 3 and "GPU 0: " in run.console and "GiB short" in run.console, run.console
    assert "bash run_gemini.sh" in run.console and "Traceback" not in run.console
