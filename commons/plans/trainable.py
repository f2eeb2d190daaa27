"""What a plan hands to the training loop: a model and an optimizer behind the four calls that a step needs."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import nn


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


class Stepping(Protocol):
    """What every wrapped model and optimizer has.

    Attributes:
        model: the wrapped model, or this rank's part of it.
        param_groups: the optimizer's, to set the learning rate in.
        replayed_bytes: device memory that a recorded pass uses, which torch's allocator does not count; see
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

    def step(self) -> Update:
        """Unscale, clip, update and clear the gradients (collective)."""
        ...


class Trainable(Stepping, Protocol):
    """A model whose forward and backward passes are two calls."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, a scalar, which may be overwritten by the next call.

        ``tokens``: int64 of shape (micro-batch, sequence).
        """
        ...

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of the last forward pass, times what was done to its loss where the pass is not replayed."""
        ...


@runtime_checkable
class PipelinedTrainable(Stepping, Protocol):
    """A model in pipeline stages: the passes of its microbatches alternate, in one call."""

    def forward_backward(self, tokens: torch.Tensor, weight: float) -> torch.Tensor | None:
        """Both passes of one batch (collective over the stages).

        Args:
            tokens: int64 of shape (batch, sequence), the same on all stages.
            weight: of this batch's loss in the step's.

        Returns:
            The weighted loss on the last stage, None elsewhere.
        """
        ...
