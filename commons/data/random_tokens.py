"""Batch streams. A sample is drawn from ``seed`` and its number in the training: all ranks together see the same
samples in the same order, however many they are and wherever they begin, the same in every plan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch


def random_tokens(
    *,
    batch_size: int,
    seq_len: int,
    vocab: int,
    seed: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    device: torch.device,
    start: int = 0,
) -> Iterator[torch.Tensor]:
    """An endless stream of uniformly random token batches.

    The tokens are drawn on the host, so that a GPU run and a CPU run of the same seed see the same data.

    Args:
        batch_size: sequences per micro-batch on this data-parallel rank.
        seq_len: tokens per sequence.
        data_parallel_rank: takes its slice of every batch of all ``data_parallel_size`` ranks.
        start: samples that all ranks have taken before.
        vocab: tokens are drawn from ``[0, vocab)``; the padded part of the vocabulary is never drawn.

    Yields:
        int64 tensors of shape ``(batch_size, seq_len)`` on ``device``.
    """
    generator = torch.Generator()
    first = start + data_parallel_rank * batch_size
    while True:
        tokens = torch.empty((batch_size, seq_len), dtype=torch.int64)
        for index, row in enumerate(tokens):
            generator.manual_seed(_sample_seed(seed, first + index))
            torch.randint(vocab, (seq_len,), generator=generator, out=row)
        first += batch_size * data_parallel_size
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # else the copy would wait for the device
        yield tokens.to(device, non_blocking=True)


def _sample_seed(seed: int, index: int) -> int:
    """All its bits are mixed: torch's generator of the host reads 32 of them, and neighbours would begin alike."""
    return int.from_bytes(hashlib.blake2b(f"{seed}: sample {index}".encode(), digest_size=8).digest(), "little") >> 1


class DrawnAhead:
    """A stream of which the next batch can be drawn before it is needed: while the device works on the last one."""

    def __init__(self, stream: Iterator[torch.Tensor]) -> None:
        self._stream = stream
        self._drawn: torch.Tensor | None = None

    def draw(self) -> None:
        """Have the next batch ready."""
        if self._drawn is None:
            self._drawn = next(self._stream)

    def take(self) -> torch.Tensor:
        """The next batch."""
        batch, self._drawn = self._drawn, None
        return next(self._stream) if batch is None else batch
