"""Trains every case without and with evaluations in between, on the ranks of one torchrun; a line of JSON per case.

torchrun --nproc_per_node 2 evaluation_worker.py DATA "FLAGS" "FLAGS" ...
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from typing import Any

import torch
import torch.distributed as dist

from commons.cli.flags import read_config
from commons.data.batch_source import BatchPlace
from commons.distributed import process_group
from commons.distributed.device import Device
from commons.lifecycle import leaving
from commons.training.loop import train_steps
from commons.training.session import Session, build_session
from model_zoo import build_model

COMMON = "--batch_size 4 --seq_len 16 --train_step 4 --warmup_step 1 --lr 1e-3 --clip_grad_norm 1 --device cpu"


def train(flags: str, data: str, here: Device) -> tuple[list[list], Session]:
    """Loss, gradient norm and held-out loss of every step."""
    config = read_config([*shlex.split(f"{COMMON} {flags}"), "--data", data, "--eval_fraction", "0.1"])
    session = build_session(config, here)
    return [[r.loss, r.grad_norm, r.eval_loss] for r in train_steps(session)], session


def expected(session: Session) -> float:
    """The held-out loss by HuggingFace's model, a sequence at a time, of the weights that DDP has trained."""
    model = build_model(session.shape).eval()
    wrapped: Any = session.trainable.model
    model.load_state_dict(wrapped.module.state_dict())
    place = BatchPlace(1, 0, 1, torch.device("cpu"))
    with torch.no_grad():
        batches = [batch.tokens for batch in session.source.held_out_batches(place)]
        losses = [model(input_ids=tokens, labels=tokens).loss.item() for tokens in batches]
    assert len(losses) == session.source.held_out_samples
    return sum(losses) / len(losses)


def main(data: str, cases: list[str]) -> None:
    here = process_group.launch("cpu", 120)
    for case in cases:
        (without, _), (with_them, session) = (train(f"{case} --eval_every {every}", data, here) for every in (0, 2))
        told = {"case": case, "without": without, "with": with_them}
        if "Pytorch_DDP" in case:
            told["expected"] = expected(session)
        if here.rank == 0:
            print("SEEN", json.dumps(told), flush=True)
        dist.barrier()
        del session
        gc.collect()
    leaving.leave(0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
