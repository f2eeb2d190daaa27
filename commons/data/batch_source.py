"""Where batches come from, as the training loop sees it: a stream of samples in one global order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

RANDOM = "random"  # the value of --data that is no path


@dataclass(frozen=True)
class DataRequest:
    """What is asked of a source.

    Attributes:
        path: of a token file, a text, a JSONL file, a folder of one kind of them, or a pattern; or ``RANDOM``.
        tokenizer: a folder, or a name that commons.data.tokenizer knows.
        seq_len: tokens per sample.
        vocab: the model's; every token is below.
        seed: of the order of samples, or of the tokens themselves.
        eval_fraction: of the samples that are held out of training, in [0, 1).
    """

    path: str
    tokenizer: str
    seq_len: int
    vocab: int
    seed: int
    eval_fraction: float


@dataclass(frozen=True)
class BatchPlace:
    """Which part of every global batch is one rank's.

    A micro-step of all data-parallel ranks takes ``batch_size * data_parallel_size`` consecutive samples of the global
    stream, rank 0 the first ``batch_size`` of them.
    """

    batch_size: int
    data_parallel_rank: int
    data_parallel_size: int
    device: torch.device

    @property
    def samples(self) -> int:
        """Of one micro-step, over all data-parallel ranks."""
        return self.batch_size * self.data_parallel_size


class HeldOutBatch(NamedTuple):
    """A batch of held-out samples.

    Attributes:
        tokens: int64 [batch, sequence] on the device.
        samples: how many different samples it stands for: all rows, or one that fills every row, or none.
    """

    tokens: torch.Tensor
    samples: int


class BatchSource(Protocol):
    """An endless stream of samples in one global order, from any position.

    Attributes:
        fingerprint: the same where the global order of samples and their tokens are the same.
        description: for the header; "" for random tokens.
        epoch_samples: samples of one pass over the data; None where there is no end to it.
        held_out_samples: 0 where nothing can be evaluated on.
    """

    fingerprint: str
    description: str
    epoch_samples: int | None
    held_out_samples: int

    def batches(self, place: BatchPlace, start_sample: int = 0) -> Iterator[torch.Tensor]:
        """This rank's micro-batches, without end: int64 [batch, sequence] on ``place.device``.

        Args:
            start_sample: samples of the global stream that were consumed before; the whole position.
        """
        ...

    def held_out_batches(self, place: BatchPlace) -> Iterator[HeldOutBatch]:
        """Every held-out sample once over all data-parallel ranks; each rank gets as many batches as the others."""
        ...


def to_device(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Host tokens on ``device``, without waiting for it."""
    if device.type == "cuda":
        tokens = tokens.pin_memory()
    return tokens.to(device, non_blocking=True)
