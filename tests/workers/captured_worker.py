"""torch's plans on CPU ranks, captured and launched: the same losses and norms to the bit. The graph itself is a
stand-in, since it takes a GPU.

torchrun --nproc_per_node 2 tests/workers/captured_worker.py "PLAN PLAN ..." FLAGS...
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch

from commons.cli.flags import read_config
from commons.distributed import process_group
from commons.lifecycle import leaving
from commons.plans import torch_native
from commons.training.loop import train_steps
from commons.training.session import build_session

STEPS = 5


class CapturedWhole:
    """In place of a WholeStepGraph, which only a GPU has: launches again what was captured."""

    peak_bytes = 7

    def __init__(self, parameters, forward, backward, clear, tokens, warm_up_passes) -> None:
        self.parameters, self.passes = parameters, (forward, backward, clear)
        for _ in range(warm_up_passes):
            backward(forward(tokens))
            clear()
        backward(forward(tokens))  # the capture leaves gradients where replays write them

    def replay(self, tokens: torch.Tensor) -> torch.Tensor:
        forward, backward, clear = self.passes
        gradients = [each.grad for each in self.parameters]
        clear()
        loss = forward(tokens)
        self.backward_begins = time.perf_counter()  # an event, on a GPU
        backward(loss)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            assert gradient is not None, "the optimizer has let go of where the graph writes"
            gradient.copy_(parameter.grad)  # pyright: ignore[reportArgumentType]
            parameter.grad = gradient
        return loss.detach()


def train(trainable: type, config: Any, here: Any) -> tuple[list[tuple[float, float | None]], int]:
    """Losses and gradient norms of every step, and the bytes that a replay is said to use."""
    torch_native.TorchTrainable = trainable  # pyright: ignore[reportAttributeAccessIssue]
    session = build_session(config, here)

    def stand_in(*arguments: Any) -> CapturedWhole:
        return CapturedWhole(list(session.trainable.model.parameters()), *arguments)

    torch_native.WholeStepGraph = stand_in  # pyright: ignore[reportAttributeAccessIssue]
    return [(record.loss, record.grad_norm) for record in train_steps(session)], session.trainable.replayed_bytes


def main(plans: str, *flags: str) -> None:
    torch_native.has_room, torch_native.TIMES_INSIDE = lambda step_bytes: True, True
    for name in ("max_memory_allocated", "memory_allocated"):
        setattr(torch.cuda, name, lambda: 0)
    launched, captured = torch_native.TorchTrainable, torch_native.CapturedTorchTrainable
    here = process_group.launch("cpu", 60)
    for plan in plans.split():
        config = read_config(["--distplan", plan, "--train_step", str(STEPS), *flags])
        expected, _ = train(launched, config, here)
        found, replayed_bytes = train(captured, config, here)
        assert found == expected and len(found) == STEPS, (plan, found, expected)
        assert replayed_bytes == CapturedWhole.peak_bytes
        if here.rank == 0:
            print("the same", plan, flush=True)
    leaving.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
