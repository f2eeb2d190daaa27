"""``--data PATH``: what is at the path, as token files; texts are tokenised once.

It is done before the process group forms, by the launcher or by the first of a machine's ranks while the others wait.
Afterwards every rank finds it done.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from commons.data.batch_source import DataRequest
from commons.data.documents import documents
from commons.data.token_files import TokenFile, TokenWriter, content_hashes, dtype_for, read_token_file
from commons.data.tokenizer import TextTokenizer, find_tokenizer, look_at_folder
from commons.lifecycle.caches import cache_home, is_writable
from commons.lifecycle.job import read_job
from commons.lifecycle.notices import say

TOKENS, TEXTS, JSON_LINES = "token files", "texts", "JSONL files"
KINDS = {".bin": TOKENS, ".txt": TEXTS, ".md": TEXTS, ".jsonl": JSON_LINES}
CACHE_FOLDER = ".tokens"  # beside a text; what begins with a dot is no part of a folder of texts
CACHE_FORMAT = 1  # another number where the same text would become other tokens
BATCH_CHARACTERS = 2**21
POLL_SECONDS = 0.2
TAKE_OVER_SECONDS = 60.0  # after which a rank no longer waits for one that does nothing


# ---- what is at the path


@dataclass(frozen=True)
class Corpus:
    """What ``--data`` names: files of one kind, in the order of their names."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    kind: str

    @property
    def is_tokens(self) -> bool:
        return self.kind == TOKENS


def find_corpus(path: str) -> Corpus:
    """Look for what ``--data`` names; opens nothing.

    Raises:
        ValueError: nothing usable is there; the text says what to do.
        OSError: a folder cannot be read.
    """
    place = Path(path)
    if place.is_dir():
        files = [each for each in sorted(place.rglob("*")) if each.suffix.lower() in KINDS and each.is_file()]
        files = [each for each in files if not any(part.startswith(".") for part in each.relative_to(place).parts)]
        folder = place
    elif place.exists():
        files, folder = [place], place.parent
    else:
        files = [Path(each) for each in sorted(glob.glob(path, recursive=True)) if Path(each).is_file()]
        folder = files[0].parent if files else place
    if not files:
        wanted = "none of its files ends in .bin, .txt, .md or .jsonl" if place.is_dir() else "there is nothing"
        raise ValueError(f"--data {path}: {wanted}: name token files, texts or JSONL files, or a folder of them")
    unknown = next((each for each in files if each.suffix.lower() not in KINDS), None)
    if unknown is not None:
        raise ValueError(f"--data {path}: {unknown.name} must end in .bin (tokens), .txt, .md or .jsonl: rename it")
    kinds = sorted({KINDS[each.suffix.lower()] for each in files})
    if len(kinds) > 1:
        some = f"{path}/*{files[0].suffix}"
        raise ValueError(f"--data {path} holds {' and '.join(kinds)}: name one kind, for example --data '{some}'")
    return Corpus(place.name or path, folder, tuple(files), kinds[0])


# ---- prepared: token files that a model of this vocabulary takes


@dataclass(frozen=True)
class Prepared:
    """Token files that can be trained on.

    Attributes:
        tokenizer: its name; "" where the files came as tokens.
        note: what the user is to be told about the tokenizer; "" for nothing.
    """

    name: str
    files: tuple[TokenFile, ...]
    tokenizer: str = ""
    note: str = ""

    @property
    def tokens(self) -> int:
        return sum(file.count for file in self.files)


def prepare(request: DataRequest) -> Prepared:
    """Have everything at ``request.path`` as tokens, tokenised now if it never was, and look at all of them once.

    Of a machine's ranks the first works and the others wait for it; a job's launcher has done it before they start.

    Raises:
        ValueError: something about the data is wrong; the text says what and what to do.
        OSError: something cannot be read or written.
    """
    corpus = find_corpus(request.path)
    if corpus.is_tokens:
        prepared = Prepared(corpus.name, tuple(read_token_file(path) for path in corpus.files))
        _check_length(prepared, request)
        if request.vocab < 2**16 or any(file.dtype.itemsize > 2 for file in prepared.files):
            _check_tokens(prepared, request.vocab)
        return prepared
    tokenizer = find_tokenizer(request.tokenizer, request.vocab)
    name = _cache_name(corpus, tokenizer)
    path = _once(_cache_folders(corpus), name, lambda path: _tokenise(corpus, tokenizer, path))
    prepared = Prepared(corpus.name, (read_token_file(path),), tokenizer.name, tokenizer.note)
    _check_length(prepared, request)
    return prepared


def held_out_samples(samples: int, fraction: float) -> int:
    """How many of ``samples`` are held out: at least one where any are."""
    return max(1, round(samples * fraction)) if fraction > 0 else 0


def _check_length(prepared: Prepared, request: DataRequest) -> None:
    samples = prepared.tokens // request.seq_len
    held_out = held_out_samples(samples, request.eval_fraction)
    if samples - held_out < 1:
        aside = f", {held_out} of them held out by --eval_fraction {request.eval_fraction:g}" if held_out else ""
        raise ValueError(
            f"--data {request.path} holds {prepared.tokens:,} tokens, which make {samples} sequences of --seq_len"
            f" {request.seq_len}{aside}: nothing is left to train on: use more text, or a smaller --seq_len"
        )


