"""Whether a forecast fits into the memory that there is, what is short, and what would fit instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from commons.config.resolved import ResolvedConfig
from commons.planner.gpus import GIB
from commons.planner.memory import Forecast
from commons.planner.room import Room
from commons.plans.registry import PLANS

Settings = Mapping[str, Any]


class Short(NamedTuple):
    """Memory that is lacking.

    Attributes:
        where: "GPU 3" or "host of node 1", say.
        needed, free: bytes.
        limit: what says how much is free.
    """

    where: str
    needed: int
    free: int
    limit: str

    def __str__(self) -> str:
        lacking = (self.needed - self.free) / GIB
        return (
            f"{self.where}: {lacking:.1f} GiB short, {self.needed / GIB:.1f} GiB needed of"
            f" {self.free / GIB:.1f} GiB ({self.limit})"
        )


def shortages(plan: Forecast, room: Room, local_rank: int = 0) -> list[Short]:
    """What ``plan`` lacks where one rank looked, empty where it fits."""
    ranks, found = plan.ranks_per_host, []
    node = f" of node {room.node}" if room.node else ""
    resident = min(plan.host["process"], room.resident)  # all ranks have loaded what they need by now
    host = (plan.host_bytes - resident) * ranks
    if room.device is not None:
        needed = plan.device_peak - plan.context  # which is there already
        if needed > room.device:
            found.append(Short(f"GPU {local_rank}{node}", needed, room.device, "free there"))
    else:
        host += plan.device_peak * ranks
    if host > room.host:
        found.append(Short(f"host memory{node}, {ranks} rank(s)", host, room.host, room.host_limit))
    shared = plan.shared_memory * ranks
    if room.shared_memory is not None and shared > room.shared_memory:
        found.append(Short(f"/dev/shm{node}", shared, room.shared_memory, "free there; or use --peer_copies off"))
    return found


# What a change costs in time, as a factor of the step's: to be tried from the fastest on. Recomputation by what it
# computes again; smaller passes for their launches and the graphs that are not captured; the host by its link.
SLOWER = {"selective": 1.1, "on": 1.33, "pass": 1.04, "plan": 1.1, "offload": 2.0, "const": 1.6, "cpu": 3.0}
SHARDING_PLANS = ("CAI_Gemini", "Pytorch_FSDP")
MOST_PROPOSALS = 3


class Change(NamedTuple):
    """Settings to be changed, and by which factor a step may take longer."""

    settings: Settings
    slower: float


def changes(config: ResolvedConfig, ranks: int) -> Iterator[Change]:
    """Ways to take less memory, each keeping the model and the sequences of a step, fastest first."""
    found = [
        Change({**plan.settings, **recompute.settings, **batch.settings}, plan.slower * recompute.slower * batch.slower)
        for plan in _placements(config, ranks)
        for recompute in _recomputations(config)
        for batch in _batches(config)
    ]
    yield from sorted((change for change in found if change.settings), key=lambda change: change.slower)


def _recomputations(config: ResolvedConfig) -> Iterator[Change]:
    yield Change({}, 1.0)
    modes = ("off", "selective", "on")
    for mode in modes[modes.index(config.activation_checkpointing) + 1 :]:
        if mode == "on" or config.tp_degree == 1:
            yield Change({"activation_checkpointing": mode}, SLOWER[mode])


def _batches(config: ResolvedConfig) -> Iterator[Change]:
    """Smaller ones, with as many more micro-batches to a step."""
    yield Change({}, 1.0)
    cost = 1.0
    for batch in range(config.batch_size - 1, 0, -1):
        times, rest = divmod(config.batch_size, batch)
        if not rest and (config.pp_degree == 1 or batch % config.num_microbatches == 0):
            cost *= SLOWER["pass"]
            yield Change({"batch_size": batch, "grad_accum": config.grad_accum * times}, cost)


def _placements(config: ResolvedConfig, ranks: int) -> Iterator[Change]:
    yield Change({}, 1.0)
    if config.distplan == "CAI_Gemini" and config.placement == "static":
        if config.shard_param_frac < 1:
            yield Change({"shard_param_frac": 1.0}, SLOWER["plan"])
        for share in (0.25, 0.5, 0.75, 1.0):
            if share > config.offload_optim_frac:
                yield Change({"offload_optim_frac": share, "shard_param_frac": 1.0}, 1 + SLOWER["offload"] * share)
        yield Change({"placement": "cpu"}, SLOWER["cpu"])
    elif config.model_parallel_size == 1:
        for plan in SHARDING_PLANS:
            if plan != config.distplan and config.precision in PLANS[plan].precisions and ranks > 1:
                yield Change({"distplan": plan}, SLOWER["plan"])
        if config.precision in PLANS["CAI_Gemini"].precisions and config.distplan != "CAI_Gemini":
            yield Change({"distplan": "CAI_Gemini", "offload_optim_frac": 1.0}, 1 + SLOWER["offload"])


class Proposal(NamedTuple):
    """Settings that fit, and what they change."""

    changed: Settings
    config: ResolvedConfig
    plan: Forecast


def proposals(
    config: ResolvedConfig,
    ranks: int,
    judge: Callable[[Settings], ResolvedConfig | None],
    forecast: Callable[[ResolvedConfig, bool], Forecast],
    fits: Callable[[Forecast], bool],
) -> list[Proposal]:
    """Up to three ways that fit, fastest first, each another one: none is a longer list of an earlier one's changes.

    Args:
        judge: the resolved configuration with these settings changed, None where it cannot run.
        forecast: of a configuration, exactly or as a rough and high guess.
        fits: whether there is room for it.
    """
    found: list[Proposal] = []
    for change in changes(config, ranks):
        if any(_is_more_of(change.settings, earlier.changed) for earlier in found):
            continue
        changed = judge(change.settings)  # None too when its time is over
        if changed is None or not _could_fit(changed, forecast, fits):
            continue
        plan = forecast(changed, False)
        if fits(plan):
            found.append(Proposal(change.settings, changed, plan))
            if len(found) == MOST_PROPOSALS:
                break
    return found


def _is_more_of(settings: Settings, earlier: Settings) -> bool:
    """Whether ``settings`` change everything that ``earlier`` does, and so are only slower."""
    return set(earlier) <= set(settings)


def _could_fit(config: ResolvedConfig, forecast: Callable[..., Forecast], fits: Callable[[Forecast], bool]) -> bool:
    """Whether what rests alone fits, which costs no trace of a block."""
    plan = forecast(config, True)
    return fits(dataclasses.replace(plan, device_at_peak=plan.device_at_rest))
