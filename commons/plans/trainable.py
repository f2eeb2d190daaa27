"""What a plan hands to the training loop: a model and an optimizer behind the three calls that a step needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from commons.plans.states import Counters, StatePiece


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        grad_norm: global L2 norm of the unscaled gradients before clipping, where the plan knows it, else
            None.
        skipped: the step was left out because fp16 gradients overflowed.
    """

    grad_norm: float | None
    skipped: bool


class Mark(Protocol):
    """Called with the name of a phase, "forward" or "backward", as it begins, or with the event of a captured graph
    that says when; see commons.training.clock.PhaseClock.
    """

    def __call__(self, phase: str, at: torch.cuda.Event | None = None) -> object: ...


class Trainable(Protocol):
    """A wrapped model and its optimizer.

    Attributes:
        model: the wrapped model, or this rank's part of it.
        param_groups: the optimizer's, to set the learning rate in.
        replayed_bytes: device memory that a captured pass uses, which torch's allocator does not count; see
            commons.model.cuda_graph.
        shared_bytes: memory of the device that ranks share, not counted either; None where they share none. See
            commons.distributed.peer_copies.
    """

    model: nn.Module
    replayed_bytes: int
    shared_bytes: int | None

    @property
    def param_groups(self) -> list[dict]: ...

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around one micro-batch's forward and backward; gradients need not be reduced before the ``last``
        one.
        """
        ...

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        """Both passes of one micro-batch, its gradients added to those that are there (collective).

        Args:
            tokens: int64 of shape (micro-batch, sequence) on the device, the same on all ranks of one copy of the
                model.
            weight: of this micro-batch's loss in the step's: 1 / micro-batches per step.
            mark: called when each pass begins; "forward" alone where passes alternate, in a pipeline.

        Returns:
            The weighted loss, a scalar that may be overwritten by the next call; None off the last stage of a pipeline.
        """
        ...

    def step(self) -> Update:
        """Unscale, clip, update and clear the gradients (collective). Nothing else writes to what states() shows."""
        ...

    def states(self) -> Iterator[StatePiece]:
        """This rank's part of masters and moments, as views of its memory, always in the same order; moments that no
        step has made yet are made, as zeros. To be read, or written to, between two steps.
        """
        ...

    def after_load(self) -> None:
        """The masters that states() shows have been written to: make the weights that are computed with of them
        (collective).
        """
        ...

    def counters(self) -> Counters:
        """Adam's step count and the state of fp16's loss scale."""
        ...

    def set_counters(self, counters: Counters) -> None:
        """Go on from ``counters``; a loss scale that they lack stays as it is, one that this precision lacks is
        ignored.
        """
        ...

    def evaluate(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The mean loss of a batch without dropout and without a trace in what is trained (collective), between two
        steps and after the first.

        Args:
            tokens: of the shape of training, as :meth:`forward_backward` has them.

        Returns:
            A scalar that may be overwritten by the next call; None off the last stage of a pipeline.
        """
        ...


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped inside, and no gradient recorded; ``model`` trains on afterwards."""
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train()


def weighted(loss: torch.Tensor, weight: float) -> torch.Tensor:
    """``loss`` times ``weight``, rounded as a division by the number of micro-batches is."""
    return loss / (1 / weight)
