"""A training of seconds, and an environment that leads nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

from suite_runs import clean_environment

TRAIN = ["--device=cpu", "--model_type=gpt2_tiny", "--train_step=2", "--warmup_step=1", "--run_name=run"]


def bare_environment(**changes: str) -> dict[str, str]:
    """As a user's shell has it: no PYTHONPATH, the tests' own Python active."""
    environ = clean_environment(**changes)
    environ.pop("PYTHONPATH", None)
    environ["PATH"] = f"{Path(sys.executable).parent}:{environ['PATH']}"
    return environ | {"GEMINI_USE_ACTIVE": "1", "CUDA_VISIBLE_DEVICES": ""}


def trained(folder: Path) -> bool:
    return len((folder / "gemini_logs" / "run" / "metrics.jsonl").read_text().splitlines()) == 2