def _check_tokens(prepared: Prepared, vocab: int) -> None:
    """Raises ValueError where a token is not in the vocabulary. What was seen of a file is kept, as long as it stays
    as it is.
    """
    for file in prepared.files:
        largest = _largest_token(file)
        if largest >= vocab:
            raise ValueError(
                f"{file.path} holds token {largest:,}, the model's vocabulary has {vocab:,}: use a larger --model_type,"
                " or other tokens"
            )


def _largest_token(file: TokenFile) -> int:
    seen = file.path.stat()
    key = hashlib.sha256(f"{file.path.resolve()}/{seen.st_size}/{seen.st_mtime_ns}".encode()).hexdigest()[:32]

    def look(path: Path) -> None:
        with _progress(file.count, "tokens", f"reading {file.path.name}") as bar:
            largest = file.largest(bar.update)
        part = path.with_suffix(".part")
        part.write_text(str(largest))
        part.replace(path)

    return int(_once([_own_cache() / "largest"], f"{key}.txt", look).read_text())


def look_at(path: str, tokenizer: str) -> None:
    """Whatever is wrong with what is at ``path``, or with a tokenizer's folder, that shows at a glance.

    Raises:
        ValueError, OSError: as :func:`prepare`.
    """
    corpus = find_corpus(path)
    for file in corpus.files:
        if corpus.is_tokens:
            read_token_file(file)
        else:
            with open(file, "rb"):
                pass
    if not corpus.is_tokens:
        look_at_folder(tokenizer)


# ---- the cache


def _own_cache() -> Path:
    return cache_home() / "gemini-gpt2"


def _cache_folders(corpus: Corpus) -> list[Path]:
    """Where the tokens of a corpus may be: beside it, and else in the user's cache."""
    return [corpus.folder / CACHE_FOLDER, _own_cache() / "tokens"]


def _cache_name(corpus: Corpus, tokenizer: TextTokenizer) -> str:
    """Another one whenever a file changes, or the tokenizer."""
    facts: list = [CACHE_FORMAT, tokenizer.fingerprint]
    for path, content in zip(corpus.files, content_hashes([(path, 0) for path in corpus.files]), strict=True):
        place = path.relative_to(corpus.folder) if path.is_relative_to(corpus.folder) else path
        facts.append([str(place), path.stat().st_mtime_ns, content])
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name = corpus.name if len(corpus.files) == 1 else f"{len(corpus.files)} files"
    return f"{name.replace('*', '_')[:100]}-{key}.bin"


def _once(folders: Sequence[Path], name: str, make: Callable[[Path], None]) -> Path:
    """The file ``name`` in the first of ``folders`` that has it; else made in the first that can be written to, by one
    process of this machine while the others wait.

    Raises:
        OSError: none of the folders can be written to.
    """
    first, begin = read_job().local_rank == 0, time.monotonic()
    folder = next((each for each in folders if (each / name).exists()), None)
    folder = folder or next((each for each in folders if is_writable(each)), None)
    if folder is None:
        raise PermissionError(f"nothing can be written in {folders[-1]}: let XDG_CACHE_HOME name a folder that can")
    path = folder / name
    while not path.exists():
        works = first or time.monotonic() - begin > TAKE_OVER_SECONDS
        with _lock(path.with_name(f".{name}.lock"), fcntl.LOCK_EX if works else fcntl.LOCK_SH) as locked:
            if path.exists():
                break
            if locked and works:
                make(path)
            elif not locked:  # somebody works
                begin = time.monotonic()
        time.sleep(POLL_SECONDS)
    return path


@contextlib.contextmanager
def _lock(path: Path, kind: int) -> Iterator[bool]:
    """Whether this process has the lock inside of the block, and alone if it is exclusive. The system takes it from a
    process that has ended.
    """
    with open(path, "w") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        if kind == fcntl.LOCK_EX:
            path.unlink(missing_ok=True)


def _progress(total: int, unit: str, what: str) -> tqdm:
    """A bar on a terminal's standard error."""
    return tqdm(total=total, unit=unit, unit_scale=True, desc=what, disable=None, leave=False)


def _tokenise(corpus: Corpus, tokenizer: TextTokenizer, path: Path) -> None:
    """Write the tokens of ``corpus`` to ``path``, one more behind every document."""
    sizes = [each.stat().st_size for each in corpus.files]
    say(f"tokenising {corpus.name} ({sum(sizes):,} bytes) with the tokenizer {tokenizer.name}, once")
    begin = time.monotonic()
    with (
        TokenWriter(path, dtype_for(tokenizer.vocab)) as writer,
        _progress(sum(sizes), "B", corpus.name) as bar,
    ):
        for file, size in zip(corpus.files, sizes, strict=True):
            _add_documents(file, tokenizer, writer, bar, size)
        if not writer.count:
            raise ValueError(f"--data {corpus.name} holds no text: name files that do")
        writer.finish()
    say(f"{writer.count:,} tokens in {time.monotonic() - begin:.1f} s, kept in {path}")


def _add_documents(file: Path, tokenizer: TextTokenizer, writer: TokenWriter, bar: tqdm, size: int) -> None:
    end = np.array([tokenizer.end_of_text])
    before, held, ends = bar.n, [], []

    def add() -> None:
        for tokens, is_end in zip(tokenizer.encode(held), ends, strict=True):
            writer.add(tokens)
            if is_end:
                writer.add(end)
        held.clear()
        ends.clear()

    characters = 0
    for piece in documents(file):
        held.append(piece.text)
        ends.append(piece.ends)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            add()
            bar.update(before + piece.read_bytes - bar.n)
            characters = 0
    add()
    bar.update(before + size - bar.n)
