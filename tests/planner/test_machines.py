"""Machines in words: what is understood, and what a wrong description is told."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest

from commons.config.schema import TrainConfig
from commons.planner import gpu_probe
from commons.planner.gpus import GIB, GPU_MODELS
from commons.planner.machines import SPEEDS, USUAL_NODE_LINK, find_gpu, parse_machine, resolve_for, this_machine
from commons.planner.room import Room
from commons.reporting.peak_rates import peak_flops


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "gpu", "host_gib", "gbits"),
    [
        ("64 x H100-80GB, 1000 GiB host", 8, 8, "H100-80GB", 1000, 400),
        ("128 nodes of 8 x H100-80GB, 2000 GiB host, 400 Gbit/s", 128, 8, "H100-80GB", 2000, 400),
        ("2 nodes of 4 x A100-40GB, 8 x 200 Gbit/s", 2, 4, "A100-40GB", None, 1600),
        ("2 nodes 4xA100-40GB, 50 GB/s", 2, 4, "A100-40GB", None, 400),
        ("h100", 1, 1, "H100-80GB", None, 400),
        ("2 × NVIDIA GeForce RTX 4070, 64 GB host", 1, 2, "RTX-4070-12GB", 59, 400),
        ("8 x NVIDIA H200, 1.5 TiB host", 1, 8, "H200-141GB", 1536, 400),
        ("12 x T4", 2, 6, "T4-16GB", None, 400),
    ],
)
def test_descriptions(text: str, nodes: int, per_node: int, gpu: str, host_gib: int | None, gbits: float) -> None:
    machine = parse_machine(text)
    assert machine.gpu is not None and not machine.at_hand
    assert (machine.nodes, machine.gpus_per_node, machine.gpu.name) == (nodes, per_node, gpu)
    assert (machine.host_bytes and machine.host_bytes // GIB) == host_gib
    assert machine.node_link == pytest.approx(gbits * 1e9 / 8)
    again = parse_machine(machine.describe())
    assert (again.nodes, again.gpus_per_node, again.gpu) == (nodes, per_node, machine.gpu)


def test_what_is_filled_in_is_said() -> None:
    taken, link = parse_machine("64 x H100, 1000 GiB host").assumed
    assert "8 hosts of 8" in taken and f"{USUAL_NODE_LINK * 8 / 1e9:.0f} Gbit/s" in link
    assert "memory is not given" in parse_machine("H100").assumed[0]
    assert not parse_machine("2 nodes of 8 x H100, 1000 GiB host, 400 Gbit/s").assumed


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("8 x H1000", "did you mean H100"),
        ("8 x A100", "use A100-80GB or A100-40GB"),
        ("8 x RTX 4080", "RTX-4090-24GB"),
        ("8 x MI300X", "is not known: use H100-80GB"),
        ("8 x H100-0GB", "0 GB is no GPU's memory: use H100-80GB"),
        ("8 x H100-9000GB", "9000 GB is no GPU's memory"),
        ("0 x H100", "from 1 to 100000"),
        ("0 nodes of 8 x H100", "from 1 to 100000"),
        ("8 x H100, 0 GiB host", "1000 GiB host"),
        ("8 x H100, 0 Gbit/s", "400 Gbit/s"),
        ("8 x H100, much memory", "is neither a node's memory nor its network"),
        ("8", "names no GPUs"),
        ("", "names no GPUs"),
    ],
)
def test_wrong_descriptions(text: str, told: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_machine(text)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_other_memory_of_a_known_gpu() -> None:
    known = GPU_MODELS["H100-80GB"]
    assert find_gpu("H100-40GB").memory_bytes == known.memory_bytes // 2


def test_every_gpu_has_speeds_and_a_peak() -> None:
    assert set(SPEEDS) == set(GPU_MODELS)
    assert all(peak_flops(model.device_name, "fp16") for model in GPU_MODELS.values())
    for name in GPU_MODELS:
        assert parse_machine(f"2 x {name}").describe() == f"2 x {name}"


def test_another_machine_has_a_compiler() -> None:
    machine = parse_machine("2 x H100")
    config = resolve_for(TrainConfig(model_type="gpt2_xl"), machine)
    assert (config.compile, config.cuda_graph, config.peer_copies) == ("on", "on", "on")
    assert "compile" in config.chosen
    assert resolve_for(TrainConfig(compile="off"), machine).compile == "off"
    assert resolve_for(TrainConfig(distplan="CAI_Hybrid", tp_degree=2), machine).compile == "off"


def test_this_machine_without_a_gpu() -> None:
    machine = this_machine(1, 2, "cpu")
    assert machine.at_hand and machine.gpu is None and machine.device_type == "cpu" and machine.host_bytes
    assert machine.describe().startswith("2 x CPU rank")


def test_gpus_are_asked_by_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what a child would print is read back, and what it cannot do is told in a line."""
    model = GPU_MODELS["H100-80GB"]
    free = iter((70 * GIB, 60 * GIB))
    room = Room(model, 0, 0, "", None, None)
    printed = gpu_probe.told(2, lambda on_gpu, index: dataclasses.replace(room, device=next(free)))
    child = subprocess.CompletedProcess([], 0, stdout=f"noise\n{printed}\n", stderr="")
    monkeypatch.setattr(gpu_probe.subprocess, "run", lambda *arguments, **options: child)
    machine = this_machine(1, 2, "cuda")
    assert machine.gpu is not None and machine.gpu.name == model.name and machine.speeds == SPEEDS["H100-80GB"]
    assert 60 * GIB < machine.gpu.memory_bytes < 61 * GIB, "the fuller one's, and a context"
    child.returncode, child.stderr = 1, "Traceback\nRuntimeError: no driver"
    with pytest.raises(RuntimeError, match="cannot be asked for their memory: RuntimeError: no driver"):
        this_machine(1, 2, "cuda")
