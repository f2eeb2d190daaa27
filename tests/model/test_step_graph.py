"""The captured passes: when there are any, and that replaying them trains the same model."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from suite_runs import REPOSITORY, launch, run_processes, torchrun

from benchmarks import trace
from commons.config.auto import EAGER_STEPS, graph_problems
from commons.config.schema import TrainConfig
from commons.distributed.device import Device
from commons.model.cuda_graph import StepGraph, has_room
from commons.plans import torch_native
from commons.plans.colossal import boosted
from commons.plans.registry import PLANS
from commons.plans.trainable import weighted
from commons.reporting.run_log import RunLog
from commons.reporting.writing import write_json
from commons.training.session import Session
from commons.training.tracing import TRACE_FILE


def problems(device_type: str = "cuda", world_size: int = 1, peer_copies: bool = False, **settings) -> list[str]:
    config = TrainConfig(**settings)
    return list(graph_problems(config, device_type, world_size, peer_copies))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"device_type": "cpu"}, "CPU"),
        ({"world_size": 2}, "data-parallel ranks without --peer_copies"),
        ({"world_size": 2, "peer_copies": True, "max_prefetch": 0}, "--max_prefetch 0 on several ranks"),
        ({"distplan": "CAI_ZeRO1"}, "CAI_ZeRO1"),
        ({"distplan": "Pytorch_DDP", "compile": "off"}, "without --compile"),
        ({"distplan": "Pytorch_FSDP", "dropout": 0.1}, "--dropout"),
        ({"gemini_hooks": "operation"}, "--gemini_hooks operation"),
        ({"tp_degree": 2, "world_size": 2}, "--tp_degree"),
        ({"placement": "auto"}, "--placement auto"),
        ({"placement": "cpu"}, "--placement cpu"),
        ({"placement": "const"}, "--placement const"),
        ({"offload_optim_frac": 0.5}, "--offload_optim_frac"),
        ({"precision": "fp16"}, "fp16"),
        ({"grad_accum": 2}, "--grad_accum"),
        ({"dropout": 0.1}, "--dropout"),
        ({"train_step": EAGER_STEPS}, "first"),
    ],
)
def test_what_changes_from_step_to_step_is_not_captured(settings, reason):
    assert not problems() and not problems(world_size=2, peer_copies=True) and not problems(max_prefetch=0)
    assert not problems(world_size=2, peer_copies=True, max_prefetch=0, shard_param_frac=0.0)
    for plan in ("Pytorch_DDP", "Pytorch_ZeRO", "Pytorch_FSDP"):
        assert not problems(world_size=2, distplan=plan)
    (problem,) = problems(**settings)
    assert reason in problem


def test_the_capture_is_no_step_that_counts():
    assert TrainConfig().resolve("cuda").warmup_step > EAGER_STEPS


def captured(world_size=1, peer_copies=None, **settings):
    config = TrainConfig(**settings).resolve("cuda", world_size)
    return config.captures_graphs(world_size, config.peer_copies == "on" if peer_copies is None else peer_copies)


def test_auto_captures_where_blocks_are_compiled(monkeypatch):
    monkeypatch.setattr("commons.config.resolved.compile_problem", lambda device_type: None)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert captured()
    assert not captured(compile="off")
    assert captured(compile="off", cuda_graph="on")
    assert not captured(cuda_graph="off")
    assert not captured(grad_accum=2)
    assert captured(world_size=2)
    assert not captured(world_size=2, peer_copies=False), "they do not reach each other's memory"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert not captured(world_size=2)


def test_on_is_refused_with_every_reason(tmp_path):
    run = launch(tmp_path, "--cuda_graph", "on", "--device", "cpu", "--grad_accum", "2")
    assert run.returncode == 2
    assert "has no effect on a CPU: use --cuda_graph off" in run.console and "under --grad_accum" in run.console


class Captured:
    """In place of a StepGraph, which only a GPU has."""

    peak_bytes = 7

    def __init__(self, forward, backward, tokens) -> None:
        self.forwards, self.backwards = [], 0
        backward(forward(tokens))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.forwards.append(tokens)
        return tokens.sum()

    def backward(self) -> None:
        self.backwards += 1


class Chunk:
    l2_norm: torch.Tensor | None = None


@pytest.fixture
def graphed(monkeypatch) -> Any:
    """Tells its model's calls; the backward pass leaves a chunk's norm."""
    monkeypatch.setattr(boosted, "StepGraph", Captured)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 1)
    monkeypatch.setattr(boosted, "every_rank", lambda here, device: here)
    chunk = Chunk()
    calls: list[str] = []

    def model(input_ids, **_):
        calls.append("forward")
        return SimpleNamespace(loss=input_ids.sum())

    def wait_chunks(chunks):
        calls.extend(f"wait for {chunk}" for chunk in chunks)

    model.gemini_manager = SimpleNamespace(
        async_works={"the next": None}, wait_chunks=wait_chunks, chunk_manager=SimpleNamespace(_prefetch_stream=None)
    )

    def backward(_loss, _optimizer):
        calls.append("backward")
        chunk.l2_norm = torch.ones(())

    booster, optimizer = SimpleNamespace(backward=backward), SimpleNamespace(chunk16_set=[chunk])
    trainable: Any = boosted.GraphedTrainable(booster, model, optimizer, None, False)  # pyright: ignore
    trainable.calls, trainable.chunk = calls, chunk
    return trainable


def test_the_first_steps_are_launched_the_others_replayed(graphed, monkeypatch):
    monkeypatch.setattr(boosted, "has_room", lambda step_bytes: step_bytes == 2)
    for step in range(EAGER_STEPS + 3):
        graphed.chunk.l2_norm = None  # the optimizer has used it
        graphed.backward(graphed.forward(torch.full((2,), step)))
        assert graphed.chunk.l2_norm is not None
    captured = ["forward", "wait for the next", "backward", "wait for the next"]  # no gather reaches into the other
    assert graphed.calls == ["forward", "backward"] * EAGER_STEPS + captured
    assert [int(tokens[0]) for tokens in graphed.graph.forwards] == [EAGER_STEPS, EAGER_STEPS + 1, EAGER_STEPS + 2]
    assert graphed.graph.backwards == 3 and graphed.replayed_bytes == 7
    with torch.no_grad():
        graphed.forward(torch.zeros(2))
    assert graphed.calls[-1] == "forward" and len(graphed.graph.forwards) == 3


def test_captured_steps_of_torchs_plans_are_the_launched_ones(tmp_path):
    """Passes before the capture leave nothing behind, and the optimizer reads gradients where replays write them."""
    plans = ["Pytorch_DDP", "Pytorch_ZeRO", "Pytorch_FSDP"]
    flags = ["--device", "cpu", "--clip_grad_norm", "0.1", "--lr", "1e-2", "--log_dir", str(tmp_path)]
    code, console = torchrun(REPOSITORY / "tests" / "workers" / "captured_worker.py", 2, " ".join(plans), *flags)
    assert code == 0, console
    assert all(console.count(f"the same {plan}") == 1 for plan in plans), console


def test_a_torch_that_cannot_time_inside_a_graph_launches_torchs_plans(monkeypatch, capsys):
    model = torch.nn.Linear(2, 1)
    config = TrainConfig(distplan="Pytorch_DDP", precision="fp32").resolve("cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    device, no_states = Device("cpu", "a CPU", 0, 0, 1), cast(Any, None)
    trainable = torch_native.CapturedTorchTrainable(model, optimizer, config, device, True, no_states)
    monkeypatch.setattr(torch_native, "TIMES_INSIDE", False)
    monkeypatch.setattr(trainable, "forward", lambda tokens: model(tokens).sum())
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 0)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 0)
    for _ in range(EAGER_STEPS + 2):
        trainable.forward_backward(torch.ones(3, 2), 1.0, lambda phase, at=None: None)
    assert model.weight.grad is not None and model.weight.grad.tolist() == [[3.0 * (EAGER_STEPS + 2)] * 2]
    assert trainable.replayed_bytes == 0
    assert capsys.readouterr().err.count("cannot time passes inside a CUDA graph") == 1


def test_both_passes_of_a_micro_batch_are_one_call_that_tells_its_phases(graphed, monkeypatch):
    monkeypatch.setattr(boosted, "has_room", lambda step_bytes: True)
    told: list[tuple[str, int]] = []
    for _ in range(EAGER_STEPS + 2):
        told.clear()
        loss = graphed.forward_backward(torch.full((2,), 3), 1 / 3, lambda phase: told.append((phase, len(told))))
        assert told == [("forward", 0), ("backward", 1)] and loss.item() == 2.0
    assert graphed.graph.backwards == 2


@pytest.mark.parametrize("micro_batches", range(1, 50))
def test_a_weight_rounds_as_the_division_by_the_number_of_micro_batches(micro_batches):
    loss = torch.rand(1000, generator=torch.Generator().manual_seed(micro_batches))
    assert weighted(loss, 1 / micro_batches).equal(loss / micro_batches)


def test_without_room_every_step_is_launched(graphed, monkeypatch, capsys):
    monkeypatch.setattr(boosted, "has_room", lambda _: False)
    for _ in range(EAGER_STEPS + 2):
        graphed.backward(graphed.forward(torch.zeros(2)))
    assert graphed.calls == ["forward", "backward"] * (EAGER_STEPS + 2) and graphed.replayed_bytes == 0
    assert capsys.readouterr().err.count("too little free device memory") == 1


def test_room_is_what_is_free_or_cached(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (2 * gib, 80 * gib))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 60 * gib)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: 20 * gib)
    assert has_room(37 * gib) and not has_room(39 * gib)


def test_tokens_of_another_shape_are_refused():
    graph = StepGraph.__new__(StepGraph)  # without a capture, which only a GPU has
    graph.tokens = torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"\(4, 8\), called with \(1, 8\)"):
        graph.forward(torch.zeros(1, 8))


STEPS = ("--model_type", "gpt2_tiny", "--batch_size", "8", "--seq_len", "128", "--train_step", "8", "--lr", "1e-3")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        "--clip_grad_norm 0.5",
        "--activation_checkpointing on --compile off",
        "--precision fp8 --lr_schedule cosine",
        "--shard_param_frac 0.5 --trace_step 5",
    ],
)
def test_a_replayed_step_is_the_step(tmp_path, flags):
    runs = {}
    for choice in ("on", "off"):
        run = launch(tmp_path / choice, *STEPS, *flags.split(), "--cuda_graph", choice)
        assert run.returncode == 0, run.console[-3000:]
        assert ("replayed from here on" in run.console) == (choice == "on")
        assert "--trace_step" not in flags or trace.read_work(run.run_dir / TRACE_FILE)
        runs[choice] = run.records
    for replayed, launched in zip(runs["on"], runs["off"], strict=True):
        assert replayed["loss"] == pytest.approx(launched["loss"], rel=2e-4)
        if "clip" in flags:
            assert replayed["grad_norm"] == pytest.approx(launched["grad_norm"], rel=1e-3)
        # the captured stream has cuBLAS workspaces of its own
        assert -8 < replayed["device_memory_peak_mib"] - launched["device_memory_peak_mib"] < 100
    losses = [record["loss"] for record in runs["on"]]
    assert len(set(losses)) == len(losses)  # other batches and other weights every time


UNCAPTURABLE = """
import torch
from commons.distributed.device import Device
from commons.model.cuda_graph import StepGraph

