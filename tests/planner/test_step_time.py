"""The time model: beside the measured records, and how its parts answer to what they are made of."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks.step_time import read_records, summary, table
from commons.config.schema import TrainConfig
from commons.planner import rates as rates_module
from commons.planner.machines import Machine, parse_machine, resolve_for, this_machine
from commons.planner.rates import (
    CalibrationError,
    calibration_path,
    default_rates,
    rates_of,
    save_rates,
    with_measured,
)
from commons.planner.step_time import PARTS, StepTime, forecast_step
from commons.plans.registry import PLANS


def step(text: str, **settings: Any) -> StepTime:
    machine = parse_machine(text)
    return forecast_step(resolve_for(TrainConfig(**settings), machine), machine, default_rates(machine))


def test_measured_records_of_the_present_state() -> None:
    rows = [(record, record.forecast()) for record in read_records()]
    errors = [time.seconds / record.seconds - 1 for record, time in rows if record.fitted]
    assert len(errors) >= 20
    assert statistics.median(map(abs, errors)) < 0.03 and max(map(abs, errors)) < 0.05
    assert any(not record.fitted for record, _ in rows), "older records are shown beside them"
    assert f"{len(rows)} records" in summary(rows, "all") and table(rows).count("\n") == len(rows) + 1


def test_offload_costs_what_was_measured() -> None:
    """gpt2_10b on two H100s: 0.71 of the tokens with the optimizer on the host and four times the batch."""
    common = {"model_type": "gpt2_10b", "activation_checkpointing": "on"}
    kept = step("2 x H100", batch_size=8, **common)
    away = step("2 x H100", batch_size=32, offload_optim_frac=1.0, **common)
    assert away.tokens_per_second / kept.tokens_per_second == pytest.approx(0.71, abs=0.04)
    assert away.optimizer == 0 and away.host_optimizer > 1 and away.host_copies > 0


@pytest.mark.parametrize("plan", [plan for plan in PLANS if plan != "CAI_Hybrid"])
def test_parts_add_up(plan: str) -> None:
    time = step("2 nodes of 4 x H100, 400 Gbit/s", distplan=plan)
    assert time.seconds == pytest.approx(sum(getattr(time, name) for name in PARTS))
    assert min(getattr(time, name) for name in PARTS) >= 0
    assert time.tokens == 8 * 16 * 1024
    assert time.tokens_per_second == pytest.approx(time.tokens / time.seconds)
    assert 0 < time.model_tflops < 989


def test_pipeline_bubbles_shrink_with_microbatches() -> None:
    def bubbles(pieces: int, chunks: int = 1) -> tuple[float, float]:
        time = step(
            "4 x H100",
            distplan="CAI_Hybrid",
            pp_degree=4,
            batch_size=32,
            num_microbatches=pieces,
            num_model_chunks=chunks,
        )
        return time.bubbles, time.forward + time.backward

    for pieces, chunks in ((4, 1), (16, 1), (4, 2)):
        idle, work = bubbles(pieces, chunks)
        assert idle / work == pytest.approx(3 / (pieces * chunks))


def test_tensor_parallelism_talks_and_computes_less() -> None:
    one, two = (step("2 x H100", distplan="CAI_Hybrid", tp_degree=tp) for tp in (1, 2))
    assert two.forward < one.forward and two.links > one.links
    sparse = step("2 nodes of 1 x H100, 100 Gbit/s", distplan="CAI_Hybrid", tp_degree=2)
    assert sparse.node_links > 10 * two.links and sparse.links == 0


def test_slow_networks_are_exposed() -> None:
    fast, slow = (step(f"16 nodes of 8 x H100, {rate} Gbit/s", model_type="gpt2_xl") for rate in (3200, 10))
    assert fast.node_links == 0 and slow.node_links > 1
    assert slow.hidden > 0 and slow.forward == fast.forward


def test_recompute_and_precision() -> None:
    off, selective, on = (
        step("H100", model_type="gpt2_xl", activation_checkpointing=mode) for mode in ("off", "selective", "on")
    )
    assert off.backward < selective.backward < on.backward and off.forward == on.forward
    bf16, fp8, fp32 = (
        step("H200", model_type="gpt2_xl", distplan="Pytorch_FSDP", precision=p) for p in ("bf16", "fp8", "fp32")
    )
    assert fp8.seconds < bf16.seconds < fp32.seconds
    assert step("T4", precision="fp16").forward < step("T4", precision="bf16").forward, "bf16 is emulated there"


def test_gpus_that_do_not_reach_each_other() -> None:
    assert not parse_machine("2 x RTX-4090-24GB").has_peer_access and parse_machine("2 x H100").has_peer_access


# ---- measured rates


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return this_machine(1, 2, "cpu")


def test_measured_rates_take_the_place_of_defaults(here: Machine) -> None:
    assert rates_of(here) == default_rates(here)
    save_rates(calibration_path(here), here, {"matmul_flops": {"bf16": 1e9}, "host_adam": 2e8}, "2.13.0")
    rates, defaults = rates_of(here), default_rates(here)
    assert (rates.matmul_flops["bf16"], rates.host_adam) == (1e9 / 2, 2e8), "each of two ranks has half of the cores"
    assert rates.matmul_flops["fp32"] == defaults.matmul_flops["fp32"]
    assert rates.memory_bandwidth == defaults.memory_bandwidth
    assert set(rates.measured) == {"matmul_flops", "host_adam"}
    elsewhere = parse_machine("H100")
    assert rates_of(elsewhere) == default_rates(elsewhere)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": 1}',
        '{"version": 1, "device": "HERE", "torch": "", "rates": {"host_adam": -1}}',
        '{"version": 1, "device": "HERE", "torch": "", "rates": {"host_adam": "fast"}}',
        '{"version": 0, "device": "HERE", "torch": "", "rates": {}}',
    ],
)
def test_a_damaged_calibration(here: Machine, text: str) -> None:
    path = calibration_path(here)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("HERE", rates_module.device_key(here)))
    with pytest.raises(CalibrationError, match=r"is damaged: measure again with --calibrate, or remove") as error:
        rates_of(here)
    assert "\n" not in str(error.value)


def test_a_calibration_of_another_machine(here: Machine) -> None:
    path = calibration_path(here)
    other = dataclasses.replace(here, cores_per_node=here.cores_per_node + 1)
    save_rates(path, other, {"host_adam": 1e8}, "2.13.0")
    assert json.loads(path.read_text())["torch"] == "2.13.0"
    with pytest.raises(CalibrationError, match=r"is of .* cores, and this is .* cores: measure again"):
        with_measured(default_rates(here), here, path)
