"""What is short, and what fits instead, with memory of all kinds simulated."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from commons.config.resolved import ResolvedConfig
from commons.config.schema import TrainConfig
from commons.planner.fit import changes, proposals, shortages
from commons.planner.gpus import GIB, GPU_MODELS
from commons.planner.memory import DEVICE_KINDS, HOST_KINDS, Forecast
from commons.planner.room import Room

H100 = GPU_MODELS["H100-80GB"]
ON_GPU = Room(H100, 70 * GIB, 100 * GIB, "free memory of this machine", 10 * GIB, None)
ON_CPU = Room(None, None, 100 * GIB, "the control group's limit (memory.max)", 1 * GIB, 65536)


def plan(device: float = 0, host: float = 0, shared: float = 0, ranks: int = 2, context: float = 0.5) -> Forecast:
    """So many GiB on a device beside its context, and on the host."""
    rest = dict.fromkeys(DEVICE_KINDS, 0)
    peak = {**rest, "activations": int(device * GIB), "context and NCCL": int(context * GIB)}
    held = {**dict.fromkeys(HOST_KINDS, 0), "optimizer states": int(host * GIB)}
    return Forecast(rest, peak, "loss", held, 0, int(shared * GIB), ranks, int(context * GIB))


def test_what_fits_has_nothing_short() -> None:
    assert not shortages(plan(device=70, host=50), ON_GPU)  # the context is there already
    assert not shortages(plan(device=20, host=29, shared=0.5, context=0), ON_CPU)


@pytest.mark.parametrize(
    "needed, room, words",
    [
        ({"device": 72.5}, ON_GPU, ["GPU 3: 2.5 GiB short, 72.5 GiB needed of 70.0 GiB (free there)"]),
        ({"host": 51}, ON_GPU, ["host memory, 2 rank(s): 2.0 GiB short, 102.0 GiB needed of 100.0 GiB"]),
        (
            {"device": 40, "host": 20, "context": 0},
            ON_CPU,
            ["host memory, 2 rank(s): 20.0 GiB short", "(the control group's limit (memory.max))"],
        ),
        ({"shared": 2, "context": 0}, ON_CPU, ["/dev/shm: 3.0 GiB short", "--peer_copies off"]),
        ({"device": 90}, dataclasses.replace(ON_GPU, node=2), ["GPU 3 of node 2: 20.0 GiB short"]),
    ],
)
def test_what_is_short_where_and_by_how_much(needed: dict[str, Any], room: Room, words: list[str]) -> None:
    (short,) = shortages(plan(**needed), room, local_rank=3)
    assert all(each in str(short) for each in words), str(short)


def test_what_processes_have_already_is_not_asked_for_again() -> None:
    held = {**dict.fromkeys(HOST_KINDS, 0), "process": 2 * GIB}
    asked = dataclasses.replace(plan(context=0), host=held)
    small = dataclasses.replace(ON_CPU, host=3 * GIB)
    assert shortages(asked, small) and not shortages(asked, dataclasses.replace(small, resident=1 * GIB))
    assert not shortages(asked, dataclasses.replace(small, resident=50 * GIB))


def test_everything_that_is_short_is_told() -> None:
    assert len(shortages(plan(device=90, host=90, shared=90), ON_GPU)) == 3


def config_of(**settings: Any) -> ResolvedConfig:
    return TrainConfig(**settings).resolve("cuda", 2)


def test_changes_are_ordered_and_keep_the_sequences_of_a_step() -> None:
    config = config_of(model_type="gpt2_xl", batch_size=12)
    found = list(changes(config, ranks=2))
    assert [change.slower for change in found] == sorted(change.slower for change in found)
    assert {"activation_checkpointing", "batch_size", "placement", "offload_optim_frac"} <= {
        name for change in found for name in change.settings
    }
    for change in found:
        batch, times = change.settings.get("batch_size", 12), change.settings.get("grad_accum", 1)
        assert batch * times == 12, change


@pytest.mark.parametrize("distplan", ["Pytorch_DDP", "CAI_ZeRO1", "CAI_ZeRO2", "Pytorch_ZeRO"])
def test_replicated_plans_are_offered_sharded_ones(distplan: str) -> None:
    plans = [change.settings.get("distplan") for change in changes(config_of(distplan=distplan), ranks=2)]
    assert {"CAI_Gemini", "Pytorch_FSDP"} <= set(plans)


def proposed(limit: float, **settings: Any) -> list[dict[str, Any]]:
    """What is proposed where a sequence takes a GiB, a tenth when recomputed, and states 10, half on the host."""
    config = config_of(batch_size=16, **settings)

    def judge(changed: Any) -> ResolvedConfig | None:
        given = {"batch_size": 16, **settings, **changed}
        return None if given.get("activation_checkpointing") == "selective" else config_of(**given)

    def forecast(asked: ResolvedConfig, rough: bool) -> Forecast:
        share = {"off": 1.0, "on": 0.1}[asked.activation_checkpointing]
        return plan(device=10 * (1 - asked.offload_optim_frac / 2) + asked.batch_size * share)

    def fits(forecasted: Forecast) -> bool:
        return forecasted.device_at_peak["activations"] <= limit * GIB

    return [dict(each.changed) for each in proposals(config, 2, judge, forecast, fits)]


def test_at_most_three_and_each_another_way() -> None:
    found = proposed(21.5)
    assert found[0] == {"batch_size": 8, "grad_accum": 2} and {"activation_checkpointing": "on"} in found
    assert len(found) == 3
    for number, one in enumerate(found):
        assert not any(set(earlier) <= set(one) for earlier in found[:number]), found


def test_states_that_are_too_large_need_the_host() -> None:
    found = proposed(8.0)
    assert found and all(each.get("offload_optim_frac", 0) > 0.3 or "placement" in each for each in found)


def test_nothing_is_proposed_where_nothing_fits() -> None:
    assert proposed(0.5) == []
