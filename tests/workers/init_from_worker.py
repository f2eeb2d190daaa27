"""Begins a training from a HuggingFace folder in every case, on the ranks of one torchrun; a line of JSON a case.

torchrun --nproc_per_node 2 init_from_worker.py FOLDER "FLAGS" "FLAGS" ...
"""

from __future__ import annotations

import gc
import json
import shlex
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from commons.checkpoint.initial import fill_weights
from commons.cli.flags import read_config
from commons.distributed import process_group
from commons.distributed.device import Device
from commons.lifecycle import leaving
from commons.training.session import Session, build_session

COMMON = "--batch_size 4 --seq_len 32 --device cpu"


def differing_masters(session: Session, weights: dict[str, torch.Tensor]) -> tuple[list[str], int]:
    """The master weights of this rank that are not the folder's to the bit; and how many are."""
    wrong, equal = [], 0
    for piece in session.trainable.states():
        for box in piece.boxes if piece.kind == "master" else ():
            cut = tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))
            same = torch.equal(box.tensor, weights[piece.name][cut])
            wrong += [] if same else [piece.name]
            equal += box.tensor.numel() if same and piece.writes else 0
    return wrong, equal


def first_losses(session: Session, model: torch.nn.Module) -> tuple[float | None, float]:
    """The loss of a batch before any step, and HuggingFace's."""
    tokens = torch.randint(session.shape.vocab, (4, 32), generator=torch.Generator().manual_seed(5))
    loss = session.trainable.forward_backward(tokens, 1.0, lambda phase, at=None: None)
    with torch.no_grad():
        return None if loss is None else float(loss), float(model(input_ids=tokens, labels=tokens).loss)


def main(folder: str, cases: list[str]) -> None:
    here: Device = process_group.launch("cpu", 120)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    weights = dict(model.named_parameters())
    for case in cases:
        config = read_config([*shlex.split(f"{COMMON} {case}"), "--init_from", folder])
        session = build_session(config, here)
        fill_weights(folder, session.trainable)
        told = [*differing_masters(session, weights), *first_losses(session, model)]
        everywhere: list = [None] * here.world_size
        dist.all_gather_object(everywhere, told)
        if here.rank == 0:
            print("SEEN", json.dumps({"case": case, "ranks": everywhere}), flush=True)
        del session
        gc.collect()
    leaving.leave(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
