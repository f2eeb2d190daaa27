"""Forecasts against peaks that were measured on H100s, and their bounds."""

from __future__ import annotations

import mmap

import pytest

from commons.config import resolved
from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.planner import calibration
from commons.planner.gpus import GPU_MODELS
from commons.planner.memory import UNCOUNTED, block_bytes, forecast, pinned_bytes
from model_zoo import MODEL_SIZES, parameter_count

MIB = 1 << 20
H100 = GPU_MODELS["H100-80GB"]

# settings, ranks, MiB at the peak: benchmarks/results/2026-11-27-h100/speed.json and 2026-11-26-h100-copies
MEASURED = {
    "Gemini, medium": ({}, 1, 17931.2),
    "Gemini, xl": ({"model_type": "gpt2_xl"}, 1, 60488.3),
    "Gemini, xl, 2": ({"model_type": "gpt2_xl"}, 2, 50463.2),
    "Gemini, replicated": ({"model_type": "gpt2_xl", "shard_param_frac": 0.0}, 2, 51645.2),
    "FSDP": ({"distplan": "Pytorch_FSDP"}, 2, 15314.1),
    "DDP": ({"distplan": "Pytorch_DDP"}, 2, 22202.4),
    "ZeroRedundancyOptimizer": ({"distplan": "Pytorch_ZeRO"}, 2, 20848.5),
    "10b": ({"model_type": "gpt2_10b", "batch_size": 8, "activation_checkpointing": "on"}, 2, 75864.2),
    "10b, offloaded": (
        {
            "model_type": "gpt2_10b",
            "batch_size": 32,
            "activation_checkpointing": "on",
            "offload_optim_frac": 1.0,
        },
        2,
        28778.1,
    ),
}


@pytest.fixture(autouse=True)
def a_machine_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolved, "compile_problem", lambda device_type: None)


def on_gpus(settings: dict, ranks: int) -> ResolvedConfig:
    return TrainConfig(**settings).resolve("cuda", ranks)


@pytest.mark.parametrize("case", MEASURED)
def test_measured_peaks(case: str) -> None:
    settings, ranks, measured = MEASURED[case]
    planned = forecast(on_gpus(settings, ranks), ranks, ranks, H100)
    assert planned.allocated_peak / MIB == pytest.approx(measured, rel=0.003), planned
    assert planned.peak_phase in ("loss", "loss backward", "backward")
    assert planned.device_peak > planned.allocated_peak  # a context and what the allocator keeps


@pytest.mark.parametrize("case", ["Gemini, medium", "10b", "DDP"])
def test_the_rough_guess_is_higher(case: str) -> None:
    settings, ranks, _ = MEASURED[case]
    config = on_gpus(settings, ranks)
    exact, rough = (forecast(config, ranks, ranks, H100, rough=guess) for guess in (False, True))
    assert rough.device_peak > exact.device_peak and rough.device_at_rest == exact.device_at_rest


@pytest.mark.parametrize("distplan", ["CAI_Gemini", "Pytorch_ZeRO", "Pytorch_FSDP", "CAI_ZeRO1"])
def test_the_largest_size_on_1024_ranks_without_a_trace(distplan: str) -> None:
    config = on_gpus({"model_type": "gpt3_175b", "distplan": distplan, "batch_size": 1}, 1024)
    planned = forecast(config, 1024, 8, H100, rough=True)
    assert planned.device_at_rest["parameters"] > 0 and planned.ranks_per_host == 8


def test_the_host_of_an_offloaded_optimizer() -> None:
    settings, ranks, _ = MEASURED["10b, offloaded"]
    planned = forecast(on_gpus(settings, ranks), ranks, ranks, H100, rough=True)
    states = planned.host_bytes - planned.host["process"]
    assert states == pytest.approx(14 * parameter_count(MODEL_SIZES["gpt2_10b"]) / ranks, rel=0.01)
    assert planned.host["pinned beyond need"] < 1000 * mmap.PAGESIZE
    # what was measured where torch rounded each block up to a power of two: 2026-11-26-h100-copies/host.json
    assert planned.host_bytes / MIB < 0.9 * 81124
    assert planned.host["optimizer states"] > planned.host["master weights"] > planned.host["parameters"] > 0
    assert not planned.device_at_rest["optimizer states"]


def test_a_cpu_rank_has_no_context_and_its_parts_in_shared_memory() -> None:
    planned = forecast(TrainConfig(peer_copies="on").resolve("cpu", 2), 2, 2)
    assert all(not planned.device_at_peak[kind] for kind in UNCOUNTED) and not planned.pinned
    assert planned.shared_memory == planned.device_at_rest["parameters"] + planned.device_at_rest["inboxes"]


def test_more_of_a_batch_takes_more_and_recomputation_less() -> None:
    small, large, again = (
        forecast(on_gpus({"model_type": "gpt2_small", **more}, 1), 1, 1, H100).device_peak
        for more in ({"batch_size": 1}, {"batch_size": 2}, {"batch_size": 2, "activation_checkpointing": "on"})
    )
    assert small < large and again < large


def test_degrees_that_do_not_divide_the_ranks() -> None:
    config = on_gpus({"distplan": "CAI_Hybrid", "tp_degree": 2}, 2)
    with pytest.raises(ValueError, match="not divisible"):
        forecast(config, 3, 3, H100)


@pytest.mark.parametrize(
    "asked, counted",
    [(1, 512), (513, 1024), (9 << 20, 9 << 20), (61_481_600, 61_481_984), (122_963_200, 118 << 20)],
)
def test_what_torch_s_allocator_counts(asked: int, counted: int) -> None:
    assert block_bytes(asked) == counted


def test_large_pinned_memory_takes_whole_pages_small_a_power_of_two() -> None:
    sizes = (0, 1, 3, 805_306_369, 1 << 30)
    assert [pinned_bytes(size) for size in sizes] == [0, 1, 4, 805_306_368 + mmap.PAGESIZE, 1 << 30]


def test_a_damaged_calibration_is_one_line(tmp_path) -> None:
    for text in ("", "{}", '{"context": "much"}', "[1]"):
        (tmp_path / "table.json").write_text(text)
        with pytest.raises(ValueError, match="is no calibration of this version"):
            calibration.read(tmp_path / "table.json")
    with pytest.raises(ValueError, match="is no calibration"):
        calibration.read(tmp_path / "missing.json")
