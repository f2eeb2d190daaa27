"""Files of tokens: read as they are mapped into memory, and written whole or not at all.

With a header of 256 int32 as llm.c and modded-nanogpt write it (a magic number, a version, how many tokens follow), or
headerless uint16 or uint32 as nanoGPT does. All numbers are little-endian.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

HEADER_INTS, HEADER_BYTES = 256, 1024
UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")
# by what a token takes: the magic number and the version of llm.c's files of GPT-2's and of Llama 3's tokens
FORMATS = {UINT16: (20240520, 1), UINT32: (20240801, 7)}

PROBE_BYTES = 2**16  # of a headerless file, to see what its numbers are
HIGH_WORD_BELOW = 16  # of a uint32 whose id is below 2**20, which all are
PIECES, FEWEST_PIECES, PIECE_BYTES = 256, 3, 2**16  # that are read for fingerprints: of all files, and of each
SCAN_TOKENS = 2**24


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens that has been looked at.

    Attributes:
        dtype: of a token, uint16 or uint32.
        offset: bytes before the first token.
        count: tokens.
    """

    path: Path
    dtype: np.dtype
    offset: int
    count: int

    def map(self) -> np.ndarray:
        """All tokens, one-dimensional, read from the file when they are looked at."""
        return np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=(self.count,))

    def largest(self, on_tokens: Callable[[int], object]) -> int:
        """The largest token; reads all of the file. ``on_tokens`` hears how many were read, time and again."""
        tokens, largest = self.map(), 0
        for start in range(0, self.count, SCAN_TOKENS):
            piece = tokens[start : start + SCAN_TOKENS]
            largest = max(largest, int(piece.max()))
            on_tokens(len(piece))
        return largest


def read_token_file(path: Path) -> TokenFile:
    """Look at a file of tokens; reads no more than its beginning.

    Raises:
        ValueError: it is empty, damaged or of an unknown version; the text says which and what to do.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(PROBE_BYTES)
    if not beginning:
        raise ValueError(f"{path} is empty")
    header = np.frombuffer(beginning[: len(beginning) // 4 * 4], dtype="<i4")
    for dtype, (magic, version) in FORMATS.items():
        if len(header) and header[0] == magic:
            return _with_header(path, size, header, dtype, version)
    return _without_header(path, size, beginning)


def _with_header(path: Path, size: int, header: np.ndarray, dtype: np.dtype, version: int) -> TokenFile:
    if size < HEADER_BYTES:
        raise ValueError(f"{path} ends inside of its header, after {size} of {HEADER_BYTES} bytes: copy it again")
    if header[1] != version:
        raise ValueError(f"{path} has version {header[1]} of its format, known is {version}: write it anew")
    told = int(np.uint32(header[2])) | int(np.uint32(header[3])) << 32
    there, rest = divmod(size - HEADER_BYTES, dtype.itemsize)
    if told != there or rest:
        raise ValueError(f"{path} holds {told:,} tokens by its header but {there:,} by its size: copy it again")
    if told == 0:
        raise ValueError(f"{path} holds no tokens")
    return TokenFile(path, dtype, HEADER_BYTES, told)


def _without_header(path: Path, size: int, beginning: bytes) -> TokenFile:
    words = np.frombuffer(beginning[: len(beginning) // 4 * 4], dtype=UINT16)
    low, high = words[0::2], words[1::2]
    wide = size % 4 == 0 and bool((high < HIGH_WORD_BELOW).all() and (low >= HIGH_WORD_BELOW).any())
    dtype = UINT32 if wide else UINT16
    if size % dtype.itemsize:
        raise ValueError(f"{path} holds {size:,} bytes, which are no whole number of 16-bit tokens: copy it again")
    return TokenFile(path, dtype, 0, size // dtype.itemsize)


def dtype_for(vocab: int) -> np.dtype:
    """The smallest that holds every token of a vocabulary."""
    return UINT16 if vocab <= 2**16 else UINT32


class TokenWriter:
    """Writes a token file with a header, under another name until :meth:`finish`; a block that ends with an error
    leaves nothing.

    More than 2**31 tokens take a second int32 of the header, which is zero in everybody else's files.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.count = path, dtype, 0
        self._part = path.with_name(f".{path.name}.{os.getpid()}.part")
        self._file = open(self._part, "wb")  # noqa: SIM115
        self._file.write(bytes(HEADER_BYTES))

    def add(self, tokens: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(tokens, dtype=self.dtype).data)
        self.count += len(tokens)

    def finish(self) -> None:
        """Give the file its name, once all of it is on the disk."""
        header = np.zeros(HEADER_INTS, dtype="<u4")
        header[:4] = (*FORMATS[self.dtype], self.count & 0xFFFFFFFF, self.count >> 32)
        self._file.seek(0)
        self._file.write(header.data)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.replace(self.path)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._part.unlink(missing_ok=True)


class TokenStream:
    """The tokens of files one after the other, as if they were one."""

    def __init__(self, files: Sequence[TokenFile]) -> None:
        self._maps = [file.map() for file in files]
        self._ends = np.cumsum([file.count for file in files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, out: np.ndarray) -> None:
        """Fill ``out``, int64 [n], with the tokens from ``start`` on; they may lie in more than one file."""
        filled = 0
        while filled < len(out):
            index = int(np.searchsorted(self._ends, start + filled, side="right"))
            begin = start + filled - (int(self._ends[index - 1]) if index else 0)
            piece = self._maps[index][begin : begin + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)


def content_hashes(files: Sequence[tuple[Path, int]]) -> list[str]:
    """Of each file's size and content from an offset on, hexadecimal: all of it, or pieces that are spread over a large
    one. Some megabytes are read, however much there is.
    """
    pieces = max(FEWEST_PIECES, PIECES // max(1, len(files)))
    return [_content_hash(path, offset, pieces) for path, offset in files]


def _content_hash(path: Path, offset: int, pieces: int) -> str:
    size = path.stat().st_size - offset
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, length in _hashed_pieces(size, pieces):
            file.seek(offset + start)
            digest.update(file.read(length))
    return digest.hexdigest()


def _hashed_pieces(size: int, pieces: int) -> Iterator[tuple[int, int]]:
    if size <= pieces * PIECE_BYTES:
        yield 0, size
        return
    for piece in range(pieces):
        yield (size - PIECE_BYTES) * piece // (pieces - 1), PIECE_BYTES
