"""A step's record beside what is counted from outside: one rank of a run that prints both as JSON.

Tokens are counted where they enter the model, FLOPs by torch's counter, time by a clock around the whole step.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from commons.cli.flags import read_config
from commons.distributed import process_group
from commons.lifecycle import leaving
from commons.training.loop import train_steps
from commons.training.session import build_session

BALLAST_RANK, BALLAST_MIB = 2, 512


def main(flags: list[str]) -> None:
    config = read_config(flags)
    here = process_group.launch(config.device, 120)
    session = build_session(config, here)
    steps = train_steps(session)
    next(steps)
    ballast = torch.ones((BALLAST_MIB if here.rank == BALLAST_RANK else 0) * 2**18)  # fp32, written
    tokens = 0

    def count(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel()

    for name, module in session.trainable.model.named_modules():
        if name.endswith("wte") and session.place(here.rank).tensor == 0:
            module.register_forward_pre_hook(count)
    with FlopCounterMode(display=False) as flops:
        start = time.monotonic()
        record = next(steps)
        seconds = time.monotonic() - start
    everywhere = [None] * here.world_size
    dist.all_gather_object(everywhere, [tokens, flops.get_total_flops(), seconds])
    if here.rank == 0:
        print("SEEN", json.dumps({"ranks": everywhere, "record": dataclasses.asdict(record)}), flush=True)
    del ballast
    leaving.leave(0)


if __name__ == "__main__":
    main(sys.argv[1:])
