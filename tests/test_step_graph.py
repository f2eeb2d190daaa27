"""The recorded passes: when there are any, and that replaying them trains the same model."""

from __future__ import annotations

import pytest
import torch
from suite_runs import launch

from commons.config import TrainConfig
from commons.step_graph import StepGraph, graph_problems, wants_graph

ONE_GPU = {"device_type": "cuda", "world_size": 1}


def problems(device_type: str = "cuda", world_size: int = 1, **settings) -> list[str]:
    return list(graph_problems(TrainConfig(**settings), device_type, world_size))


@pytest.mark.parametrize(
    "settings, cure",
    [
        ({"device_type": "cpu"}, "--cuda_graph off"),
        ({"world_size": 2}, "GPUNUM=1"),
        ({"distplan": "Pytorch_DDP"}, "--distplan CAI_Gemini"),
        ({"gemini_hooks": "operation"}, "--gemini_hooks block"),
        ({"placement": "auto"}, "--placement cuda"),
        ({"offload_optim_frac": 0.5}, "--placement cuda"),
        ({"precision": "fp16"}, "--precision bf16"),
        ({"grad_accum": 2}, "--grad_accum 1"),
        ({"dropout": 0.1}, "--dropout 0"),
    ],
)
def test_what_changes_from_step_to_step_is_not_recorded(settings, cure):
    assert not problems()
    (problem,) = problems(**settings)
    assert cure in problem


def test_auto_records_where_blocks_are_compiled(monkeypatch):
    monkeypatch.setattr("commons.compiling.wants_compile", lambda config, device_type: config.compile != "off")
    assert wants_graph(TrainConfig(), **ONE_GPU)
    assert not wants_graph(TrainConfig(compile="off"), **ONE_GPU)
    assert wants_graph(TrainConfig(compile="off", cuda_graph="on"), **ONE_GPU)
    assert not wants_graph(TrainConfig(cuda_graph="off"), **ONE_GPU)
    assert not wants_graph(TrainConfig(grad_accum=2), **ONE_GPU)


def test_on_is_refused_with_every_reason(tmp_path):
    run = launch(tmp_path, "--cuda_graph", "on", "--device", "cpu", "--grad_accum", "2")
    assert run.returncode == 2
    assert "nothing on a CPU" in run.console and "--grad_accum 1" in run.console


STEPS = ("--model_type", "gpt2_tiny", "--batch_size", "8", "--seq_len", "128", "--train_step", "8", "--lr", "1e-3")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    ["", "--clip_grad_norm 0.5", "--activation_checkpointing on --compile off"],
)
def test_a_replayed_step_is_the_step(tmp_path, flags):
    runs = {}
    for choice in ("on", "off"):
        run = launch(tmp_path / choice, *STEPS, *flags.split(), "--cuda_graph", choice)
        assert run.returncode == 0, run.console[-3000:]
        assert ("recorded and replayed" in run.console) == (choice == "on")
        runs[choice] = run.records
    for replayed, launched in zip(runs["on"], runs["off"], strict=True):
        assert replayed["loss"] == pytest.approx(launched["loss"], rel=2e-4)
        if "clip" in flags:
            assert replayed["grad_norm"] == pytest.approx(launched["grad_norm"], rel=1e-3)
        # the recorded stream has cuBLAS workspaces of its own
        assert -8 < replayed["device_memory_peak_mib"] - launched["device_memory_peak_mib"] < 100
    losses = [record["loss"] for record in runs["on"]]
    assert len(set(losses)) == len(losses)  # other batches and other weights every time
    assert losses[-1] < losses[0]


@pytest.mark.gpu
def test_what_cannot_be_recorded_is_told_with_the_way_out():
    weight = torch.ones(4, device="cuda", requires_grad=True)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        loss = (weight * tokens).sum()
        loss.item()  # waits for what is only recorded
        return loss

    with pytest.raises(RuntimeError, match=r"--cuda_graph off.*captur"):
        StepGraph(forward, torch.Tensor.backward, lambda: None, torch.arange(4, device="cuda"))
