"""Tokenizers: GPT-2's own, those of a folder, bytes, and what is taken when."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from commons.data import tokenizer as tokenizers_of_ours
from commons.data.tokenizer import BYTES, GPT2, GPT2_FILES, GPT2_PACKAGE, TextTokenizer, find_tokenizer, from_folder

needs_gpt2 = pytest.mark.skipif(find_spec(GPT2_PACKAGE) is None, reason=f"the package {GPT2_PACKAGE} is not installed")
# words that the tiny tokenizer below has learnt
SAMPLE = "the cat sat on the mat, the cat sat"


def small_tokenizer(end_of_text: str | None = "<|endoftext|>") -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made: Any = Tokenizer(models.BPE())  # pyright: ignore[reportCallIssue]
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special, alphabet = [end_of_text] if end_of_text else [], pre_tokenizers.ByteLevel.alphabet()
    options: dict[str, Any] = {"vocab_size": 300, "special_tokens": special, "initial_alphabet": alphabet}
    made.train_from_iterator([SAMPLE] * 5, trainers.BpeTrainer(**options, show_progress=False))  # pyright: ignore
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as HuggingFace's models have it."""
    place = tmp_path / "small"
    place.mkdir()
    small_tokenizer().save(str(place / "tokenizer.json"))
    return place


def tokens_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    (tokens,) = tokenizer.encode([text])
    return tokens.tolist()


@needs_gpt2
def test_gpt2_gives_the_known_tokens() -> None:
    gpt2 = find_tokenizer(GPT2, 50257)
    assert (gpt2.name, gpt2.vocab, gpt2.end_of_text, gpt2.note) == ("GPT-2", 50257, 50256, "")
    assert tokens_of(gpt2, "Hello world") == [15496, 995]
    assert tokens_of(gpt2, "<|endoftext|>") == [27, 91, 437, 1659, 5239, 91, 29], "what a text says ends none"
    text = "Grüße,\n\n 東京  \t🙂 it's 1234567"
    assert gpt2.decode(tokens_of(gpt2, text)) == text
    assert gpt2.encode([]) == [] and tokens_of(gpt2, "") == []


@needs_gpt2
def test_gpt2_whose_files_were_altered_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = find_spec(GPT2_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    copy = tmp_path / "altered_gpt2"
    shutil.copytree(spec.submodule_search_locations[0], copy)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tokenizers_of_ours, "GPT2_PACKAGE", copy.name)
    assert find_tokenizer(GPT2, 50257).name == "GPT-2"
    with open(copy / next(iter(GPT2_FILES)), "ab") as file:
        file.write(b" ")
    assert find_tokenizer(GPT2, 50257).name == "bytes"


def test_bytes_are_taken_where_gpt2_is_not_here_or_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizers_of_ours, "GPT2_REPOSITORIES", ())
    if find_spec(GPT2_PACKAGE):
        note = find_tokenizer(GPT2, 1000).note
        assert "has 50,257 tokens, more than the model's vocabulary of 1,000: text is taken byte by byte" in note
    monkeypatch.setattr(tokenizers_of_ours, "GPT2_PACKAGE", "no_such_package")
    taken = find_tokenizer(GPT2, 50257)
    assert "is neither in HuggingFace's cache nor in the package" in taken.note and "\n" not in taken.note
    assert tokens_of(taken, "aé") == [97, 195, 169] and taken.decode([97, 195, 169, 256]) == "aé"
    assert (taken.vocab, taken.end_of_text) == (257, 256)
    assert find_tokenizer(BYTES, 257).note == ""


def test_huggingface_s_cache_comes_first_and_no_network_is_asked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub" / "models--openai-community--gpt2"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    shutil.copytree(folder, hub / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.socket.connect", None)
    found = find_tokenizer(GPT2, 50257)
    assert found.name == "GPT-2" and found.fingerprint == from_folder(folder).fingerprint


def test_a_folder_has_a_tokenizer_in_one_of_three_ways(folder: Path, tmp_path: Path) -> None:
    whole = from_folder(folder)
    assert whole.name == "small" and len(tokens_of(whole, SAMPLE)) < len(SAMPLE) / 2
    assert whole.end_of_text == 0 and whole.decode(tokens_of(whole, SAMPLE)) == SAMPLE
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    merges = "\n".join(["#version: 0.2", *pairs])
    for names in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        pair = tmp_path / names[0]
        pair.mkdir()
        (pair / names[0]).write_text(json.dumps(model["vocab"]))
        (pair / names[1]).write_text(merges)
        assert tokens_of(from_folder(pair), SAMPLE) == tokens_of(whole, SAMPLE)


def test_the_end_of_a_text_is_the_one_that_the_folder_tells(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "cat"}}))
    assert from_folder(folder).end_of_text != 0
    small_tokenizer(end_of_text=None).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"no token for the end of a text: name it as eos_token"):
        from_folder(folder)


def test_a_folder_without_one_is_told(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer .*nowhere is no folder"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no tokenizer: it needs tokenizer\.json, or vocab\.json and merges\.txt"):
        from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer small has .* tokens, the model's vocabulary 100"):
        find_tokenizer(str(folder), 100)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        from_folder(folder)
