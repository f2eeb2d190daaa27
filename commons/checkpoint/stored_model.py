"""A model as it lies on disk, in a checkpoint or a HuggingFace folder, and the tokenizer that goes with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from commons.checkpoint.files import STATE_FILE, CheckpointError
from commons.checkpoint.store import CHECKPOINTS, Checkpoint, checkpoint_folders, newest_whole, verified
from commons.config.gpt2_folder import CONFIG_FILE, is_gpt2_config, look_through
from commons.data.batch_source import RANDOM
from commons.data.corpus import KINDS, TOKENS, find_corpus
from commons.data.tokenizer import END_OF_TEXT, FILES, GPT2, TextTokenizer, find_tokenizer
from commons.model.stored_tensors import Box, FolderTensors, TensorReader
from model_zoo import ModelShape


class CheckpointTensors:
    """The master weights of a checkpoint, of which a part is read from the files that hold it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._shapes = checkpoint.shapes

    def names(self) -> Iterable[str]:
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        cut = box or tuple(slice(0, length) for length in self._shapes[name])
        part = torch.empty([each.stop - (each.start or 0) for each in cut])
        self._checkpoint.read_into(name, "master", [each.start or 0 for each in cut], part)
        return part


@dataclass(frozen=True)
class StoredModel:
    """A model on disk.

    Attributes:
        place: where it lies, for messages.
        notes: what the user is to be told, a line each.
        settings: of the run that trained it, by name; empty where a HuggingFace folder does not tell.
        step: of the training; None for a HuggingFace folder.
        tokenizer: the value of --tokenizer that goes with it; None where it was trained on tokens that are no text.
    """

    place: Path
    reader: TensorReader
    shape: ModelShape
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    step: int | None = None
    tokenizer: str | None = None


def open_model(path: Path) -> StoredModel:
    """The model of a run's folder, a folder of checkpoints, one checkpoint, or a HuggingFace folder.

    Raises:
        CheckpointError, FolderError: nothing is there that could be used, or it is damaged.
    """
    return _from_folder(path) if is_huggingface(path) else open_run(path)


def is_huggingface(path: Path) -> bool:
    """Whether a folder's config.json is transformers' of a GPT-2."""
    return is_gpt2_config(_json(path / CONFIG_FILE))


def _from_folder(path: Path) -> StoredModel:
    folder = look_through(path)
    has_tokenizer = any(all((path / name).is_file() for name in names) for names in FILES)
    return StoredModel(path, FolderTensors(folder), folder.shape, tokenizer=str(path) if has_tokenizer else None)


def open_run(path: Path) -> StoredModel:
    """The model of a run's folder, a folder of checkpoints or one checkpoint: the newest whole one, each byte of it
    verified. Raises CheckpointError.
    """
    checkpoint, notes = _checkpoint(path)
    settings = checkpoint.state["settings"]
    return StoredModel(
        place=checkpoint.folder,
        reader=CheckpointTensors(checkpoint),
        shape=ModelShape(**checkpoint.state["model"]),
        notes=notes,
        settings=settings,
        step=checkpoint.step,
        tokenizer=settings["tokenizer"] if _is_text(settings["data"]) else None,
    )


def _is_text(data: str) -> bool:
    """Whether a run's ``--data`` was text, as far as that shows without it."""
    if data == RANDOM or KINDS.get(Path(data).suffix.lower()) == TOKENS:
        return False
    try:
        return not find_corpus(data).is_tokens
    except (ValueError, OSError):  # it is not here
        return True


def _checkpoint(path: Path) -> tuple[Checkpoint, tuple[str, ...]]:
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: name a run's folder, or one of its checkpoints")
    if (path / STATE_FILE).exists():
        return verified(path), ()
    passed_over: list[str] = []
    for folder in _save_dirs(path):
        checkpoint, wrong = newest_whole(folder, verified)
        passed_over += wrong
        if checkpoint is not None:
            return checkpoint, tuple(f"passed over: {text}" for text in passed_over)
    if passed_over:
        raise CheckpointError(f"no checkpoint of {path} is whole: {'; '.join(passed_over)}")
    raise CheckpointError(
        f"{path} holds no checkpoint: name the folder of a run that was started with --save_every, or one of its"
        " checkpoints"
    )


def _save_dirs(path: Path) -> list[Path]:
    """Where a run may have its checkpoints: below its folder, where its settings say, or right here."""
    settings = _json(path / CONFIG_FILE)
    told = settings.get("save_dir") if isinstance(settings, dict) else None
    places = [path / CHECKPOINTS, *([Path(told)] if told else []), path]
    return [place for place in dict.fromkeys(places) if place.is_dir() and checkpoint_folders(place)]


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --- The tokenizer ----------------------------------------------------------------------------------------------------


def tokenizer_of(model: StoredModel, wanted: str | None = None) -> TextTokenizer:
    """The tokenizer that ``wanted`` names, or else the model's own, or else GPT-2's; bytes, and a note that says so,
    where that cannot be.

    Raises:
        ValueError: the folder that is named has none, or one of more tokens than the model has.
    """
    return find_tokenizer(wanted or model.tokenizer or GPT2, model.shape.vocab)


def write_tokenizer(tokenizer: TextTokenizer, folder: Path, positions: int) -> None:
    """tokenizer.json and tokenizer_config.json, which ``AutoTokenizer`` reads."""
    tokenizer.save(folder / "tokenizer.json")
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
    end = next((each["content"] for each in added if each["id"] == tokenizer.end_of_text), END_OF_TEXT)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
