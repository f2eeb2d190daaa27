"""Batches of token files, in one global order."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import numpy as np
import torch

from commons.data.batch_source import BatchPlace, DataRequest, HeldOutBatch, to_device
from commons.data.corpus import Prepared, held_out_samples, prepare
from commons.data.permutation import samples_at
from commons.data.token_files import TokenStream, content_hashes


class TextBatches:
    """Samples of token files: windows of ``seq_len`` tokens that do not overlap, the last of them held out.

    Sample i of the global stream is window permutation(seed, epoch)[i]: see commons.data.permutation.
    """

    def __init__(self, prepared: Prepared, request: DataRequest) -> None:
        self._stream = TokenStream(prepared.files)
        self._seq_len, self._seed = request.seq_len, request.seed
        samples = len(self._stream) // request.seq_len
        self.held_out_samples = held_out_samples(samples, request.eval_fraction)
        self._samples = samples - self.held_out_samples
        self.epoch_samples: int | None = self._samples
        facts = content_hashes([(file.path, file.offset) for file in prepared.files])
        order = [request.seq_len, request.seed, self._samples, *facts]
        self.fingerprint = hashlib.sha256(json.dumps(order).encode()).hexdigest()
        self.description = " · ".join(
            part
            for part in (
                prepared.name,
                f"{prepared.tokens:,} tokens",
                f"tokenizer {prepared.tokenizer}" if prepared.tokenizer else f"{prepared.files[0].dtype.name} file",
                f"{self.held_out_samples:,} of {samples:,} sequences held out" if self.held_out_samples else "",
            )
            if part
        )

    def batches(self, place: BatchPlace, start_sample: int = 0) -> Iterator[torch.Tensor]:
        first = start_sample + place.data_parallel_rank * place.batch_size
        while True:
            positions = np.arange(first, first + place.batch_size, dtype=np.int64)
            yield self._read(samples_at(positions, self._samples, self._seed), place.device)
            first += place.samples

    def held_out_batches(self, place: BatchPlace) -> Iterator[HeldOutBatch]:
        """Full batches, and what is left in batches of one sample that fills every row: its mean loss is that sample's,
        whatever the plan does to a batch, and the shape stays that of training.
        """
        rank, size = place.data_parallel_rank, place.batch_size
        full = self.held_out_samples // place.samples
        for index in range(full):
            first = index * place.samples + rank * size
            yield self._held_out(np.arange(first, first + size), size, place.device)
        for first in range(full * place.samples, self.held_out_samples, place.data_parallel_size):
            mine = first + rank
            counts = mine < self.held_out_samples
            yield self._held_out(np.full(size, mine if counts else first), int(counts), place.device)

    def _held_out(self, indices: np.ndarray, samples: int, device: torch.device) -> HeldOutBatch:
        return HeldOutBatch(self._read(self._samples + indices, device), samples)

    def _read(self, samples: np.ndarray, device: torch.device) -> torch.Tensor:
        tokens = np.empty((len(samples), self._seq_len), dtype=np.int64)
        for row, sample in zip(tokens, samples, strict=True):
            self._stream.read(int(sample) * self._seq_len, row)
        return to_device(torch.from_numpy(tokens), device)


def open_text(request: DataRequest) -> TextBatches:
    """The source of what ``request.path`` names; see :func:`commons.data.corpus.prepare` for the errors."""
    return TextBatches(prepare(request), request)
