"""Checkpoints on disk: written whole or not at all, read back by boxes, and whatever is wrong with them named."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from commons.checkpoint import files
from commons.checkpoint.files import FORMAT, VERSION, CheckpointError, sealed
from commons.checkpoint.host_copy import HostCopy
from commons.checkpoint.store import Checkpoint, checkpoint_folders, newest_whole, not_whole
from commons.checkpoint.writer import Order, Writing
from commons.plans.states import KINDS, Box, StatePiece

CPU = torch.device("cpu")
GENERATORS = {"torch": b"0123", "python": b"[1, 2]"}


def state_of(step: int) -> dict[str, Any]:
    return {"format": {"name": FORMAT, "version": VERSION}, "step": step}


def parts_of(tensor: torch.Tensor, rank: int) -> tuple[Box, ...]:
    """A matrix of 4 x 6 over two ranks: rank 0 has the first row and half of the second."""
    boxes = (
        (Box((0, 0), tensor[:1]), Box((1, 0), tensor[1:2, :3])),
        (
            Box((1, 3), tensor[1:2, 3:]),
            Box((2, 0), tensor[2:]),
        ),
    )
    return boxes[rank]


def save(save_dir: Path, step: int, *, keep: int = 0, ranks: int = 2) -> tuple[list[Writing], dict[str, torch.Tensor]]:
    """A checkpoint of one matrix, written as two ranks do, both in this process."""
    torch.manual_seed(step)
    tensors = {kind: torch.randn(4, 6) for kind in KINDS}
    writings = []
    for rank in range(ranks):
        pieces = [StatePiece("w", kind, (4, 6), parts_of(tensors[kind], rank), True) for kind in KINDS]
        copy = HostCopy(pieces, CPU)
        order = Order(save_dir, f".writing-test-{step}", state_of(step), keep, rank, 2)
        writings.append(Writing(order, copy, copy.begin(pieces), GENERATORS))
    for writing in writings:
        writing.own_done.wait(60)
        if ranks == 2:
            writing.thread.join(60)
    return writings, tensors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    (writing, _), _ = save(tmp_path, 5)
    assert writing.problem is None and writing.path is not None
    return writing.path


def test_boxes_of_any_cut_are_read_back_to_the_bit(tmp_path: Path) -> None:
    writings, tensors = save(tmp_path, 5)
    assert [writing.problem for writing in writings] == [None, None]
    checkpoint = Checkpoint(tmp_path / "step-00000005")
    checkpoint.verify()
    assert checkpoint.shapes == {"w": (4, 6)} and checkpoint.step == 5
    for kind, tensor in tensors.items():
        assert torch.equal(checkpoint.read("w", kind), tensor)
        column = torch.empty(3, 2)
        checkpoint.read_into("w", kind, (1, 2), column)
        assert torch.equal(column, tensor[1:4, 2:4])
    assert checkpoint.generators(1) == GENERATORS
    assert sorted(path.name for path in checkpoint.folder.iterdir()) == [
        "index.json",
        "rank-00000-of-00002.safetensors",
        "rank-00001-of-00002.safetensors",
        "state.json",
    ]


def test_any_reader_of_safetensors_opens_the_files(saved: Path) -> None:
    with safe_open(saved / "rank-00001-of-00002.safetensors", "pt") as file:
        box = file.get_tensor("w/exp_avg@1,3")
    assert torch.equal(box, Checkpoint(saved).read("w", "exp_avg")[1:2, 3:])


def test_every_flipped_byte_is_found(saved: Path) -> None:
    """Every byte of state.json, and a sample of the others, whose hashes look at every byte alike."""
    rng = random.Random(0)
    for path in sorted(saved.iterdir()):
        whole = path.read_bytes()
        places = range(len(whole)) if path.name == "state.json" else rng.sample(range(len(whole)), 40)
        for at in places:
            path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match=path.name):
                Checkpoint(saved).verify()
        path.write_bytes(whole)
    Checkpoint(saved).verify()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: os.truncate(path / "rank-00000-of-00002.safetensors", 100), "rank-00000.* truncated"),
        (lambda path: (path / "rank-00001-of-00002.safetensors").unlink(), "rank-00001.* cannot be read"),
        (lambda path: os.truncate(path / "index.json", 20), "index.json has 20 bytes"),
        (lambda path: os.truncate(path / "state.json", 20), "state.json is damaged"),
        (lambda path: (path / "state.json").write_text('{"model": 1}'), "names another format"),
        (lambda path: (path / "state.json").write_text("[]"), "names another format"),
        (
            lambda path: (path / "state.json").write_text(sealed({"format": {"name": FORMAT, "version": 9}})),
            "format 9, newer than 1",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_file(saved: Path, spoil: Any, told: str) -> None:
    spoil(saved)
    with pytest.raises(CheckpointError, match=told) as caught:
        Checkpoint(saved).verify()
    assert str(saved) in str(caught.value) and caught.value.exit_code == 2


def look(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    return checkpoint


def test_the_newest_whole_one_is_found_and_those_passed_over_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    os.truncate(tmp_path / "step-00000003" / "index.json", 1)
    checkpoint, passed_over = newest_whole(tmp_path, look)
    assert checkpoint is not None and checkpoint.step == 2
    (sentence,) = passed_over
    assert "step-00000003/index.json has 1 bytes" in sentence
    assert newest_whole(tmp_path / "empty", look) == (None, [])


def test_older_ones_go_when_a_new_one_is_whole(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000003", "step-00000002"]
    assert len(list(tmp_path.iterdir())) == 2


def test_another_one_of_that_step_stays(tmp_path: Path) -> None:
    save(tmp_path, 4)
    save(tmp_path, 4)
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000004", "step-00000004-2"}
    assert checkpoint_folders(tmp_path)[0].name == "step-00000004-2"


def test_without_every_rank_s_part_there_is_no_checkpoint(tmp_path: Path) -> None:
    (writing,), _ = save(tmp_path, 7, ranks=1)
    assert writing.path is None and not checkpoint_folders(tmp_path)
    writing.cancel()
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_full_disk_leaves_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)

    def full(file: Any, data: memoryview) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr(files, "_write_all", full)
    writings, _ = save(tmp_path, 2, ranks=1)
    assert writings[0].problem == f"{tmp_path / 'x'}: No space left on device"
    writings[0].cancel()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_boxes_that_are_not_all_there_are_noticed() -> None:
    boxes = {kind: [["f", [0, 0], [2, 3], 0]] for kind in KINDS}
    assert not_whole({"tensors": {"w": {"shape": [2, 3], "boxes": boxes}}}) == []
    del boxes["exp_avg"]
    assert not_whole({"tensors": {"w": {"shape": [2, 3], "boxes": boxes}}}) == ["exp_avg of w"]
