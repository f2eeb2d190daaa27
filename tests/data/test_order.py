"""The order of samples: a permutation per epoch, the same for every number of ranks, from any position."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from commons.data.batch_source import RANDOM, BatchPlace, BatchSource, DataRequest
from commons.data.corpus import Prepared
from commons.data.permutation import Permutation, samples_at
from commons.data.sources import open_source
from commons.data.text import TextBatches
from commons.data.token_files import HEADER_BYTES, UINT16, TokenFile

CPU = torch.device("cpu")
SEQ_LEN = 8
REQUEST = DataRequest("tokens.bin", "gpt2", SEQ_LEN, 50257, seed=3, eval_fraction=0.1)


@pytest.fixture
def tokens(tmp_path: Path) -> np.ndarray:
    """The content of ``tokens.bin``, each its own place; 100 samples and a rest."""
    content = np.arange(100 * SEQ_LEN + 3, dtype=np.uint16)
    content.tofile(tmp_path / "tokens.bin")
    return content


@pytest.fixture
def source(tmp_path: Path, tokens: np.ndarray) -> BatchSource:
    return open_source(dataclasses.replace(REQUEST, path=str(tmp_path / "tokens.bin")))


def windows(batches: Sequence[torch.Tensor]) -> list[int]:
    """Which sample every row is; each has to be a whole one."""
    rows = torch.cat(list(batches))
    assert rows.dtype == torch.int64 and rows.shape[1] == SEQ_LEN
    assert (rows - rows[:, :1] == torch.arange(SEQ_LEN)).all() and (rows[:, 0] % SEQ_LEN == 0).all()
    return (rows[:, 0] // SEQ_LEN).tolist()


def global_order(
    source: BatchSource, ranks: int, batch_size: int, micro_steps: int, start_sample: int = 0
) -> list[int]:
    """The samples of all data-parallel ranks, micro-step by micro-step."""
    streams = [source.batches(BatchPlace(batch_size, rank, ranks, CPU), start_sample) for rank in range(ranks)]
    return windows([batch for step in islice(zip(*streams, strict=True), micro_steps) for batch in step])


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 16, 17, 100, 1023, 1024, 1025, 50_000])
def test_a_permutation_is_one_to_one(size: int) -> None:
    for seed, epoch in ((0, 0), (0, 1), (2**62, 10**6)):
        sent = Permutation(size, seed, epoch)(np.arange(size))
        assert np.array_equal(np.sort(sent), np.arange(size))


def test_seeds_and_epochs_have_their_own_order_and_keep_it() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Permutation(1000, seed, epoch)(np.arange(1000)).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == len(orders)
    assert order(1, 2) == orders[5]
    # a checkpoint relies on it: not to change without another fingerprint
    assert order(42, 0)[:8] == [648, 96, 573, 356, 941, 938, 245, 890]


def test_an_order_looks_shuffled() -> None:
    """Neighbours do not stay near each other, and nothing keeps its place more often than by chance."""
    size = 10_000
    sent = Permutation(size, 5, 0)(np.arange(size))
    assert abs(np.abs(np.diff(sent)).mean() / size - 1 / 3) < 0.02
    assert abs(np.corrcoef(sent, np.arange(size))[0, 1]) < 0.05
    assert (sent == np.arange(size)).sum() < 10


def test_samples_of_an_index_need_no_others() -> None:
    size, far = 10**10 // 1024, 3 * 10**10 // 1024 + 17
    alone = samples_at(np.array([far]), size, 1)
    assert np.array_equal(alone, samples_at(np.arange(far - 50, far + 50), size, 1)[50:51])


def test_the_global_order_is_the_same_on_every_number_of_ranks(source: BatchSource) -> None:
    alone = global_order(source, ranks=1, batch_size=1, micro_steps=240)
    for ranks, batch_size in ((1, 12), (2, 6), (3, 4), (4, 3), (2, 3), (4, 1), (2, 2), (1, 3)):
        assert global_order(source, ranks, batch_size, 240 // (ranks * batch_size)) == alone, (ranks, batch_size)


def test_every_sample_comes_once_an_epoch_and_the_held_out_never(source: BatchSource) -> None:
    assert (source.epoch_samples, source.held_out_samples) == (90, 10)
    order = global_order(source, ranks=3, batch_size=2, micro_steps=45)
    for epoch in range(3):
        assert sorted(order[90 * epoch : 90 * (epoch + 1)]) == list(range(90))
    assert order[:90] != order[90:180]


@pytest.mark.parametrize("start", [1, 12, 89, 90, 91, 500])
def test_any_position_goes_on_where_another_run_was(source: BatchSource, start: int) -> None:
    whole = global_order(source, ranks=1, batch_size=1, micro_steps=start + 48)
    for ranks in (1, 2, 3, 4):
        assert global_order(source, ranks, 12 // ranks, 4, start_sample=start) == whole[start:]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 16])
def test_held_out_samples_count_once_on_every_number_of_ranks(source: BatchSource, ranks: int, batch_size: int) -> None:
    streams = [list(source.held_out_batches(BatchPlace(batch_size, rank, ranks, CPU))) for rank in range(ranks)]
    assert len({len(stream) for stream in streams}) == 1, "a rank would wait for ever"
    counted = []
    for tokens, samples in (batch for stream in streams for batch in stream):
        assert tokens.shape == (batch_size, SEQ_LEN)
        rows = windows([tokens])
        assert samples == len(set(rows)) or samples == 0
        counted += rows if samples == batch_size else rows[:samples]
    assert sorted(counted) == list(range(90, 100))


def test_files_are_read_as_if_they_were_one(tmp_path: Path, tokens: np.ndarray, source: BatchSource) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, part in enumerate(np.split(tokens, [1, 2, 30, 500])):  # some of them shorter than a sample
        part.tofile(folder / f"part{number}.bin")
    shards = open_source(dataclasses.replace(REQUEST, path=str(folder)))
    assert global_order(shards, 2, 5, 20) == global_order(source, 2, 5, 20)


def test_fingerprints_tell_other_data_and_another_order(
    tmp_path: Path, tokens: np.ndarray, source: BatchSource
) -> None:
    def fingerprint(**changes: object) -> str:
        return open_source(dataclasses.replace(REQUEST, path=str(tmp_path / "tokens.bin"), **changes)).fingerprint

    assert fingerprint() == fingerprint(vocab=60_000) == source.fingerprint
    others = [fingerprint(seed=4), fingerprint(eval_fraction=0.2), fingerprint(seq_len=4)]
    tokens[7] = 8
    tokens.tofile(tmp_path / "tokens.bin")
    assert len({source.fingerprint, *others, fingerprint()}) == 5


def test_ten_billion_tokens_are_mapped_and_not_read(tmp_path: Path) -> None:
    """A file of 20 GB that takes no room: whoever read all of it, or listed its samples, would be noticed here."""
    path, count = tmp_path / "huge.bin", 10**10
    with open(path, "wb") as file:
        file.truncate(HEADER_BYTES + 2 * count)
    request = dataclasses.replace(REQUEST, seq_len=1024)
    source = TextBatches(Prepared("huge.bin", (TokenFile(path, UINT16, HEADER_BYTES, count),)), request)
    stream: Iterator[torch.Tensor] = source.batches(BatchPlace(16, 1, 8, CPU), start_sample=9 * 10**9 // 1024)
    assert next(stream).shape == (16, 1024)


def test_random_tokens_go_on_too() -> None:
    source = open_source(dataclasses.replace(REQUEST, path=RANDOM))
    place = BatchPlace(4, 1, 2, CPU)
    whole = list(islice(source.batches(place), 5))
    assert torch.equal(next(source.batches(place, start_sample=3 * place.samples)), whole[3])
    assert (source.description, source.epoch_samples, source.held_out_samples) == ("", None, 0)
