"""Texts and JSONL files as documents, in pieces that can be tokenised apart from each other."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from commons.data.tokenizer import END_OF_TEXT

READ_BYTES = 2**20
LONGEST_WORD = 2**24  # characters


class Piece(NamedTuple):
    """A part of a document.

    Attributes:
        ends: whether the document ends with it.
        read_bytes: of its file so far.
    """

    text: str
    ends: bool
    read_bytes: int


def documents(path: Path) -> Iterator[Piece]:
    """The documents of a file that are not empty, in its order.

    Raises:
        ValueError: it is not what its name says; the text names the place.
        OSError: it cannot be read.
    """
    return READERS[path.suffix.lower()](path)


def _text(path: Path) -> Iterator[Piece]:
    """A text is one document, or as many as ``<|endoftext|>`` separates.

    Long ones are cut before white space behind something visible: there GPT-2's tokenizer cuts as well, so that the
    tokens are those of the whole.
    """
    held, read, began = "", 0, False
    decoder = codecs.getincrementaldecoder("utf-8")()
    with open(path, "rb") as file:
        while True:
            raw = file.read(READ_BYTES)
            try:
                held += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 near byte {read + error.start:,}: convert it, for example with iconv"
                ) from None
            read += len(raw)
            *whole, held = held.split(END_OF_TEXT)
            for text in whole:
                if text.strip() or began:
                    yield Piece(text, True, read)
                began = False
            if not raw:
                break
            cut = _cut(held)
            if cut:
                yield Piece(held[:cut], False, read)
                held, began = held[cut:], True
    if held.strip() or began:
        yield Piece(held, True, read)


def _cut(text: str) -> int:
    """Where a text can be cut, as late as possible; 0 if nowhere, as long as the text is not too long for that."""
    at = max(text.rfind("\n"), text.rfind(" "))
    while at > 0 and text[at - 1].isspace():
        at = max(text.rfind("\n", 0, at), text.rfind(" ", 0, at))
    if at <= 0 and len(text) > LONGEST_WORD:
        return len(text)
    return max(0, at)


def _json_lines(path: Path) -> Iterator[Piece]:
    """A document per line, the object's "text"."""
    read = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            read += len(line)
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, TypeError, KeyError):
                text = None
            if not isinstance(text, str):
                raise ValueError(f'{path}, line {number}: no JSON object with a "text": each line needs one')
            if text:
                # JSON can escape halves of surrogate pairs, which no UTF-8 has
                yield Piece(text.encode(errors="replace").decode(), True, read)


READERS: dict[str, Callable[[Path], Iterator[Piece]]] = {".txt": _text, ".md": _text, ".jsonl": _json_lines}
