"""Texts become tokens once: documents, the cache, and what is wrong with what is at the path."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from suite_runs import REPOSITORY, clean_environment

from commons.cli.checks import problems
from commons.cli.data import prepare as prepare_for_a_run
from commons.config.schema import TrainConfig
from commons.data import documents as reading
from commons.data.batch_source import DataRequest
from commons.data.corpus import CACHE_FOLDER, prepare
from commons.data.documents import documents
from commons.data.tokenizer import END_OF_TEXT, find_tokenizer
from commons.plans.registry import PLANS

END = 256  # of a text, in bytes


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def request(path: Path, **changes: Any) -> DataRequest:
    return dataclasses.replace(DataRequest(str(path), "bytes", 4, 1000, 0, 0.0), **changes)


def tokens_at(path: Path) -> list[int]:
    (file,) = prepare(request(path)).files
    return file.map().tolist()


def text_at(path: Path) -> str:
    """As bytes are decoded, with | for the end of a text."""
    return "".join("|" if token == END else chr(token) for token in tokens_at(path))


# ---- documents


def test_texts_are_documents(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "b.txt").write_text(f"two{END_OF_TEXT}three{END_OF_TEXT}{END_OF_TEXT}")
    (folder / "a.TXT").write_text("one\n")
    (folder / "deeper" / "c.txt").write_text("four")
    (folder / "empty.txt").write_text(" \n")
    (folder / ".hidden" / "d.txt").write_text("five")
    (folder / "e.md").write_text("six")
    (folder / "notes.rst").write_text("seven")
    assert text_at(folder) == "one\n|two|three|four|six|"


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": "one", "id": 1}, {"text": ""}, {"text": f"a{END_OF_TEXT}"}]
    path.write_text("\n".join([*map(json.dumps, rows), "", ""]))
    assert text_at(path) == f"one|a{END_OF_TEXT}|"
    path.write_text('{"text": "half a pair: \\ud800"}\n')
    assert text_at(path) == "half a pair: ?|"


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 64, 1000])
def test_a_text_that_is_read_in_pieces_has_the_tokens_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    text = "Grüße 東京  one \n\n\n two\t\n three  \u3000 four's\n" * 3
    path = tmp_path / "text.txt"
    path.write_text(f"{text}{END_OF_TEXT}{text}")
    monkeypatch.setattr(reading, "READ_BYTES", read_bytes)
    pieces = list(documents(path))
    assert len(pieces) > (2 if read_bytes < 100 else 1) and sum(piece.ends for piece in pieces) == 2
    tokenizer = find_tokenizer("gpt2", 50257)
    whole = tokenizer.encode([text])[0].tolist()
    apart = [token for piece in pieces for token in tokenizer.encode([piece.text])[0].tolist()]
    assert apart == whole * 2


# ---- the cache


def test_texts_are_tokenised_once_and_again_when_they_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words to learn")
    first = prepare(request(path))
    assert first.files[0].path.parent == tmp_path / CACHE_FOLDER
    assert "tokenising text.txt (19 bytes) with the tokenizer bytes, once" in capsys.readouterr().err
    assert prepare(request(path)) == first and capsys.readouterr().err == ""
    path.write_text("Some words to learn")
    assert text_at(path) == "Some words to learn|"
    other = prepare(request(path, tokenizer=str(small_folder(tmp_path))))
    assert other.files[0].path != first.files[0].path and other.tokenizer == "small"
    names = [each.suffix for each in (tmp_path / CACHE_FOLDER).iterdir()]
    assert names == [".bin"] * 3, "neither a lock nor a part is left"


def small_folder(tmp_path: Path) -> Path:
    from test_tokenizer import small_tokenizer

    (tmp_path / "small").mkdir()
    small_tokenizer().save(str(tmp_path / "small" / "tokenizer.json"))
    return tmp_path / "small"


def test_a_folder_that_cannot_be_written_to_is_cached_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "read_only"
    folder.mkdir()
    (folder / "text.txt").write_text("some words to learn")
    (folder / CACHE_FOLDER).write_text("a file where the folder would be")  # root can write everywhere else
    file = prepare(request(folder / "text.txt")).files[0].path
    assert file.is_relative_to(tmp_path / "cache") and not list(folder.glob("*.bin"))


ONE_OF_MANY = """
import sys
from commons.data.batch_source import DataRequest
from commons.data.corpus import prepare
print(prepare(DataRequest(sys.argv[1], "bytes", 4, 1000, 0, 0.0)).tokens, flush=True)
"""


def test_of_many_ranks_the_first_tokenises_and_the_others_wait(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("some words to learn\n" * 200_000)
    environments = [
        clean_environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", LOCAL_WORLD_SIZE="3", MASTER_ADDR="::1")
        for rank in (2, 1, 0)
    ]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_MANY, str(path)],
            cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for environment in environments
    ]  # fmt: skip
    ends = [rank.communicate(timeout=120) for rank in ranks]
    assert [out.strip() for out, _ in ends] == ["4000001"] * 3
    assert ["once" in told for _, told in ends] == [False, False, True]
    assert len(list((tmp_path / CACHE_FOLDER).iterdir())) == 1


# ---- what is wrong


def bad_corpus(tmp_path: Path, name: str) -> Path:
    """What a user may have at the path."""
    path = tmp_path / name
    contents: dict[str, bytes] = {
        "empty.txt": b" \n",
        "empty.bin": b"",
        "short.bin": np.arange(3, dtype="<u2").tobytes(),
        "short.txt": b"ab",
        "damaged.bin": np.array([20240520, 1, 5], dtype="<i4").tobytes(),
        "large.bin": np.arange(900, 1100, dtype="<u2").tobytes(),
        "latin1.txt": "Gr\xfc\xdfe".encode("latin1"),
        "no_text.jsonl": b'{"text": "a"}\n{"body": "b"}\n',
        "no_object.jsonl": b'{"text": "a"}\n["b"]\n',
        "no_string.jsonl": b'{"text": 1}\n',
        "broken.jsonl": b'{"text": "a"\n',
        "what.csv": b"a,b",
    }
    if name in contents:
        path.write_bytes(contents[name])
    if name in ("nothing", "mixed"):
        path.mkdir()
    if name == "mixed":
        (path / "a.txt").write_text("a")
        (path / "a.bin").write_bytes(b"ab")
    if name == "locked.txt":
        path.symlink_to("/proc/self/mem")  # which root cannot read either
    return path


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("empty.txt", "holds no text: name files that do"),
        ("empty.bin", "empty.bin is empty"),
        ("short.bin", "holds 3 tokens, which make 0 sequences of --seq_len 4: nothing is left to train on"),
        ("short.txt", "holds 3 tokens, which make 0 sequences of --seq_len 4"),
        ("damaged.bin", "ends inside of its header"),
        ("large.bin", "holds token 1,099, the model's vocabulary has 1,000: use a larger --model_type"),
        ("latin1.txt", "is not UTF-8 near byte 2: convert it"),
        ("no_text.jsonl", 'no_text.jsonl, line 2: no JSON object with a "text"'),
        ("no_object.jsonl", 'no_object.jsonl, line 2: no JSON object with a "text"'),
        ("no_string.jsonl", 'no_string.jsonl, line 1: no JSON object with a "text"'),
        ("broken.jsonl", 'broken.jsonl, line 1: no JSON object with a "text"'),
        ("what.csv", "what.csv must end in .bin (tokens), .txt, .md or .jsonl"),
        ("nothing", "none of its files ends in .bin, .txt, .md or .jsonl"),
        ("missing", "there is nothing: name token files, texts or JSONL files"),
        ("mixed", "holds texts and token files: name one kind"),
        ("locked.txt", "make it readable, or name another"),
    ],
)
def test_bad_data_is_one_problem_with_the_way_out(tmp_path: Path, name: str, problem: str) -> None:
    given = TrainConfig(data=str(bad_corpus(tmp_path, name)), tokenizer="bytes", seq_len=4, eval_fraction=0.0)
    found = problems(given, 1, "cpu", 0, PLANS["CAI_Gemini"])
    found = found or prepare_for_a_run(given.resolve("cpu"), pytest.fail)
    assert len(found) == 1 and problem in found[0], found
    assert name in found[0] and not list(tmp_path.glob("**/*.part"))


def test_what_was_seen_of_a_token_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    np.arange(100, dtype="<u2").tofile(path)
    assert prepare(request(path)).tokens == 100
    (seen,) = (tmp_path / "cache").glob("**/*.txt")
    assert seen.read_text() == "99"
    seen.write_text("1000")  # as if it had been that
    with pytest.raises(ValueError, match="holds token 1,000"):
        prepare(request(path))
    os.utime(path, (1, 1))
    assert prepare(request(path)).tokens == 100, "another time, another file"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tokenizer": "bytes"}, "--tokenizer is of texts"),
        ({"eval_fraction": 0.5}, "--eval_fraction is held out of --data"),
        ({"eval_every": 5}, "--eval_every 5 needs data that something can be learnt from"),
        ({"data": "TEXT", "eval_every": 5, "eval_fraction": 0.0}, "which is nothing: use --eval_fraction 0.01"),
        ({"data": "TEXT", "tokenizer": "nowhere"}, "--tokenizer nowhere is no folder"),
        ({"data": "TEXT", "eval_fraction": 1.0}, "--eval_fraction must be at least 0 and below 1"),
        ({"log_every": 0}, "--log_every must be at least 1"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words")
    words: dict[str, Any] = {name: str(text) if value == "TEXT" else value for name, value in settings.items()}
    given = TrainConfig(**words)
    found = problems(given, 1, "cpu", 0, PLANS["CAI_Gemini"])
    assert len(found) == 1 and problem in found[0], found
