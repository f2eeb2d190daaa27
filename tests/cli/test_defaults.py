"""Defaults for the GPU that there is: the largest batch, recomputation, a smaller size; fp16 where it is old."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from commons.cli import defaults, flags, machine
from commons.config import resolved
from commons.ops import capability
from commons.planner import room
from commons.planner.gpus import GIB, GPU_MODELS, GpuModel

T4, RTX_4070, H100 = (GPU_MODELS[name] for name in ("T4-16GB", "RTX-4070-12GB", "H100-80GB"))


def needs(settings: Mapping[str, Any]) -> float:
    """GiB of a simulated run."""
    states = {"gpt2_medium": 5.0, "gpt2_small": 2.0, "gpt2_tiny": 0.1}[settings.get("model_type", "gpt2_medium")]
    each = 0.1 if settings.get("activation_checkpointing") == "on" else 0.8
    return 1.0 + states + each * settings["batch_size"]


def chosen(gib: float, **given: Any) -> dict[str, Any]:
    gpu = GpuModel("some", int(gib * GIB), (8, 9), "Some GPU")
    return defaults.by_memory(given, gpu, lambda settings: needs({**given, **settings}) <= gib).settings


@pytest.mark.parametrize(
    "gib, found",
    [
        (80, {}),
        (24, {}),
        (18.7, {"batch_size": 15}),
        (12, {"batch_size": 7}),
        (6.9, {"batch_size": 1}),
        (6.5, {"activation_checkpointing": "on", "batch_size": 5}),
        (6, {"model_type": "gpt2_small", "batch_size": 3}),
        (1, {}),  # nothing fits: the preflight says so
    ],
)
def test_batch_then_recomputation_then_size(gib: float, found: dict[str, Any]) -> None:
    assert chosen(gib) == found


def test_what_the_user_gave_stays() -> None:
    assert chosen(12, batch_size=16) == {} and chosen(12, distplan="CAI_Hybrid", pp_degree=2) == {}
    assert chosen(6, model_type="gpt2_medium") == {}  # nothing of that size fits
    assert chosen(8, activation_checkpointing="on") == {}
    assert chosen(6.5, activation_checkpointing="on") == {"batch_size": 5}


def test_the_line_says_why_and_what() -> None:
    found = defaults.by_memory({}, RTX_4070, lambda settings: settings["batch_size"] <= 7)
    assert found.line == "NVIDIA GeForce RTX 4070 has 11.6 GiB: taking --batch_size 7"


def test_gpus_without_bf16_train_in_fp16() -> None:
    found = defaults.by_age({}, T4)
    assert found.settings == {"precision": "fp16"} and "no bf16" in found.line
    assert defaults.by_age({"precision": "fp32"}, T4) == defaults.by_age({}, RTX_4070) == defaults.NOTHING


@pytest.fixture
def a_t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine with one, wherever it is asked."""
    monkeypatch.setattr(flags, "find_devices", lambda wanted: ("cuda", 1))
    monkeypatch.setattr(room, "gpu_here", lambda index=0: T4)
    monkeypatch.setattr(capability, "gpu_capability", lambda index=None: T4.capability)
    for module in (resolved, machine):
        monkeypatch.setattr(module, "compile_problem", lambda device_type: None)


def test_a_t4_gets_a_run_that_it_can_do(a_t4: None) -> None:
    config, found = flags.judge(flags.read_flags([]), 1, 1)
    assert not found and config.precision == "fp16" and config.cuda_graph == "off"
    assert 1 <= config.batch_size < 16 and config.model_type == "gpt2_medium"
    assert not config.asked("precision") and not config.asked("batch_size") and config.asked("lr")
    config, found = flags.judge(flags.read_flags(["--attention", "flash"]), 1, 1)
    assert found == ["--attention flash needs an A100, RTX 30 or newer: use --attention sdpa"]


def test_a_gpu_that_cannot_be_planned_for_keeps_the_defaults(a_t4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(index: int = 0) -> GpuModel:
        raise RuntimeError("no such card")

    monkeypatch.setattr(room, "gpu_here", broken)
    line = flags.read_flags([])
    config, found = flags.judge(line, 1, 1)
    assert not found and config.batch_size == 16
    assert "RuntimeError: no such card" in flags.adapt_to_gpu(line, config, 1, 1).line


def test_the_gpu_is_planned_for_once(a_t4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[str, Any]] = []
    adapt = defaults.adapt
    monkeypatch.setattr(defaults, "adapt", lambda given, *ranks: asked.append(given) or adapt(given, *ranks))
    judged = flags.judge_and_tell(flags.read_flags([]), 1, 1)
    assert len(asked) == 1 and not judged.problems
    assert "no bf16" in judged.notice and f"--batch_size {judged.config.batch_size}" in judged.notice
