"""Trains gpt2_tiny under Gemini on two ranks and counts what moves. For torchrun; fails by assertion."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist

from benchmarks.parity_cases import COMMON_OF_GEMINI
from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.training.loop import train_steps
from commons.training.session import build_session

STEPS = 3
FLAGS = ["--train_step", str(STEPS), "--warmup_step", "1", "--run_name", "unused", *COMMON_OF_GEMINI.split()]


def count_traffic(here: device.Device, *flags: str) -> tuple[list, Counter]:
    """Gemini's chunks, and what one step moved: gathers, reductions and chunk moves by where they went."""
    config = read_config([*FLAGS, *flags])
    session = build_session(config, here)
    from commons.plans.colossal.suite_chunk import SuiteChunk

    counts: Counter = Counter()
    originals = dist.all_gather_into_tensor, dist.reduce_scatter_tensor, SuiteChunk.shard_move

    def gather(output, shard, *args, **kwargs):
        counts["gather_bytes"] += output.nbytes
        counts["gathers"] += 1
        return originals[0](output, shard, *args, **kwargs)

    def reduce(output, chunk, *args, **kwargs):
        counts["reduce_bytes"] += chunk.nbytes
        counts["reductions"] += 1
        return originals[1](output, chunk, *args, **kwargs)

    def move(chunk, to, *args, **kwargs):
        counts[f"moves to {to.type}"] += chunk.device_type != to.type
        counts[f"bytes to {to.type}"] += chunk.chunk_mem if chunk.device_type != to.type else 0
        return originals[2](chunk, to, *args, **kwargs)

    steps = train_steps(session)
    next(steps)  # the first step finds the chunks where the optimizer put them, the next ones where a step leaves them
    dist.all_gather_into_tensor, dist.reduce_scatter_tensor, SuiteChunk.shard_move = gather, reduce, move  # pyright: ignore
    try:
        next(steps)
    finally:
        dist.all_gather_into_tensor, dist.reduce_scatter_tensor, SuiteChunk.shard_move = originals
    counts["gathers"] -= 1  # the record's own all-gather of a few numbers
    model: Any = session.trainable.model
    return list(model.chunk_manager.get_chunks(model.fp16_params)), counts


def main() -> None:
    here = process_group.launch("cpu", 60)
    chunks, sharded = count_traffic(here)
    print("all sharded:", len(chunks), dict(sharded))
    # four blocks, the position table with the final norm, and the embedding, each half here and half there
    assert len(chunks) == 6 and all(chunk.pg_size == 2 and not chunk.keep_gathered for chunk in chunks)
    assert all(chunk.shard_size * 2 == chunk.chunk_size for chunk in chunks)
    # each chunk at least once for the forward and once for the backward pass; each gradient reduced exactly
    # once
    assert sharded["gathers"] >= 2 * len(chunks) - 1
    assert sharded["reductions"] == len(chunks)
    assert sharded["reduce_bytes"] == sum(chunk.chunk_mem for chunk in chunks)
    assert not sharded["moves to cpu"] and not sharded["moves to cuda"]

    _, together = count_traffic(here, "--blocks_per_chunk", "4")
    print("the whole model in one chunk:", dict(together))
    assert (together["gathers"], together["reductions"]) == (1, 1)

    chunks, offloaded = count_traffic(here, "--placement", "cpu")
    print("all offloaded:", dict(offloaded))
    assert offloaded["moves to cuda"] >= 2 * len(chunks) - 1
    assert offloaded["moves to cpu"] >= 2 * len(chunks) - 1

    # each chunk's gradients go to the host once a step, and after the forward pass a fraction of the parameters
    whole, largest = sum(chunk.chunk_mem for chunk in chunks), max(chunk.chunk_mem for chunk in chunks)
    for fraction in (0.0, 0.3, 0.6):
        _, some = count_traffic(here, "--offload_optim_frac", "1", "--offload_param_frac", str(fraction))
        print(fraction, "of the parameters wait on the host:", dict(some))
        waiting = some["bytes to cpu"] - whole
        assert fraction * whole - largest < waiting <= fraction * whole, (fraction, waiting, whole)

    chunks, kept = count_traffic(here, "--shard_param_frac", "0")
    print("all kept:", dict(kept))
    assert kept["gathers"] == len(chunks), "each chunk is gathered once a step and kept for the backward pass"
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    main()
