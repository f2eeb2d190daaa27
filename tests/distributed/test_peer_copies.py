"""Tensors gathered and averaged by copies between the memories of the ranks: on real ranks that wait where they must
and nowhere else, and in training, where nothing may change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from suite_runs import REPOSITORY, FinishedRun, launch, torchrun

from commons.cli import checks
from commons.config.auto import graph_problems, peer_problems
from commons.config.schema import TrainConfig
from commons.distributed import peer_copies
from commons.distributed.device import Device
from commons.distributed.peer_copies import find_peers, mean_of
from commons.distributed.peer_memory import check_processor
from commons.lifecycle.outcome import RunError
from commons.plans.registry import PLANS

WORKER = REPOSITORY / "tests" / "workers" / "peer_copies_worker.py"
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.bfloat16, torch.float16]

# ---- the copies


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_rank_reads_what_all_have_written(tmp_path, ranks):
    returncode, console = torchrun(WORKER, ranks, "copies", TMPDIR=str(tmp_path))
    assert returncode == 0, console[-4000:]


def test_training_is_the_same_to_the_bit():
    returncode, console = torchrun(WORKER, 2, "training")
    assert returncode == 0, console[-4000:]


# ---- the mean


def mean(rows: list[list[float]], dtype: torch.dtype, device: str) -> list[float]:
    """Of this rank's numbers, which are the first row, and the others'."""
    own, *others = torch.tensor(rows, dtype=dtype, device=device)
    out = torch.empty_like(own)
    mean_of(own, torch.stack(others), out)
    return out.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_is_summed_up_in_fp32(device):
    # in bf16, 256 + 1 is 256
    assert mean([[256.0], [1.0], [1.0], [2.0]], torch.bfloat16, device) == [65.0]
    # in fp16, these sums would be infinite
    assert mean([[60000.0, -65504.0], [50016.0, -65504.0]], torch.float16, device) == [55008.0, -65504.0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_no_infinity_is_lost_in_the_mean(dtype, device):
    infinite, not_a_number = float("inf"), float("nan")
    own = [infinite, 1.0, -infinite, infinite, not_a_number, 1.0, 1.0]
    other = [1.0, infinite, 1.0, -infinite, 1.0, not_a_number, 3.0]
    for rows in ([other], [[1.0] * len(own), other]):
        means = torch.tensor(mean([own, *rows], dtype, device))
        assert means[:3].tolist() == [infinite, infinite, -infinite]
        assert means[3:6].isnan().all() and means[6].isfinite()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("elements", [1, 2047, 2048, 5000])
@pytest.mark.parametrize("others", [1, 2, 7])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_the_mean_is_that_in_fp64(dtype, others, elements, device):
    """Of rows that do not follow one another in memory, as in an inbox, and nothing beside the result is written."""
    generator = torch.Generator().manual_seed(elements + others)
    own = torch.randn(elements, generator=generator).to(device, dtype)
    inbox = torch.randn(others, elements + 304, generator=generator).to(device, dtype)
    memory = torch.full((elements + 256,), 7.0, dtype=dtype, device=device)
    rows = inbox[:, :elements]
    exact = torch.cat([own.unsqueeze(0), rows]).double().mean(0)
    mean_of(own, rows, memory[128 : 128 + elements])
    # half of the last place, and the roundings of a sum in fp32
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6
    assert ((memory[128 : 128 + elements].double() - exact).abs() <= bound).all()
    assert (memory[:128] == 7).all() and (memory[128 + elements :] == 7).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_what_is_averaged_stays_as_it_is(dtype):
    own, others = torch.tensor([1.0, 2.0], dtype=dtype), torch.tensor([[3.0, 4.0]], dtype=dtype)
    mean_of(own, others, torch.empty(2, dtype=dtype))
    assert own.tolist() == [1, 2] and others.tolist() == [[3, 4]]


# ---- where it can be done


def problems(world_size: int = 2, local_world_size: int = 0, **settings) -> list[str]:
    return list(peer_problems(TrainConfig(**settings), world_size, local_world_size or world_size))


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"gemini_hooks": "operation"}, "--gemini_hooks operation"),
        ({"tp_degree": 2, "world_size": 4}, "--tp_degree"),
        ({"placement": "auto"}, "--placement auto"),
        ({"placement": "cpu"}, "--placement cpu"),
        ({"placement": "const"}, "--placement const"),
        ({"offload_optim_frac": 0.5}, "--offload_optim_frac"),
        ({"offload_param_frac": 0.5}, "--offload_param_frac"),
        ({"world_size": 1}, "one data-parallel rank"),
        ({"world_size": 4, "local_world_size": 2}, "across machines"),
    ],
)
def test_where_nothing_is_gathered_by_copies(settings, reason):
    assert not problems() and not problems(placement="cuda", precision="fp16", grad_accum=2, shard_param_frac=0.5)
    (problem,) = problems(**settings)
    assert reason in problem


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_on_a_cpu_it_has_to_be_asked_for(choice):
    assert find_peers(TrainConfig(peer_copies=choice).resolve("cpu", 2), Device("cpu", "CPU", 0, 0, 2)) is None


GPUS = Device("cuda", "GPU", 0, 0, 2)


def test_who_has_taken_peer_access_from_nccl_is_left_without(monkeypatch):
    monkeypatch.setattr(peer_copies, "peers_of", lambda device: "peers")
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert find_peers(TrainConfig().resolve("cuda", 2), GPUS) == "peers"
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert find_peers(TrainConfig().resolve("cuda", 2), GPUS) is None
    assert find_peers(TrainConfig(peer_copies="on").resolve("cuda", 2), GPUS) == "peers"


def test_where_ranks_do_not_reach_each_other_nccl_takes_over_unless_copies_were_asked_for(monkeypatch, capsys):
    def unreachable(device):
        raise RuntimeError("rank 1: no access from GPU 1 to GPU 0")

    monkeypatch.setattr(peer_copies, "peers_of", unreachable)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    assert find_peers(TrainConfig().resolve("cuda", 2), GPUS) is None
    told = capsys.readouterr().err
    assert "no access from GPU 1 to GPU 0" in told and "falling back to NCCL" in told and len(told.splitlines()) == 1
    for settings, way_out in (
        ({"peer_copies": "on"}, "use --peer_copies off"),
        ({"cuda_graph": "on"}, "use --cuda_graph off"),
        ({"peer_copies": "on", "cuda_graph": "on"}, "use --peer_copies off and --cuda_graph off"),
    ):
        with pytest.raises(RunError, match=f"no access.*{way_out}$"):
            find_peers(TrainConfig(**settings).resolve("cuda", 2), GPUS)  # pyright: ignore[reportArgumentType]


def test_only_processors_that_keep_the_order_of_writes_share_memory(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    check_processor()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(RuntimeError, match="on aarch64 processors"):
        check_processor()


def test_on_is_refused_with_every_reason(tmp_path):
    flags = ("--peer_copies", "on", "--device", "cpu", "--placement", "cpu", "--gemini_hooks", "operation")
    run = launch(tmp_path, *flags, ranks=2)
    assert run.returncode == 2
    assert "--peer_copies on has no effect under --placement cpu, which moves chunks: use --peer_copies off" in (
        run.console
    )
    assert "--peer_copies on has no effect under --gemini_hooks operation: use" in run.console


def test_passes_of_several_ranks_are_recorded_where_they_copy():
    """What a collective does is not recorded, copies are."""
    reason = "on several data-parallel ranks without --peer_copies"
    assert list(graph_problems(TrainConfig(), "cuda", 2)) == [reason]
    assert not list(graph_problems(TrainConfig(), "cuda", 2, peer_copies=True))
    told = f"--cuda_graph on has no effect {reason}: use --cuda_graph off"
    for choice, local_world_size, refused in (
        ("auto", 2, False),
        ("on", 2, False),
        ("off", 2, True),
        ("auto", 1, True),
    ):
        config = TrainConfig(model_type="gpt2_tiny", cuda_graph="on", peer_copies=choice)  # pyright: ignore
        found = checks.problems(config, 2, "cuda", 2, PLANS["CAI_Gemini"], local_world_size=local_world_size)
        assert (told in found) == refused, found


# ---- runs

FLAGS = ("--model_type", "gpt2_tiny", "--batch_size", "4", "--seq_len", "64", "--lr", "1e-3", "--warmup_step", "1")


def trained(folder: Path, *flags: str) -> FinishedRun:
    run = launch(folder, *FLAGS, *flags, ranks=2)
    assert run.returncode == 0, run.console[-3000:]
    return run


def test_a_run_says_whether_it_copies(tmp_path):
    losses = {}
    for choice in ("on", "off"):
        run = trained(tmp_path / choice, "--peer_copies", choice, "--device", "cpu", "--train_step", "4")
        assert ("copies between ranks" in run.console) == (choice == "on")
        assert run.file("config.json")["peer_copies"] == choice
        losses[choice] = run.losses
    assert losses["on"] == losses["off"] and len(set(losses["on"])) == 4


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--blocks_per_chunk 1 --max_prefetch 2 --clip_grad_norm 0.5",
        "--blocks_per_chunk 1 --shard_param_frac 0 --clip_grad_norm 0.5 --batch_size 64 --seq_len 128",
    ],
)
def test_gpus_train_the_same_with_copies_and_with_nccl(tmp_path, flags):
    """To the bit: the mean of two is exact. Launched and replayed."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs 2 GPUs, this machine has {torch.cuda.device_count()}")
    choices = {
        "launched": "--peer_copies on --cuda_graph off",
        "replayed": "--peer_copies on --cuda_graph on",
        "nccl": "--peer_copies off --cuda_graph off",
    }
    losses = {}
    for name, choice in choices.items():
        run = trained(tmp_path / name, "--device", "cuda", "--train_step", "12", *flags.split(), *choice.split())
        assert ("copies between ranks" in run.console) == (name != "nccl")
        assert ("replayed from here on" in run.console) == (name == "replayed")
        losses[name] = run.losses
    assert losses["launched"] == losses["nccl"] and losses["replayed"] == losses["nccl"]
    assert len(set(losses["nccl"])) == 12
