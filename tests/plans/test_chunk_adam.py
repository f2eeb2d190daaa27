"""Gemini's optimizer step by runs of chunk memory: how runs are cut, whose the states are, what a skipped step leaves.

That it trains the same model under every placement: test_splitting.py.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from commons.plans.colossal.runtime import prepare

prepare("cpu")

from commons.plans.colossal.adam_kernels import AdamSettings, AdamSlot, fused_adam  # noqa: E402
from commons.plans.colossal.chunk_adam import ChunkAdam, runs_of  # noqa: E402
from commons.plans.colossal.gemini import SuiteGeminiOptimizer  # noqa: E402

GROUPS = ({"weight_decay": 0.1}, {"weight_decay": 0.0})
# of two chunks: (parameter group, first and one past the last element)
LAYOUT = {"first": [(0, 0, 6), (0, 6, 10), (1, 10, 14)], "second": [(0, 0, 4), (0, 8, 12)]}


class FakeChunk:
    """As much of a chunk as the step touches; its payload holds weights before and gradients at the step."""

    def __init__(self, payload: torch.Tensor) -> None:
        self.payload, self.device_type = payload, "cpu"
        self.paired_chunk = SimpleNamespace(payload=torch.arange(float(payload.numel())))
        self.optim_sync_flag = self.cpu_vis_flag = False


def fake_optimizer(overflows: bool = False) -> Any:
    """As much of a GeminiOptimizer, with gradients of 1 in its chunks."""
    chunks = {name: FakeChunk(torch.ones(16, dtype=torch.bfloat16)) for name in LAYOUT}
    groups = [{**group, "params": [], "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8} for group in GROUPS]
    optimizer: Any = SimpleNamespace(
        param_groups=groups,
        param_to_chunk16={},
        param_to_range={},
        chunk16_set=set(chunks.values()),
        module=SimpleNamespace(chunk_manager=SimpleNamespace(reuse_fp16_chunk=True, accumulating_grads=True)),
        mix_precision_mixin=SimpleNamespace(
            should_skip_step=lambda: overflows, pre_zero_grad=lambda: optimizer.forgotten.append(True)
        ),
        forgotten=[],
        _get_combined_scale=lambda: -1,
        _register_states=lambda: None,
        _clear_global_norm=lambda: None,
        _update_fp16_params=lambda: [chunk.payload.copy_(chunk.paired_chunk.payload) for chunk in chunks.values()],
        chunks=chunks,
    )
    # upstream's order is that of the model, not of memory
    for name, parts in reversed(LAYOUT.items()):
        for group, begin, end in reversed(parts):
            stand_in = torch.nn.Parameter(torch.empty(0))
            optimizer.param_to_chunk16[stand_in], optimizer.param_to_range[stand_in] = chunks[name], (begin, end)
            groups[group]["params"].append(stand_in)
    return optimizer


def fake_adam() -> Any:
    return SimpleNamespace(state=defaultdict(dict), adamw_mode=True, updates=0)


def step(optimizer: Any, adam: Any) -> None:
    """As SuiteGeminiOptimizer does it; what is left of an overflow is forgotten once."""
    optimizer.chunk_adam = ChunkAdam(optimizer, adam, compiled=False)
    optimizer.zero_grad = lambda: SuiteGeminiOptimizer.zero_grad(optimizer)
    SuiteGeminiOptimizer.step(optimizer)
    assert optimizer.forgotten == [True]


def test_runs_end_at_gaps_groups_and_chunks() -> None:
    optimizer = fake_optimizer()
    names = {id(chunk): name for name, chunk in optimizer.chunks.items()}
    found = {(names[id(run.chunk)], run.group, run.begin, run.end) for run in runs_of(optimizer)}
    assert found == {("first", 0, 0, 10), ("first", 1, 10, 14), ("second", 0, 0, 4), ("second", 0, 8, 12)}


def test_a_step_updates_masters_and_writes_weights_over_gradients() -> None:
    optimizer, adam = fake_optimizer(), fake_adam()
    step(optimizer, adam)
    expected = {name: torch.arange(16.0) for name in LAYOUT}
    for name, parts in LAYOUT.items():
        for group, begin, end in parts:
            settings = AdamSettings(1, 0.1, 0.9, 0.95, 1e-8, GROUPS[group]["weight_decay"], True, -1)
            part = expected[name][begin:end]
            fused_adam([AdamSlot(part, *(torch.ones(end - begin) * f for f in (1, 0, 0)))], settings)
    for name, chunk in optimizer.chunks.items():
        torch.testing.assert_close(chunk.paired_chunk.payload, expected[name])
        covered = torch.zeros(16, dtype=torch.bool)
        for _, begin, end in LAYOUT[name]:
            covered[begin:end] = True
        assert torch.equal(chunk.payload[covered], expected[name].bfloat16()[covered])
        assert chunk.payload[~covered].eq(1).all()  # no parameter lies there
        assert chunk.optim_sync_flag and chunk.cpu_vis_flag  # the shard on the host is the newest
    assert adam.updates == 1 and not optimizer.module.chunk_manager.accumulating_grads
    assert all(adam.state[stand_in]["step"] == 1 for stand_in in optimizer.param_to_chunk16)


def test_loaded_states_are_taken_over() -> None:
    optimizer, adam = fake_optimizer(), fake_adam()
    by_chunks = ChunkAdam(optimizer, adam, compiled=False)
    optimizer.zero_grad = lambda: None
    by_chunks.step()
    stand_in, (begin, end) = next(iter(optimizer.param_to_range.items()))
    adam.state[stand_in].update(step=7, exp_avg=torch.full((end - begin,), 3.0))
    run = next(run for run in by_chunks.runs if any(each is stand_in for each, _ in run.stand_ins))
    exp_avg, _ = run.moments(adam.state)
    loaded = exp_avg[begin - run.begin : end - run.begin]
    assert loaded.eq(3).all() and adam.state[stand_in]["exp_avg"].data_ptr() == loaded.data_ptr()
    assert adam.state[stand_in]["step"] == 7
    assert run.moments(adam.state)[0] is exp_avg  # and nothing is copied again


@pytest.mark.parametrize("reuses_chunk", [True, False])
def test_a_skipped_step_forgets_its_gradients(reuses_chunk: bool) -> None:
    """Upstream leaves the accumulation going: the infinities would be in every later step's gradients too."""
    optimizer, adam = fake_optimizer(overflows=True), fake_adam()
    optimizer.module.chunk_manager.reuse_fp16_chunk = reuses_chunk
    step(optimizer, adam)
    assert adam.updates == 0 and not optimizer.module.chunk_manager.accumulating_grads
    for chunk in optimizer.chunks.values():
        assert torch.equal(chunk.paired_chunk.payload, torch.arange(16.0))
        weights = torch.arange(16.0) if reuses_chunk else torch.ones(16)
        assert torch.equal(chunk.payload, weights.bfloat16())
