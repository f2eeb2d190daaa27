"""``--eval_every``: the loss on what is held out of training."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from commons.lifecycle.guard import Guard
from commons.training.session import Session


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        loss: mean over all held-out sequences, in nats per token.
        seconds: by the host's clock, the slowest rank's.
    """

    loss: float
    seconds: float

    @property
    def perplexity(self) -> float:
        """Infinite where no float holds it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def is_due(session: Session, step: int) -> bool:
    """Whether the model is evaluated after ``step``: at every ``--eval_every``, and at the end."""
    every = session.config.eval_every
    return every > 0 and (step % every == 0 or step == session.config.train_step)


def evaluate(session: Session, guard: Guard) -> Evaluation:
    """The loss of the model as it is now on all held-out samples (collective, the same on every rank).

    It leaves no trace in the training, whose next steps are the same to the bit. The samples are the same on any number
    of ranks; each counts once.
    """
    device, here = session.device, session.place(session.device.rank)
    counts = session.has_loss(device.rank) and here.tensor == 0  # ranks that share a copy have the same loss
    totals = torch.zeros(2, dtype=torch.float64, device=device.torch_device)  # loss times samples, samples
    begin = time.perf_counter()
    for batch in session.source.held_out_batches(session.batch_place(device.rank)):
        guard.beat("evaluate")
        loss = session.trainable.evaluate(batch.tokens)
        if loss is not None and counts and batch.samples:
            totals += torch.stack([loss.detach().double() * batch.samples, totals.new_tensor(batch.samples)])
    dist.all_reduce(totals)
    total, samples = totals.tolist()
    seconds = torch.tensor(time.perf_counter() - begin, dtype=torch.float64, device=device.torch_device)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return Evaluation(total / samples, seconds.item())
