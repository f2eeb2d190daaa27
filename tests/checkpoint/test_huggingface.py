"""HuggingFace folders: what is written loads there and is the same model, what is read is what lies there."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import gpt2_folders
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from commons.checkpoint import huggingface
from commons.checkpoint.huggingface import load_model, write_folder
from commons.config.gpt2_folder import look_through
from commons.model.stored_tensors import Box, FolderTensors
from model_zoo import MODEL_SIZES, build_model, parameter_count, parameter_shapes

SHAPE = MODEL_SIZES["gpt2_tiny"]


class ModelTensors:
    """The parameters of a model in memory; notes how much is asked for at a time."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = dict(model.named_parameters())
        self.largest = 0

    def names(self) -> Iterable[str]:
        return self._parameters

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._parameters[name].shape)

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        part = self._parameters[name].detach()[box or ...]
        self.largest = max(self.largest, part.numel())
        return part.float().clone()


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """As the suite trains it, with its padded vocabulary, and no parameter all zeros or ones."""
    torch.manual_seed(3)
    model = build_model(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def tokens() -> torch.Tensor:
    return torch.randint(SHAPE.vocab, (2, 40), generator=torch.Generator().manual_seed(1))


def test_names_and_sizes_are_huggingfaces(model: torch.nn.Module) -> None:
    padded = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    padded["transformer.wte.weight"] = (SHAPE.vocab, SHAPE.hidden)
    assert list(parameter_shapes(SHAPE).items()) == list(padded.items())
    for shape in MODEL_SIZES.values():
        assert sum(math.prod(size) for size in parameter_shapes(shape).values()) == parameter_count(shape)


@pytest.mark.parametrize("most_file_bytes", [10**9, 300_000])
def test_what_is_written_is_the_same_model(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_file_bytes: int
) -> None:
    """In one file and in several: no key missing or left over, logits equal to the bit, generate() works."""
    monkeypatch.setattr(huggingface, "PIECE_ELEMENTS", 1000)  # a tensor is written in pieces
    reader, target = ModelTensors(model), tmp_path / "exported"
    files = write_folder(reader, SHAPE, target, most_file_bytes=most_file_bytes)
    assert reader.largest <= 1000
    assert all(file.stat().st_size <= max(most_file_bytes, 4 * SHAPE.vocab * SHAPE.hidden) + 10_000 for file in files)
    assert (target / "model.safetensors.index.json").exists() == (len(files) > 1) == (most_file_bytes < 10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, told = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(told.values()), told
    assert loaded.config.vocab_size == SHAPE.vocab and loaded.lm_head.weight is loaded.transformer.wte.weight
    with torch.no_grad():
        trained = model(input_ids=tokens()).logits[..., : SHAPE.vocab]
        assert torch.equal(loaded(tokens()).logits, trained)
        written = loaded.generate(tokens()[:1], max_new_tokens=5, do_sample=False)
    assert torch.equal(written[0, 40], trained[0, -1].argmax())
    assert [file.name for file in tmp_path.iterdir()] == ["exported"]


def test_reading_back_gives_the_weights(model: torch.nn.Module, tmp_path: Path) -> None:
    """Whole and in boxes, without the padding rows."""
    write_folder(ModelTensors(model), SHAPE, tmp_path / "it")
    reader = FolderTensors(look_through(tmp_path / "it"))
    assert set(reader.names()) == set(parameter_shapes(SHAPE))
    for name, parameter in model.named_parameters():
        rows = reader.shape(name)[0]
        assert torch.equal(reader.read(name), parameter[:rows]), name
        box = (slice(rows // 3, rows // 2), *(slice(5, 17) for _ in parameter.shape[1:]))
        assert torch.equal(reader.read(name, box), parameter[box]), name
    assert look_through(tmp_path / "it").shape == SHAPE
    loaded = load_model(reader, SHAPE)
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(input_ids=tokens()).logits[..., : SHAPE.vocab])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(model: torch.nn.Module, tmp_path: Path, dtype: torch.dtype) -> None:
    write_folder(ModelTensors(model), SHAPE, tmp_path / "it", dtype=dtype)
    for name, tensor in load_file(tmp_path / "it" / "model.safetensors").items():
        assert torch.equal(tensor, model.get_parameter(name)[: tensor.shape[0]].to(dtype)), name
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "it", torch_dtype="auto").dtype == dtype
    name = "transformer.wte.weight"
    assert torch.equal(
        FolderTensors(look_through(tmp_path / "it")).read(name), model.get_parameter(name)[:1000].to(dtype).float()
    )


def test_fp16_has_an_end(model: torch.nn.Module, tmp_path: Path) -> None:
    large = ModelTensors(model)
    read = large.read
    large.read = lambda name, box=None: read(name, box) * (1e6 if name.endswith("wpe.weight") else 1)
    with pytest.raises(ValueError, match=r"transformer\.wpe\.weight .* fp16's largest number: use --dtype bf16"):
        write_folder(large, SHAPE, tmp_path / "it", dtype=torch.float16)
    assert not list(tmp_path.iterdir()), "half a folder was left behind"


def test_a_folder_that_holds_something_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_folder(ModelTensors(model), SHAPE, tmp_path / "empty")
    before = (tmp_path / "empty" / "model.safetensors").read_bytes()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file"):
        with pytest.raises(ValueError, match="name a new folder"):
            write_folder(ModelTensors(model), SHAPE, tmp_path / name)
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == before


def test_another_model_is_refused(model: torch.nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"wpe\.weight is \(128, 64\), and \(1024, 768\)|wte\.weight is"):
        write_folder(ModelTensors(model), MODEL_SIZES["gpt2_small"], tmp_path / "it")
    assert not list(tmp_path.iterdir())


def test_what_is_killed_leaves_no_folder(tmp_path: Path) -> None:
    """Killed between two tensors: nothing with the folder's name is there."""
    script = """
import os, signal, sys, torch
from pathlib import Path
sys.path.insert(0, "tests/checkpoint")
from test_huggingface import ModelTensors, SHAPE, build_model, write_folder
reader = ModelTensors(build_model(SHAPE))
read, count = reader.read, iter(range(10))
reader.read = lambda *box: read(*box) if next(count) < 9 else os.kill(os.getpid(), signal.SIGKILL)
write_folder(reader, SHAPE, Path(sys.argv[1]))
"""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "it")], cwd=root, env=environment, timeout=120)
    assert done.returncode == -9
    assert not (tmp_path / "it").exists()


def test_a_foreign_folder_is_read(tmp_path: Path) -> None:
    """As transformers write it, in shards, and with OpenAI's names."""
    model = gpt2_folders.write_folder(tmp_path / "one")
    gpt2_folders.write_folder(tmp_path / "shards", shards="200KB")
    gpt2_folders.write_folder(tmp_path / "openai")
    gpt2_folders.as_openai_wrote_it(tmp_path / "openai")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert json.loads((tmp_path / "one" / "config.json").read_text())["activation_function"] == "gelu_new"
    for name in ("one", "shards", "openai"):
        folder = look_through(tmp_path / name)
        reader = FolderTensors(folder)
        assert folder.shape == SHAPE
        assert all(torch.equal(reader.read(key), weight) for key, weight in model.named_parameters()), name
