"""Files of tokens: every format that is read, what is written, and what is wrong with a damaged one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from commons.data.token_files import (
    HEADER_BYTES,
    UINT16,
    UINT32,
    TokenStream,
    TokenWriter,
    content_hashes,
    dtype_for,
    read_token_file,
)

# as a text has them: none of the uint32 is below 16 in its low half alone
TOKENS = (np.arange(3000) * 7919 % 50000).astype(np.int64)


def with_header(tokens: np.ndarray, magic: int = 20240520, version: int = 1, count: int | None = None) -> bytes:
    """As llm.c writes it."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (TOKENS.astype("<u2").tobytes(), UINT16),
        (TOKENS[:2999].astype("<u2").tobytes(), UINT16),
        (TOKENS.astype("<u4").tobytes(), UINT32),
        ((TOKENS + 100_000).astype("<u4").tobytes(), UINT32),
        (with_header(TOKENS.astype("<u2")), UINT16),
        (with_header(TOKENS.astype("<u4"), 20240801, 7), UINT32),
    ],
    ids=["uint16", "uint16, odd", "uint32", "uint32, large ids", "GPT-2's header", "Llama 3's header"],
)
def test_every_format_is_read(tmp_path: Path, content: bytes, dtype: np.dtype) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(content)
    file = read_token_file(path)
    assert file.dtype == dtype
    tokens = np.empty(file.count, dtype=np.int64)
    TokenStream([file]).read(0, tokens)
    assert np.array_equal(tokens, TOKENS[: file.count] + (100_000 if tokens[0] >= 100_000 else 0))
    heard: list[int] = []
    assert file.largest(heard.append) == tokens.max() and sum(heard) == file.count


HEADED = with_header(TOKENS.astype("<u2"))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"abc", "3 bytes, which are no whole number of 16-bit tokens: copy it again"),
        (HEADED[:100], "ends inside of its header, after 100 of 1024 bytes"),
        (HEADED[:-2], "holds 3,000 tokens by its header but 2,999 by its size"),
        (HEADED[:-1], "holds 3,000 tokens by its header but 2,999 by its size"),
        (HEADED + b"\0\0", "holds 3,000 tokens by its header but 3,001 by its size"),
        (with_header(TOKENS.astype("<u2"), version=2), "has version 2 of its format, known is 1"),
        (with_header(TOKENS[:0].astype("<u2")), "holds no tokens"),
        (with_header(TOKENS.astype("<u2"), count=-3000), "by its header but 3,000 by its size"),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_token_file(path)
    assert str(path) in str(raised.value) and problem in str(raised.value)


@pytest.mark.parametrize("vocab", [257, 50257, 2**16, 2**16 + 1])
def test_what_is_written_is_read(tmp_path: Path, vocab: int) -> None:
    path, tokens = tmp_path / "tokens.bin", TOKENS % vocab
    with TokenWriter(path, dtype_for(vocab)) as writer:
        for piece in np.split(tokens, [1, 17, 2000]):
            writer.add(piece)
        assert not path.exists(), "not before all of it is there"
        writer.finish()
    assert path.read_bytes() == with_header(tokens.astype(dtype_for(vocab)), *FIRST_TWO[dtype_for(vocab)])
    assert [each.name for each in tmp_path.iterdir()] == ["tokens.bin"]
    assert read_token_file(path).count == len(tokens)


FIRST_TWO = {UINT16: (20240520, 1), UINT32: (20240801, 7)}


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TokenWriter(tmp_path / "tokens.bin", UINT16) as writer:
        writer.add(TOKENS)
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_more_tokens_than_an_int32_counts(tmp_path: Path) -> None:
    path, count = tmp_path / "tokens.bin", 2**32 + 5
    header = np.zeros(256, dtype="<u4")
    header[:4] = 20240520, 1, count & 0xFFFFFFFF, count >> 32
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.truncate(HEADER_BYTES + 2 * count)
    assert read_token_file(path).count == count


@pytest.mark.parametrize("change", [lambda content: content[:-2], lambda content: b"\1" + content[1:]])
def test_a_hash_notices(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path, content = tmp_path / "tokens.bin", TOKENS.astype("<u2").tobytes()
    path.write_bytes(content)
    before = content_hashes([(path, 0)])
    assert before == content_hashes([(path, 0)])
    path.write_bytes(change(content))
    assert content_hashes([(path, 0)]) != before


def test_hashes_read_little_of_much(tmp_path: Path) -> None:
    """Beginning and end count, whatever lies between and however large it is."""
    path = tmp_path / "huge.bin"
    with open(path, "wb") as file:
        file.truncate(10**11)
    before = content_hashes([(path, 0)] * 100)
    assert len(set(before)) == 1
    for place in (0, 10**11 - 1):
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(b"x")
        after = content_hashes([(path, 0)] * 100)
        assert after != before
        before = after
