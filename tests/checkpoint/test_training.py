"""Real trainings that stop and go on: bit by bit on the same ranks, and from every plan to every plan."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from suite_runs import REPOSITORY, run_processes, torchrun

WORKER = REPOSITORY / "tests" / "workers" / "checkpoint_worker.py"
KILLER = REPOSITORY / "tests" / "workers" / "killed_worker.py"
FIELDS = ("steps", "losses", "grad_norms", "rates", "skipped")
LOSS_BOUND = 5e-3  # between plans and precisions, after two steps

DROPPING = "--dropout 0.1 --clip_grad_norm 1 --lr_schedule cosine"
# Precisions, placements and degrees are spread over the plans. 5e5 overflows fp16: steps are skipped, the scale falls.
TWO_RANKS = {
    "ddp": f"--distplan Pytorch_DDP --precision fp32 {DROPPING}",
    "zero": f"--distplan Pytorch_ZeRO --precision bf16 {DROPPING}",
    "fsdp": f"--distplan Pytorch_FSDP --precision fp16 {DROPPING}",
    "zero1": f"--distplan CAI_ZeRO1 --precision bf16 {DROPPING}",
    "zero2": f"--distplan CAI_ZeRO2 --precision fp16 --initial_loss_scale 5e5 {DROPPING}",
    "tensor": f"--distplan CAI_Hybrid --precision bf16 --tp_degree 2 --batch_size 8 {DROPPING}",
    "pipeline": f"--distplan CAI_Hybrid --precision fp16 --pp_degree 2 --batch_size 8 {DROPPING}",
    "gemini": f"--distplan CAI_Gemini {DROPPING}",
    "gemini_host": f"--distplan CAI_Gemini --placement cpu --precision fp16 --initial_loss_scale 5e5 {DROPPING}",
    "gemini_tensor": f"--distplan CAI_Gemini --tp_degree 2 --batch_size 8 {DROPPING}",
}
RESUMED = "step-00000003"


def read(results: Path) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in map(json.loads, results.read_text().splitlines())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every training, saved after step 3 and 5, and resumed after step 3."""
    folder = tmp_path_factory.mktemp("trainings")
    cases = []
    for name, flags in TWO_RANKS.items():
        cases += [
            f"{name}: {flags} --save_every 3 --save_dir {{DIR}}/{name}",
            f"{name} again: {flags} --resume {{DIR}}/{name}/{RESUMED}",
        ]
    returncode, console = torchrun(WORKER, 2, str(folder / "two.jsonl"), *cases)
    assert returncode == 0, console
    return folder


@pytest.mark.parametrize("name", TWO_RANKS)
def test_a_training_goes_on_bit_by_bit(name: str, folder: Path) -> None:
    rows = read(folder / "two.jsonl")
    unbroken, resumed = rows[name], rows[f"{name} again"]
    assert unbroken["ended"] == resumed["ended"] == "finished", (unbroken["why"], resumed["why"])
    assert resumed["differing"] == [] and resumed["steps"] == [4, 5]
    for field in FIELDS:
        assert unbroken[field][3:] == resumed[field], field


def test_steps_were_skipped_where_they_were_to_be(folder: Path) -> None:
    """Some steps, not all, and each before the checkpoint."""
    rows = read(folder / "two.jsonl")
    for name in ("zero2", "gemini_host"):
        assert 0 < rows[name]["skipped"][2] < 3 and rows[name]["skipped"][-1] == rows[name]["skipped"][2], name


def test_every_plan_reads_what_any_other_wrote(folder: Path) -> None:
    """On one rank from two: tensors to the bit, losses within the bounds. All are read by Gemini, and its own by all
    plans that one rank can run.
    """
    plain = "--batch_size 8 --dropout 0"
    cases = [f"{name}: --distplan CAI_Gemini {plain} --resume {{DIR}}/{name}/{RESUMED}" for name in TWO_RANKS]
    cases += [
        f"to {plan}: --distplan {plan} --precision bf16 {plain} --resume {{DIR}}/gemini/{RESUMED}"
        for plan in ("Pytorch_DDP", "Pytorch_ZeRO", "Pytorch_FSDP", "CAI_ZeRO1", "CAI_ZeRO2", "CAI_Hybrid")
    ]
    returncode, console = torchrun(WORKER, 1, str(folder / "one.jsonl"), *cases)
    assert returncode == 0, console
    rows = read(folder / "one.jsonl")
    assert len(rows) == len(cases)
    for name, row in rows.items():
        assert row["differing"] == [] and row["steps"] == [4, 5], name
    for name, row in rows.items():
        if name.startswith("to "):
            assert row["losses"] == pytest.approx(rows["gemini"]["losses"], abs=LOSS_BOUND), name


def test_killed_at_random_moments_nothing_is_lost(tmp_path: Path) -> None:
    """Four here; the worker takes any number."""
    command = [sys.executable, str(KILLER), str(tmp_path / "kills.json"), "4", "1", "1", "--distplan Pytorch_DDP"]
    returncode, console = run_processes(command)
    assert returncode == 0, console
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["kills"] == 4 and found["breaches"] == []
