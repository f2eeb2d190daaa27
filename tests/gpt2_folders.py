"""HuggingFace folders of small GPT-2s, written by transformers itself, for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

WEIGHTS = "model.safetensors"


def write_folder(folder: Path, *, seed: int = 0, shards: str = "5GB", **config: Any) -> GPT2LMHeadModel:
    """A folder as ``save_pretrained`` writes it, shaped like gpt2_tiny unless ``config`` says otherwise, with biases
    and norms that are not what training begins with; the model.
    """
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 1000}
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, "bos_token_id": 999, "eos_token_id": 999, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size=shards)
    return model


def as_openai_wrote_it(folder: Path) -> None:
    """The same weights with OpenAI's names: no prefix, and every block's mask as a tensor."""
    tensors = load_file(folder / WEIGHTS)
    named = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    for block in range(json.loads((folder / "config.json").read_text())["n_layer"]):
        named[f"h.{block}.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    """Give settings of a folder's config.json other values."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Have ``change`` edit the tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
