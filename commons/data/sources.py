"""DATA_SOURCES: the table of what batches can be made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from commons.data.batch_source import RANDOM, BatchPlace, BatchSource, DataRequest, HeldOutBatch
from commons.data.random_tokens import random_tokens
from commons.data.text import open_text


class RandomTokens:
    """Uniformly random tokens, each sample drawn by the seed and its number."""

    description, held_out_samples = "", 0
    epoch_samples: int | None = None

    def __init__(self, request: DataRequest) -> None:
        self._request = request
        self.fingerprint = f"random tokens below {request.vocab}, seed {request.seed}, sequences of {request.seq_len}"

    def batches(self, place: BatchPlace, start_sample: int = 0) -> Iterator[torch.Tensor]:
        return random_tokens(
            batch_size=place.batch_size,
            seq_len=self._request.seq_len,
            vocab=self._request.vocab,
            seed=self._request.seed,
            data_parallel_rank=place.data_parallel_rank,
            data_parallel_size=place.data_parallel_size,
            start=start_sample,
            device=place.device,
        )

    def held_out_batches(self, place: BatchPlace) -> Iterator[HeldOutBatch]:
        return iter(())


# By the value of --data; every other value is a path.
DATA_SOURCES: dict[str, Callable[[DataRequest], BatchSource]] = {RANDOM: RandomTokens, "text": open_text}


def open_source(request: DataRequest) -> BatchSource:
    """The source that ``request`` asks for; ValueError and OSError as :func:`commons.data.corpus.prepare` has them."""
    return DATA_SOURCES[RANDOM if request.path == RANDOM else "text"](request)