weight = torch.ones(4, device="cuda", requires_grad=True)

def forward(tokens):
    loss = (weight * tokens).sum()
    loss.item()  # waits for what is only captured
    return loss

StepGraph(forward, torch.Tensor.backward, torch.arange(4, device="cuda"))
"""


@pytest.mark.gpu
def test_what_cannot_be_captured_is_told_with_the_way_out():
    returncode, console = run_processes([sys.executable, "-c", UNCAPTURABLE])  # which is of no use afterwards
    assert returncode == 1
    assert re.search(
        r"the passes could not be captured as CUDA graphs \(.*captur.*\): use --cuda_graph off", console, re.DOTALL
    )


def test_config_json_tells_what_came_of_it(monkeypatch, tmp_path):
    """What was decided beforehand, until it turns out otherwise: no room to capture, no way to the others' memory."""
    monkeypatch.setattr("commons.config.resolved.compile_problem", lambda device_type: None)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    config = TrainConfig(log_dir=str(tmp_path), run_name="run").resolve("cuda", 2)
    assert (config.peer_copies, config.cuda_graph) == ("on", "on")

    def settled(steps_done: int, shared_bytes: int | None, replayed_bytes: int) -> tuple[str, str]:
        trainable: Any = SimpleNamespace(shared_bytes=shared_bytes, replayed_bytes=replayed_bytes)
        session = Session(config, Device("cuda", "GPU", 0, 0, 2), PLANS["CAI_Gemini"], config.shape(), trainable, None)
        log.settle(session.settled_config(steps_done))
        written = json.loads((tmp_path / "run" / "config.json").read_text())
        assert "auto" not in [value for name, value in written.items() if name != "placement"]
        return written["peer_copies"], written["cuda_graph"]

    log = RunLog(config, [SimpleNamespace()])  # pyright: ignore[reportArgumentType]
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run" / "config.json", config)
    assert settled(0, 7, 0) == ("on", "on")
    assert settled(EAGER_STEPS + 1, 7, 9) == ("on", "on")
    assert settled(EAGER_STEPS + 1, 7, 0) == ("on", "off"), "no room"
    assert settled(0, None, 0) == ("off", "off"), "they do not reach each other"
