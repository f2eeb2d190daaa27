"""The files of a checkpoint: tensors in safetensors files with a hash each, and two JSON files that say what is where.

No stock reader of torch's distributed checkpoints (DCP) does without pickle: its ``.metadata`` is one, and the reader
that takes safetensors instead knows one box of a tensor per file, where a flat range is three. So these are files of
our own, of the format that is the standard one for tensors: any safetensors reader opens them, and nothing in them is
ever executed.

A checkpoint is a folder:

- ``state.json``: what is needed to go on, and size and SHA-256 of every other file; it carries its own hash too.
- ``index.json``: for each tensor its shape, and for masters and moments the boxes that it is cut into: file, offsets
  and sizes in the whole tensor, first byte in the file.
- ``rank-00000-of-00002.safetensors``: what one rank wrote, a box an entry, and the states of its random generators.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from commons.lifecycle.outcome import RunError

STATE_FILE, INDEX_FILE = "state.json", "index.json"
FORMAT, VERSION = "gemini suite checkpoint", 1
PIECE_BYTES = 1 << 24  # that are written, or hashed, at once
HASHING_THREADS = 4


class CheckpointError(RunError):
    """Something is wrong with a checkpoint; the text says with which file, and what."""

    exit_code = 2


class Entry(NamedTuple):
    """One tensor of a file that is to be written.

    Attributes:
        dtype: as safetensors calls it: "F32", "U8".
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview


class Written(NamedTuple):
    """A file as it was written: its size, its hash, and where each entry's data begin, in bytes from its start."""

    size: int
    sha256: str
    begins: dict[str, int]


def write_tensors(path: Path, entries: Iterable[Entry]) -> Written:
    """Write a safetensors file and have it on the disk. OSError where that cannot be."""
    entries, header, at = list(entries), {}, 0
    for entry in entries:
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.data.nbytes],
        }
        at += entry.data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    digest = hashlib.sha256()
    with open(path, "wb", buffering=0) as file:
        for data in (memoryview(head), *(entry.data for entry in entries)):
            for begin in range(0, data.nbytes, PIECE_BYTES):
                piece = data[begin : begin + PIECE_BYTES]
                digest.update(piece)
                _write_all(file, piece)
        os.fsync(file.fileno())
    begins = {entry.name: len(head) + header[entry.name]["data_offsets"][0] for entry in entries}
    return Written(len(head) + at, digest.hexdigest(), begins)


def _write_all(file: Any, data: memoryview) -> None:
    while data:  # one call writes 2 GiB at most, and less where the disk is nearly full
        data = data[file.write(data) :]


def write_text(path: Path, text: str) -> Written:
    """Write a text file and have it on the disk."""
    data = text.encode()
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return Written(len(data), hashlib.sha256(data).hexdigest(), {})


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sealed(state: Mapping[str, Any]) -> str:
    """state.json's text: ``state`` and, first of all, its hash."""
    return _text({"sha256": hashlib.sha256(_text(state).encode()).hexdigest(), **state})


def _text(state: Mapping[str, Any]) -> str:
    return json.dumps(state, indent=1) + "\n"


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json holds, unaltered and of a format that is known here. Raises CheckpointError."""
    path = folder / STATE_FILE
    raw = _read(path)
    try:
        state = json.loads(raw)
        known = state.get("format") if isinstance(state, dict) else None
    except ValueError:
        raise CheckpointError(f"{path} is damaged: it is no JSON") from None
    if not isinstance(known, dict) or known.get("name") != FORMAT:
        raise CheckpointError(f"{path} is not of this suite, or damaged: it names another format")
    given = state.pop("sha256", None)
    if given != hashlib.sha256(_text(state).encode()).hexdigest() or sealed(state).encode() != raw:
        raise CheckpointError(f"{path} was altered after it was written: its SHA-256 is another one")
    if known.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is of format {known.get('version')}, newer than {VERSION}, which this suite reads: update it"
        )
    return state


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def read_index(folder: Path) -> dict[str, Any]:
    """What index.json holds. Raises CheckpointError."""
    try:
        return json.loads(_read(folder / INDEX_FILE))
    except ValueError:
        raise CheckpointError(f"{folder / INDEX_FILE} is damaged: it is no JSON") from None


def check_sizes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the files of a checkpoint as far as their sizes tell, a sentence each."""
    found = []
    for name, wanted in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{folder / name} cannot be read: {error.strerror}")
            continue
        if size != wanted["bytes"]:
            found.append(f"{folder / name} has {size} bytes, not {wanted['bytes']}: it was truncated or altered")
    return found


def check_hashes(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with the files of a checkpoint, each read to its end, a sentence each."""
    found = check_sizes(folder, files)
    if found:
        return found
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: _hash(folder / name), files))
    return [
        f"{folder / name} was altered after it was written: its SHA-256 is another one"
        for name, seen in zip(files, hashes, strict=True)
        if seen != files[name]["sha256"]
    ]


def _hash(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while piece := file.read(PIECE_BYTES):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()
