"""Trains gpt2_tiny under Gemini's placement auto where the device is too small for its chunks. For torchrun; fails by
assertion.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.parity_cases import COMMON
from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.plans.colossal.runtime import prepare
from commons.training.loop import train_steps
from commons.training.session import build_session

# 16 blocks and two more chunks, 1.8 MB in all, so that there is something to choose from
FLAGS = f"{COMMON} --num_layers 16 --blocks_per_chunk 1 --device cpu"
CAPACITY, WORKING_SET = 2_600_000, 100_000  # bytes: in the first step four fifths of these are not for chunks

# What acts in the first step, and what acts later: see AutoPlacementPolicy.evict_tensors.
AUTO = {
    "defaults": "--max_prefetch 2",
    "more in the first step": "--max_prefetch 2 --warmup_non_model_data_ratio 0.3",
    "less later": "--max_prefetch 2 --steady_cuda_cap_ratio 0.6",
    "less later, no prefetch": "--max_prefetch 0 --steady_cuda_cap_ratio 0.6",
}


def train(here: device.Device, flags: str) -> tuple[list[tuple[float, float | None]], list[float]]:
    """Each step's loss and gradient norm, and the share of the parameters' bytes that is on the host after each
    forward pass.
    """
    session = build_session(read_config(f"{FLAGS} {flags}".split()), here)
    trainable: Any = session.trainable
    chunks, backward, shares = trainable.optimizer.chunk16_set, trainable.backward, []
    whole = sum(chunk.chunk_mem for chunk in chunks)

    def look_and_go_back(loss: torch.Tensor) -> None:
        shares.append(sum(chunk.chunk_mem for chunk in chunks if chunk.device_type == "cpu") / whole)
        backward(loss)

    trainable.backward = look_and_go_back
    steps = [(record.loss, record.grad_norm) for record in train_steps(session)]
    if "auto" in flags:  # what README says of the masters: no free memory brings them to the device
        assert all(chunk.paired_chunk.device_type == "cpu" for chunk in chunks)
    return steps, shares


def check(here: device.Device, common: str, batches: int) -> None:
    """Every bit is as under static, and each ratio moves what it is for.

    Args:
        batches: forward passes a step.
    """
    expected, shares = train(here, f"--placement static {common}")
    assert not any(shares)
    first, later = {}, {}
    for name, flags in AUTO.items():
        steps, shares = train(here, f"--placement auto {common} {flags}")
        if here.rank == 0:
            print(common, name, steps, shares, flush=True)
        assert steps == expected, (name, steps, expected)
        first[name], later[name] = shares[0], shares[batches:]
    assert first["defaults"] > 0.5 > first["more in the first step"] > 0
    assert not any(later["defaults"])
    assert all(share > 0.1 for name in ("less later", "less later, no prefetch") for share in later[name])


def main() -> None:
    here = process_group.launch("cpu", 60)
    prepare("cpu")
    from commons.plans.colossal import boosted, host_backend

    host_backend.install(CAPACITY, WORKING_SET)
    # auto fills its chunks in the order of the module; sums of bf16 gradients over batches are rounded differently
    # where another rank owns them, so static has to fill its chunks in that order too
    boosted.blocks_first = lambda model: None
    check(here, "--clip_grad_norm 0.3", batches=1)
    check(here, "--clip_grad_norm 0.3 --grad_accum 2", batches=2)
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    main()
