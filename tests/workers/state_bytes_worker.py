"""Builds each plan on two ranks, trains a step, and compares the bytes of its states, kind by kind, with the planner's.
For torchrun; fails by assertion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.planner.states import states
from commons.plans.trainable import Trainable
from commons.training.loop import train_steps
from commons.training.session import build_session

# a width that two ranks do not divide, so that everything is padded
COMMON = (
    "--train_step 2 --warmup_step 1 --run_name unused --hidden_size 51 --num_heads 3 --num_layers 3 --batch_size 4"
    " --seq_len 16"
)
TENSOR_PARALLEL = "--tp_degree 2 --hidden_size 52 --num_heads 4"
CASES = [
    "--distplan CAI_Gemini",
    "--distplan CAI_Gemini --blocks_per_chunk 2 --offload_optim_frac 0.5",
    "--distplan CAI_Gemini --blocks_per_chunk 1 --offload_optim_frac 1 --offload_param_frac 0.5",
    "--distplan CAI_Gemini --placement auto",
    f"--distplan CAI_Gemini --blocks_per_chunk 1 {TENSOR_PARALLEL}",
    "--distplan CAI_Gemini --grad_accum 2 --blocks_per_chunk 1",
    "--distplan CAI_Gemini --peer_copies on --blocks_per_chunk 1",
    "--distplan CAI_Gemini --peer_copies on --shard_param_frac 0",
    "--distplan CAI_ZeRO1",
    "--distplan CAI_ZeRO2 --precision fp32",
    "--distplan CAI_Hybrid --zero_stage 1",
    "--distplan CAI_Hybrid --zero_stage 0 --precision fp32",
    f"--distplan CAI_Hybrid {TENSOR_PARALLEL}",
    "--distplan CAI_Hybrid --pp_degree 2",
    "--distplan Pytorch_DDP",
    "--distplan Pytorch_ZeRO",
    "--distplan Pytorch_FSDP",
]
KINDS = ("parameters", "master weights", "optimizer states")


def nbytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of the memory that the tensors lie in, each counted once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors if each is not None}
    return sum(storage.nbytes() for storage in storages.values())


def chunk_tensors(chunks: Iterable[Any]) -> Iterator[torch.Tensor | None]:
    for chunk in chunks:
        yield chunk.cuda_shard
        yield chunk.cpu_shard
        if chunk.is_gathered:
            yield chunk.cuda_global_chunk


def gemini_bytes(trainable: Any) -> dict[str, int]:
    chunks = list(trainable.optimizer.chunk16_set)
    copies = chunks[0].copies
    found = {
        "parameters": nbytes(chunk_tensors(chunks)),
        "master weights": nbytes(chunk_tensors(chunk.paired_chunk for chunk in chunks)),
        "optimizer states": moment_bytes(trainable.adam),
        "gradients": nbytes(chunk_tensors(chunk.grad_chunk for chunk in chunks if chunk.grad_chunk is not None)),
    }
    if copies is not None:
        peers = copies._peers
        found["inboxes"] = nbytes([copies._inboxes[peers.rank], peers._signals[peers.rank]])
    return found


def moment_bytes(optimizer: Any) -> int:
    return nbytes(item for state in optimizer.state.values() for item in state.values() if torch.is_tensor(item))


def other_bytes(trainable: Any) -> dict[str, int]:
    parameters = [parameter.data for parameter in trainable.model.parameters()]
    local = [getattr(parameter, "_local_tensor", parameter) for parameter in parameters]
    optimizer = trainable.optimizer
    inner = getattr(optimizer, "optim", optimizer)
    masters: list[Any] = []
    if hasattr(optimizer, "_master_param_groups_of_current_rank"):
        masters = [each for group in optimizer._master_param_groups_of_current_rank.values() for each in group]
    elif hasattr(optimizer, "working_to_master_map"):
        masters = [master for working, master in optimizer.working_to_master_map.items() if master is not working]
    return {
        "parameters": nbytes(local),
        "master weights": nbytes(masters),
        "optimizer states": moment_bytes(inner),
    }


def check(flags: str, here: device.Device) -> None:
    config = read_config([*COMMON.split(), *flags.split()])
    session = build_session(config, here)
    next(train_steps(session))
    trainable: Trainable = session.trainable
    gemini = config.distplan == "CAI_Gemini"
    real = Counter(gemini_bytes(trainable) if gemini else other_bytes(trainable))
    planned: Counter[str] = Counter()
    for held in states(config, here.world_size, here.rank):
        planned[held.kind] += held.nbytes
    kinds = (*KINDS, *(("gradients", "inboxes") if gemini else ()))
    print(f"rank {here.rank}: {flags}: {dict(real)}", flush=True)
    different = {kind: (planned[kind], real[kind]) for kind in kinds if planned[kind] != real[kind]}
    assert not different, f"rank {here.rank}, {flags}: (planned, real) {different}"


def main() -> None:
    here = process_group.launch("cpu", 60)
    wrong = []
    for flags in CASES:
        try:
            check(flags, here)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    main()
