"""Trains, saves, and goes on, case after case in the same ranks.

torchrun --nproc_per_node 2 tests/workers/checkpoint_worker.py results.jsonl "NAME: FLAGS" "NAME: FLAGS" ...

A line of JSON per case, written by rank 0: every step's loss, gradient norm, learning rate and skipped steps, and where
it ended. "{DIR}" in the flags stands for the folder of results.jsonl.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import torch.distributed as dist

from commons.checkpoint.keeper import open_keeper
from commons.checkpoint.store import Checkpoint
from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.lifecycle.guard import Guard
from commons.plans.trainable import Trainable
from commons.training.loop import train_steps
from commons.training.session import build_session

COMMON = (
    "--model_type gpt2_tiny --num_layers 2 --batch_size 4 --seq_len 32 --train_step 5 --warmup_step 0 --lr 1e-2"
    " --run_name unused --device cpu"
)


def differing(checkpoint: Checkpoint, trainable: Trainable) -> list[str]:
    """The states of this rank that are not to the bit what the checkpoint holds."""
    found = []
    for piece in trainable.states():
        whole = checkpoint.read(piece.name, piece.kind)
        for box in piece.boxes:
            if not box.part_of(whole).equal(box.tensor):
                found.append(f"{piece.kind} of {piece.name}")
    return found


def run(name: str, flags: str, here: device.Device) -> dict:
    """One case (collective)."""
    config = read_config(shlex.split(f"{COMMON} {flags}"))
    session, guard = build_session(config, here), Guard()
    keeper = open_keeper(session.trainable, config, here, guard)
    wrong = differing(Checkpoint(Path(config.resume)), session.trainable) if config.resume else []
    every: list = [None] * here.world_size
    dist.all_gather_object(every, wrong)
    records = list(train_steps(session, guard, keeper))
    return {
        "name": name,
        "differing": [text for texts in every for text in texts],
        "ended": guard.ended.how,
        "why": guard.ended.why,
        "steps": [record.step for record in records],
        "losses": [record.loss for record in records],
        "grad_norms": [record.grad_norm for record in records],
        "rates": [record.lr for record in records],
        "skipped": [record.skipped_steps for record in records],
    }


def main(results: Path, cases: list[str]) -> None:
    here = process_group.launch("cpu", 120.0)
    for case in cases:
        name, _, flags = case.partition(": ")
        found = run(name, flags.replace("{DIR}", str(results.parent)), here)
        if here.rank == 0:
            with results.open("a") as file:
                file.write(json.dumps(found) + "\n")
        dist.barrier()
    leaving.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
