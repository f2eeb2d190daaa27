"""``--init_from``: what is wrong with a folder is told before anything is built; what is right is what is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt2_folders
import pytest
import torch
from suite_runs import REPOSITORY, torchrun

from commons.cli.checks import problems
from commons.cli.flags import read_flags
from commons.config.gpt2_folder import FolderError, look_through
from commons.config.resolved import nearest_size
from commons.plans.registry import PLANS
from model_zoo import MODEL_SIZES, ModelShape

WORKER = REPOSITORY / "tests" / "workers" / "init_from_worker.py"
WTE, BIAS = "transformer.wte.weight", "transformer.h.0.attn.c_attn.bias"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "gpt2"
    gpt2_folders.write_folder(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "gpt2"))


def found(*flags: str) -> str:
    """What is wrong with a command line, on one CPU rank."""
    line = read_flags(["--device", "cpu", *flags])
    config = line.config()
    return "\n".join([*line.problems, *problems(config, 1, "cpu", 0, PLANS.get(config.distplan), typed=line.given)])


def resolved(*flags: str) -> Any:
    return read_flags(flags).config().resolve("cpu")


# ---- the size


def test_the_size_is_the_folders(whole: Path, tmp_path: Path) -> None:
    config = resolved("--init_from", str(whole))
    assert config.model_type == "gpt2_tiny" and config.shape() == MODEL_SIZES["gpt2_tiny"]
    assert "model_type" in config.chosen and not found("--init_from", str(whole))
    gpt2_folders.write_folder(tmp_path / "odd", n_layer=2, n_embd=96, n_head=3, n_positions=48, vocab_size=300,
        bos_token_id=1, eos_token_id=1)  # fmt: skip
    config = resolved("--init_from", str(tmp_path / "odd"))
    assert config.shape() == ModelShape(layers=2, hidden=96, heads=3, positions=48, vocab=300)
    assert config.seq_len == 48 and not found("--init_from", str(tmp_path / "odd"))
    assert "--seq_len 49 exceeds the 48 positions" in found("--init_from", str(tmp_path / "odd"), "--seq_len", "49")


def test_sizes_have_names() -> None:
    for name, shape in MODEL_SIZES.items():
        assert nearest_size(shape) == name
    distilled = ModelShape(layers=6, hidden=768, heads=12)
    assert nearest_size(distilled) == "gpt2_small"


def test_a_size_that_is_not_the_folders_is_refused(whole: Path) -> None:
    wrong = found("--init_from", str(whole), "--model_type", "gpt2_small", "--num_heads", "4", "--seq_len", "64")
    assert "holds a model with --num_layers 4, --hidden_size 64, --num_positions 128, --vocab_size 1000" in wrong
    assert "not 12, 768, 1024, 50257: remove --model_type" in wrong and "num_heads" not in wrong
    assert "with --num_layers 4, not 5:" in found("--init_from", str(whole), "--num_layers", "5")
    assert not found("--init_from", str(whole), "--model_type", "gpt2_tiny", "--num_layers", "4")


def test_positions_and_vocabulary_of_a_size_can_be_others() -> None:
    config = resolved("--model_type", "gpt2_tiny", "--num_positions", "40", "--vocab_size", "257")
    assert config.shape() == ModelShape(layers=4, hidden=64, heads=4, positions=40, vocab=257)
    assert config.seq_len == 40


# ---- what is wrong


def drop(*names: str) -> Callable[[dict], Any]:
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, value: torch.Tensor) -> Callable[[dict], Any]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "signs"),
    [
        (lambda f: (f / "config.json").unlink(), ["config.json does not exist: name a folder as save_pretrained()"]),
        (lambda f: (f / "config.json").write_text("{"), ["config.json is not JSON", "fetch it again"]),
        (lambda f: (f / "config.json").write_text("[]"), ["not 'gpt2'"]),
        (lambda f: gpt2_folders.change_config(f, model_type="llama"), ["describes 'llama', not 'gpt2'"]),
        (lambda f: gpt2_folders.change_config(f, distplan="CAI_Gemini"), ["python -m commons.checkpoint.export"]),
        (lambda f: gpt2_folders.change_config(f, n_layer=0), ["positive integers, got layers 0"]),
        (lambda f: gpt2_folders.change_config(f, n_embd="wide"), ["positive integers, got hidden 'wide'"]),
        (
            lambda f: gpt2_folders.change_config(f, activation_function="relu", n_inner=100, tie_word_embeddings=False),
            ["activation_function 'relu' is another function", "n_inner 100", "tie_word_embeddings False"],
        ),
        (lambda f: gpt2_folders.change_config(f, n_layer=3), ["holds transformer.h.3.", "no GPT-2 of 3 layers has"]),
        (lambda f: gpt2_folders.change_config(f, n_layer=5), ["lacks transformer.h.4.ln_1.weight"]),
        (lambda f: gpt2_folders.change_config(f, vocab_size=999), ["wte.weight is 1000 x 64", "makes it 999 x 64"]),
        (lambda f: gpt2_folders.change_config(f, n_positions=64), ["wpe.weight is 128 x 64, but config.json makes it"]),
        (lambda f: gpt2_folders.change_tensors(f, drop(WTE, BIAS)), [f"lacks {WTE}, {BIAS}, which config.json promi"]),
        (lambda f: gpt2_folders.change_tensors(f, put("score.weight", torch.ones(2))), ["score.weight, which no"]),
        (lambda f: gpt2_folders.change_tensors(f, put(BIAS, torch.ones(192).char())), [f"{BIAS} is I8: only F64"]),
        (lambda f: (f / "model.safetensors").unlink(), ["holds neither model.safetensors nor"]),
        (lambda f: cut(f / "model.safetensors", 0.5), ["model.safetensors is damaged or cut off"]),
        (lambda f: cut(f / "model.safetensors", 0), ["model.safetensors is damaged or cut off"]),
        (
            lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
            ["a pointer of Git LFS: run git lfs pull"],
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            ["pytorch_model.bin is a pickle", "save_pretrained()"],
        ),
    ],
)
def test_a_spoiled_folder_is_named(folder: Path, spoil: Callable[[Path], Any], signs: list[str]) -> None:
    spoil(folder)
    wrong = found("--init_from", str(folder))
    assert all(sign in wrong for sign in signs), wrong
    assert all(line.startswith(f"--init_from: {folder}") for line in wrong.splitlines()), wrong


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def test_all_is_told_at_once(folder: Path) -> None:
    gpt2_folders.change_config(folder, activation_function="relu", vocab_size=999)
    gpt2_folders.change_tensors(folder, drop(BIAS))
    wrong = found("--init_from", str(folder), "--lr", "-1", "--distplan", "Pytorch_DPP")
    for sign in ("'relu'", "999 x 64", f"lacks {BIAS}", "--lr must be", "did you mean Pytorch_DDP"):
        assert sign in wrong, wrong


def test_no_folder(tmp_path: Path) -> None:
    assert f"--init_from: {tmp_path / 'nothing'} is not a folder" in found("--init_from", str(tmp_path / "nothing"))
    assert "gpt2 is not a folder" in found("--init_from", "gpt2")


def test_shards(tmp_path: Path) -> None:
    gpt2_folders.write_folder(tmp_path, shards="200KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert not found("--init_from", str(tmp_path)) and len(files) > 2
    cut(files[0], 0.9)
    files[1].unlink()
    wrong = found("--init_from", str(tmp_path))
    assert f"{files[0]} is damaged or cut off" in wrong and f"{files[1]} does not exist" in wrong
    index = tmp_path / "model.safetensors.index.json"
    for weight_map in ({}, {WTE: "../elsewhere.safetensors"}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(FolderError, match="names no files beside it"):
            look_through(tmp_path)


# ---- what is trained

CASES = {
    "--distplan CAI_Gemini": 2e-3,
    "--distplan CAI_Gemini --precision fp16 --placement cpu": 2e-3,
    "--distplan CAI_Gemini --tp_degree 2": 2e-3,
    "--distplan CAI_Hybrid --tp_degree 2 --precision fp32": 1e-6,
    "--distplan CAI_Hybrid --pp_degree 2": 2e-3,
    "--distplan CAI_ZeRO1": 2e-3,
    "--distplan CAI_ZeRO2 --precision fp32": 1e-6,
    "--distplan Pytorch_DDP": 2e-3,
    "--distplan Pytorch_ZeRO --precision fp32": 1e-6,
    "--distplan Pytorch_FSDP --precision fp32": 1e-6,
}


def test_every_plan_begins_with_the_folders_weights(tmp_path: Path) -> None:
    """Masters equal to the bit, whatever the precision; the first loss is HuggingFace's. Two ranks."""
    model = gpt2_folders.write_folder(tmp_path, shards="300KB")
    code, console = torchrun(WORKER, 2, str(tmp_path), *CASES)
    assert code == 0, console
    seen = [json.loads(line.partition("SEEN ")[2]) for line in console.splitlines() if line.startswith("SEEN ")]
    assert [each["case"] for each in seen] == list(CASES)
    count = sum(parameter.numel() for parameter in model.parameters())
    for each in seen:
        differing, written, losses, expected = zip(*each["ranks"], strict=True)
        assert not any(differing), each
        assert sum(written) == count, each
        told = [loss for loss in losses if loss is not None]
        mean = sum(told) / len(told)
        assert mean == pytest.approx(expected[0], rel=CASES[each["case"]]), each
