"""What is said of --save_every, --save_dir, --keep and --resume before anything is started."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commons.checkpoint.contract import changes, fixed
from commons.checkpoint.files import FORMAT, STATE_FILE, VERSION, sealed
from commons.checkpoint.store import Checkpoint
from commons.cli.checks import problems
from commons.config.schema import TrainConfig
from commons.plans.registry import PLANS

SAVED = TrainConfig(model_type="gpt2_tiny", train_step=20, distplan="Pytorch_DDP")


def write_state(folder: Path, config: TrainConfig = SAVED, step: int = 10, ranks: int = 2) -> Path:
    """A checkpoint without tensors."""
    resolved = config.resolve("cpu", ranks)
    state = {
        "format": {"name": FORMAT, "version": VERSION},
        "step": step,
        "saved_at": step,
        **fixed(resolved, ranks),
        "settings": resolved.as_dict(),
        "files": {},
    }
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    (path / STATE_FILE).write_text(sealed(state))
    return path


def found(config: TrainConfig, ranks: int = 2) -> list[str]:
    return problems(config, ranks, "cpu", 0, PLANS[config.distplan])


def resumed(path: Path, **settings: Any) -> TrainConfig:
    return dataclasses.replace(SAVED, resume=str(path), **settings)


def test_the_same_training_may_go_on_under_any_plan_and_on_any_ranks(tmp_path: Path) -> None:
    path = write_state(tmp_path)
    assert found(resumed(path)) == []
    assert found(resumed(path, batch_size=8), ranks=1) == []
    other = resumed(path, batch_size=4, grad_accum=2, distplan="CAI_Gemini", lr=1e-3, precision="fp16", train_step=11)
    assert found(other, ranks=1) == []
    told = changes(Checkpoint(path), other.resolve("cpu", 1))
    assert "--lr 0.001 (was 0.0003)" in told and "--distplan CAI_Gemini (was Pytorch_DDP)" in told
    assert sorted(text.split()[0] for text in told) == ["--distplan", "--lr", "--precision", "--train_step"]


def test_contradictions_are_told_at_once_with_what_fits_and_what_may_differ(tmp_path: Path) -> None:
    path = write_state(tmp_path)
    wrong = resumed(path, num_layers=3, hidden_size=32, seed=1, seq_len=32, batch_size=3, train_step=10, lr=1.0)
    told = "\n".join(found(wrong))
    for part in (
        "its model has 4 layers, not 3: use --num_layers 4",
        "its model has 64 hidden, not 32: use --hidden_size 64",
        "--seed was 42, not 1: use --seed 42",
        "--seq_len was 64, not 32: use --seq_len 64",
        "a step took 8 sequences over all ranks, not 6: use --batch_size 4",
        "--train_step 10 counts from the first step of the training, of which 10 are done: use --train_step 20",
        "what differs besides and may: --train_step 10 (was 20), --lr 1.0 (was 0.0003)",
    ):
        assert part in told, part
    assert "use --model_type gpt2_tiny" in "\n".join(found(resumed(path, model_type="gpt2_small", seq_len=64)))
    assert "3 data-parallel ranks cannot share them" in "\n".join(found(resumed(path), ranks=3))


def test_where_a_path_may_point(tmp_path: Path) -> None:
    write_state(tmp_path / "run" / "checkpoints", step=5)
    newest = write_state(tmp_path / "run" / "checkpoints", step=15)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints", newest):
        (told,) = found(resumed(path, seed=1))
        assert f"--resume {newest}: --seed was 42" in told
    (told,) = found(resumed(tmp_path / "nothing"))
    assert "there is no such folder" in told
    (told,) = found(resumed(tmp_path))
    assert "no checkpoint is there" in told


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = write_state(tmp_path)
    text = (path / STATE_FILE).read_text()
    (path / STATE_FILE).write_text(text.replace('"step": 10', '"step": 11'))
    (told,) = found(resumed(path))
    assert f"{path / STATE_FILE} was altered" in told


def test_auto(tmp_path: Path) -> None:
    """It needs a place to look in, begins anew where there is nothing, and passes over what is damaged."""
    (told,) = found(resumed(Path("auto")))
    assert "--resume auto looks in --save_dir" in told
    auto = resumed(Path("auto"), save_every=1, save_dir=str(tmp_path / "saved"), seed=7)
    assert found(auto) == []
    write_state(tmp_path / "saved", step=5)
    (told,) = found(auto)
    assert "step-00000005: --seed was 42, not 7" in told
    damaged = write_state(tmp_path / "saved", step=6)
    (damaged / STATE_FILE).write_text("{}")
    assert found(auto) == [told]
    shutil.rmtree(tmp_path / "saved" / "step-00000005")
    (told,) = found(auto)
    assert "no checkpoint in" in told and "is whole" in told and "step-00000006" in told


def test_a_save_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saving = dataclasses.replace(SAVED, save_every=5, save_dir=str(tmp_path / "saved"))
    assert found(saving) == []
    (tmp_path / "file").write_text("")
    (told,) = found(dataclasses.replace(saving, save_dir=str(tmp_path / "file")))
    assert "is a file, not a folder: choose another --save_dir" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    (told,) = found(saving)
    assert "a checkpoint takes 0.0 GiB, and 0.0 GiB are free" in told


def test_flags_without_effect_are_refused(tmp_path: Path) -> None:
    told = found(dataclasses.replace(SAVED, keep=2, save_dir=str(tmp_path)))
    assert [text.split(" has no effect")[0] for text in told] == ["--keep", "--save_dir"]
    (told,) = found(resumed(write_state(tmp_path), check_parity=True))
    assert "--check_parity compares with a training from its first step" in told
