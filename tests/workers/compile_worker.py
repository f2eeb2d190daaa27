"""Trains gpt2_tiny under every plan that compiles, eager and compiled, and compares losses and counts graphs.
For torchrun.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch._dynamo.utils import counters

from commons.cli.flags import read_config
from commons.distributed import device, process_group
from commons.lifecycle import leaving
from commons.model import compile as compiling
from commons.training.loop import train_steps
from commons.training.session import build_session

STEPS = 3
FLAGS = [
    "--train_step",
    str(STEPS),
    "--warmup_step",
    "1",
    "--lr",
    "1e-3",
    "--run_name",
    "unused",
    "--clip_grad_norm",
    "0.5",
]
GRAPHS = 3  # embedding, one for all blocks, the pointwise part of the loss

CASES = (
    "--distplan CAI_Gemini --max_prefetch 2",
    "--distplan CAI_Gemini --precision fp16 --grad_accum 2 --placement const",
    "--distplan CAI_Gemini --activation_checkpointing on --dropout 0.1",
    "--distplan CAI_Gemini --attention eager --placement auto",
    "--distplan CAI_ZeRO1 --grad_accum 2",
    "--distplan CAI_ZeRO2 --activation_checkpointing on --dropout 0.1 --precision fp32",
    "--distplan Pytorch_DDP --activation_checkpointing on",
    "--distplan Pytorch_ZeRO --precision fp16",
    "--distplan Pytorch_FSDP --grad_accum 2",
    "--distplan Pytorch_FSDP --activation_checkpointing on --precision fp32",
)
# loss differences by rounding: the compiled functions are traced, not optimised, but the loss is in pieces
TOLERANCES = {"fp32": 1e-5, "fp16": 2e-4, "bf16": 1e-3}


def losses(here: device.Device, flags: str, compile: str) -> list[float]:
    config = read_config([*FLAGS, *flags.split(), "--compile", compile])
    torch.manual_seed(here.rank)
    session = build_session(config, here)
    torch.manual_seed(here.rank)  # of dropout
    return [record.loss for record in train_steps(session)]


def traced_only(function: Any, backend: Any = None) -> compiling.CompiledFunction:
    """What the tests compile with: graphs and derivatives traced, then run by eager kernels, which draw the
    same dropout.
    """
    return original(function, "aot_eager")


original = compiling.CompiledFunction


def main() -> None:
    here = process_group.launch("cpu", 60)
    compiling.CompiledFunction = traced_only  # pyright: ignore[reportAttributeAccessIssue]
    for flags in CASES:
        torch._dynamo.reset()
        counters.clear()
        eager, compiled = losses(here, flags, "off"), losses(here, flags, "on")
        graphs, breaks = counters["stats"]["unique_graphs"], dict(counters["graph_break"])
        if here.rank == 0:
            print(flags, eager, compiled, graphs, breaks, flush=True)
        tolerance = next((value for name, value in TOLERANCES.items() if name in flags), TOLERANCES["bf16"])
        assert max(abs(one - other) for one, other in zip(eager, compiled, strict=True)) < tolerance, flags
        assert graphs == GRAPHS and not breaks, flags
    leaving.leave(0)  # the interpreter's own end can abort a process that is done and well


if __name__ == "__main__":
    sys.exit(main())
