"""train_gpt_demo.py with a fault in it. TROUBLE says which: "kind:rank:step", and ":attempt" if not in all.

Everything but the fault is the training itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import train_gpt_demo
from commons.training import loop as engine
from commons.training.clock import PhaseClock

KIND, RANK, STEP, *ATTEMPT = os.environ["TROUBLE"].split(":")
MINE = int(os.environ.get("RANK", "0")) == int(RANK)
NOW = not ATTEMPT or int(ATTEMPT[0]) == int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + 1


def endless_loop() -> None:
    while True:
        time.sleep(0.01)


def message_that_never_comes() -> None:
    dist.recv(torch.zeros(1), src=0)


def kill() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(os.environ["CHILD"]).write_text(str(child.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def an_error() -> None:
    raise ValueError("the fault of rank 1")


FAULTS = {
    "kill": kill,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "loop": endless_loop,
    "recv": message_that_never_comes,
    "long": lambda: time.sleep(60),
    "error": an_error,
    "nan": lambda: None,
    "inf": lambda: None,
}


class FaultyClock:
    """In the forward pass of step STEP the fault comes."""

    def __init__(self, clock: PhaseClock, step: int) -> None:
        self._clock, self._step = clock, step

    def mark(self, phase: str) -> None:
        self._clock.mark(phase)
        if MINE and NOW and phase == "forward" and self._step == int(STEP):
            Path(os.environ.get("REACHED", os.devnull)).write_text(str(os.getpid()))
            FAULTS[KIND]()


def troubled(session, stream, clock, keeper, train_step=engine._train_step, count=[0]):  # noqa: B006
    count[0] += 1
    loss, update = train_step(session, stream, FaultyClock(clock, count[0]), keeper)
    if MINE and KIND in ("nan", "inf") and count[0] >= int(STEP):
        loss = loss * float(KIND)
    return loss, update


if __name__ == "__main__":
    engine._train_step = troubled
    train_gpt_demo.main(sys.argv[1:])
