"""A model written as a HuggingFace folder: config.json, generation_config.json and safetensors files.

The tensors go by one after another, a piece of each at a time, so that the process needs no memory for the model.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from commons.config.gpt2_folder import INDEX_FILE, WEIGHTS_FILE
from commons.model.stored_tensors import TensorReader
from model_zoo import ModelShape, parameter_shapes

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
MOST_FILE_BYTES = 5 * 10**9  # of tensors in one file, as transformers shards
PIECE_ELEMENTS = 1 << 24  # read, converted and written at a time: 64 MiB in fp32
HEAD_ALIGNMENT = 8


def write_folder(
    reader: TensorReader,
    shape: ModelShape,
    target: Path,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.0,
    end_of_text: int | None = None,
    add_files: Callable[[Path], None] = lambda _: None,
    most_file_bytes: int = MOST_FILE_BYTES,
) -> list[Path]:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` loads, whole or not at all.

    Args:
        reader: of the parameters of ``shape``, with the vocabulary as it is or padded.
        target: must not exist, or be empty.
        dropout: the probability that the model was trained with; whoever only uses it drops nothing.
        end_of_text: the token that ends a text; default: the last of the vocabulary.
        add_files: called with the folder before it gets its name: writes what else belongs there, a tokenizer.

    Returns:
        The weight files.

    Raises:
        ValueError: ``target`` holds something, or ``reader`` lacks a parameter or has another size.
        OSError: the disk is full, or the folder cannot be written to.
    """
    from transformers import GenerationConfig

    refuse_used_folder(target)
    _check_parameters(reader, shape)
    with _finished_folder(target) as folder:
        config = transformers_config(shape, dropout, end_of_text)
        config.torch_dtype = dtype
        config.save_pretrained(folder)
        # without a token for padding, generate() warns and takes the same
        GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.eos_token_id
        ).save_pretrained(folder)
        names = _write_weights(reader, shape, folder, dtype, most_file_bytes)
        add_files(folder)
    return [target / name for name in names]


def refuse_used_folder(target: Path) -> None:
    """ValueError where ``target`` is a file or a folder that holds something."""
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        kind = "is a folder that holds something already" if target.is_dir() else "is a file"
        raise ValueError(f"{target} {kind}: name a new folder, or move that one away")


def _check_parameters(reader: TensorReader, shape: ModelShape) -> None:
    held = set(reader.names())
    for name, size in parameter_shapes(shape).items():
        if name not in held:
            raise ValueError(f"the model lacks {name}: it cannot be exported")
        stored = reader.shape(name)
        padded = (max(stored[0], size[0]), *size[1:]) if name.endswith("wte.weight") else size
        if stored != padded:
            raise ValueError(f"{name} is {stored}, and {size} in the model that its settings describe")


@contextlib.contextmanager
def _finished_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that becomes it when the block is through, and is gone where it is not."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        _sync_folder(temporary)
        os.rename(temporary, target)  # takes the place of an empty folder; fails where another process was faster
        _sync_folder(target.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- config.json ------------------------------------------------------------------------------------------------------


def transformers_config(shape: ModelShape, dropout: float = 0.0, end_of_text: int | None = None) -> Any:
    """``GPT2Config`` of a model that is used: the vocabulary without padding, keys and values cached."""
    from transformers import GPT2Config

    end = shape.vocab - 1 if end_of_text is None else end_of_text
    return GPT2Config(
        architectures=["GPT2LMHeadModel"],
        vocab_size=shape.vocab,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        activation_function="gelu_pytorch_tanh",  # as trained: gelu_new's function, in one kernel
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        bos_token_id=end,
        eos_token_id=end,
    )


# --- Weights ----------------------------------------------------------------------------------------------------------


def _write_weights(
    reader: TensorReader, shape: ModelShape, folder: Path, dtype: torch.dtype, most_file_bytes: int
) -> list[str]:
    """model.safetensors, or as many files as are needed and their index; their names."""
    sizes = parameter_shapes(shape)
    width = torch.empty((), dtype=dtype).element_size()
    groups = _grouped({name: math.prod(size) * width for name, size in sizes.items()}, most_file_bytes)
    if len(groups) == 1:
        files = [WEIGHTS_FILE]
    else:
        files = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for file, group in zip(files, groups, strict=True):
        _write_file(folder / file, reader, {name: sizes[name] for name in group}, dtype)
    if len(groups) > 1:
        file_of = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        total = sum(math.prod(size) for size in sizes.values()) * width
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return files


def _grouped(byte_counts: Mapping[str, int], most: int) -> list[list[str]]:
    """The names in order, in groups of at most ``most`` bytes or of one tensor."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, count in byte_counts.items():
        if groups[-1] and filled + count > most:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += count
    return groups


def _write_file(file: Path, reader: TensorReader, sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """One safetensors file: the length of its head in 8 bytes, the head in JSON, the tensors one after another.

    https://huggingface.co/docs/safetensors/index#format
    """
    with open(file, "wb") as opened:
        opened.write(_head(sizes, dtype))
        for name, size in sizes.items():
            for piece in _pieces(reader, name, size):
                opened.write(_converted(piece, name, dtype).view(torch.uint8).numpy().data)
        opened.flush()
        os.fsync(opened.fileno())


def _converted(piece: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    converted = piece.to(dtype).contiguous()
    if dtype == torch.float16 and bool((converted.isinf() & piece.isfinite()).any()):
        raise ValueError(f"{name} holds weights beyond 65504, fp16's largest number: use --dtype bf16, or fp32")
    return converted


def _head(sizes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    width, entries, begin = torch.empty((), dtype=dtype).element_size(), {}, 0
    for name, size in sizes.items():
        end = begin + math.prod(size) * width
        entries[name] = {"dtype": SAFETENSORS_DTYPES[dtype], "shape": list(size), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    padding = -len(text) % HEAD_ALIGNMENT
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def _pieces(reader: TensorReader, name: str, size: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """A parameter by whole rows, the rows that pad the vocabulary left out."""
    rows, row_elements = size[0], math.prod(size[1:])
    step = max(1, PIECE_ELEMENTS // row_elements)
    for first in range(0, rows, step):
        rest = tuple(slice(0, length) for length in size[1:])
        yield reader.read(name, (slice(first, min(rows, first + step)), *rest))


# --- A model in memory ------------------------------------------------------------------------------------------------


def load_model(reader: TensorReader, shape: ModelShape) -> Any:
    """HuggingFace's ``GPT2LMHeadModel`` with these weights in fp32, to be used and not trained."""
    from transformers import GPT2LMHeadModel

    weights = {name: reader.read(name, tuple(map(slice, size))) for name, size in parameter_shapes(shape).items()}
    model: Any = GPT2LMHeadModel.from_pretrained(None, config=transformers_config(shape), state_dict=weights)
    return model.eval()
