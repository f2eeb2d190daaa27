"""Batch streams. Every data-parallel rank draws its own tokens from ``seed + data-parallel rank``, the same
in every plan.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from commons.data.seeds import folded


def random_tokens(
    *, batch_size: int, seq_len: int, vocab: int, seed: int, data_parallel_rank: int, device: torch.device
) -> Iterator[torch.Tensor]:
    """An endless stream of uniformly random token batches.

    The tokens are drawn on the host, so that a GPU run and a CPU run of the same seed see the same data.

    Args:
        batch_size: sequences per micro-batch on this data-parallel rank.
        seq_len: tokens per sequence.
        vocab: tokens are drawn from ``[0, vocab)``; the padded part of the vocabulary is never drawn.

    Yields:
        int64 tensors of shape ``(batch_size, seq_len)`` on ``device``.
    """
    generator = torch.Generator().manual_seed(folded(seed) + data_parallel_rank)
    while True:
        tokens = torch.randint(vocab, (batch_size, seq_len), generator=generator)
        if device.type == "cuda":
            tokens = tokens.pin_memory()  # else the copy would wait for the device
        yield tokens.to(device, non_blocking=True)


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
