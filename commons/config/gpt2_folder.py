"""A folder that holds a GPT-2 as HuggingFace's transformers write it: the model's shape, the file of every tensor, and
all that keeps the suite from using it. Nothing here reads a weight.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_zoo import ModelShape, parameter_shapes

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PREFIX = "transformer."  # which OpenAI's files leave out
# masks that older files hold as tensors, and the head, which is the token embedding
NOT_PARAMETERS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
DTYPES = ("F64", "F32", "F16", "BF16")
MOST_NAMED = 3  # tensors that one sentence names

# ModelShape's fields -> transformers' names and defaults
SHAPE_KEYS: dict[str, tuple[str, int]] = {
    "layers": ("n_layer", 12),
    "hidden": ("n_embd", 768),
    "heads": ("n_head", 12),
    "positions": ("n_positions", 1024),
    "vocab": ("vocab_size", 50257),
}
# What changes the function that a GPT-2 is: transformers' default, and the values that are the suite's.
SAME_FUNCTION: dict[str, tuple[Any, Callable[[Any, ModelShape], bool]]] = {
    "activation_function": ("gelu_new", lambda value, _: value in ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, lambda value, _: value == 1e-5),
    "n_inner": (None, lambda value, shape: value in (None, 4 * shape.hidden)),
    "scale_attn_weights": (True, lambda value, _: value is True),
    "scale_attn_by_inverse_layer_idx": (False, lambda value, _: value is False),
    "tie_word_embeddings": (True, lambda value, _: value is True),
    "add_cross_attention": (False, lambda value, _: value is False),
}


class FolderError(ValueError):
    """A folder that cannot be used. ``problems``: all that is wrong with it, a sentence each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True)
class StoredTensor:
    """Where a parameter is stored: its file, its name there, its dimensions and safetensors' word for its dtype."""

    file: Path
    name: str
    size: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class GPT2Folder:
    """A folder that has been looked through.

    Attributes:
        config: its config.json.
        tensors: by HuggingFace's name of the parameter.
    """

    path: Path
    shape: ModelShape
    config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


def shape_of(folder: str | Path) -> ModelShape:
    """The shape that a folder's config.json tells. FolderError where it tells none."""
    return _shape(Path(folder), _config(Path(folder)))


def look_through(folder: str | Path) -> GPT2Folder:
    """Read a folder's config.json and the heads of its weight files, a few KiB each.

    Raises:
        FolderError: with all that is wrong: no GPT-2, another function, weights missing, damaged or of another shape.
    """
    path = Path(folder)
    config = _config(path)
    shape = _shape(path, config)
    found = [*_other_function(path, config, shape)]
    tensors: dict[str, StoredTensor] = {}
    try:
        tensors = _stored_tensors(path)
        found += _wrong_tensors(path, shape, tensors)
    except FolderError as error:
        found += error.problems
    if found:
        raise FolderError(found)
    return GPT2Folder(path, shape, config, {name: tensors[name] for name in parameter_shapes(shape)})


def is_gpt2_config(config: Any) -> bool:
    """Whether a config.json is transformers' of a GPT-2; a run of this suite has another."""
    return isinstance(config, dict) and config.get("model_type") == "gpt2" and "distplan" not in config


# --- config.json ------------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise FolderError(
            [f"{path} is not a folder: name one that holds {CONFIG_FILE} and {WEIGHTS_FILE} of a GPT-2, as"
             " save_pretrained() writes them"]
        )  # fmt: skip
    config = _json(path / CONFIG_FILE)
    if isinstance(config, dict) and "distplan" in config:
        raise FolderError(
            [f"{path} is a run of this suite, not a HuggingFace folder: make one of its last checkpoint with"
             f" python -m commons.checkpoint.export {path} --to FOLDER"]
        )  # fmt: skip
    if not is_gpt2_config(config):
        kind = config.get("model_type", "nothing") if isinstance(config, dict) else "no settings"
        raise FolderError([f"{path / CONFIG_FILE} describes {kind!r}, not 'gpt2': only a GPT-2 can be used"])
    return config


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FolderError([f"{file} does not exist: name a folder as save_pretrained() writes it"]) from None
    except OSError as error:
        raise FolderError([f"cannot read {file}: {error.strerror}"]) from None
    except ValueError as error:
        raise FolderError([f"{file} is not JSON ({error}): fetch it again"]) from None


def _shape(path: Path, config: Mapping[str, Any]) -> ModelShape:
    values = {field: config.get(key, default) for field, (key, default) in SHAPE_KEYS.items()}
    try:
        return ModelShape(**values)
    except ValueError as error:
        raise FolderError([f"{path / CONFIG_FILE}: {error}"]) from None


def _other_function(path: Path, config: Mapping[str, Any], shape: ModelShape) -> Iterator[str]:
    for key, (default, is_same) in SAME_FUNCTION.items():
        value = config.get(key, default)
        if not is_same(value, shape):
            yield f"{path / CONFIG_FILE}: {key} {value!r} is another function than the GPT-2 trained here ({default!r})"


# --- Weights ----------------------------------------------------------------------------------------------------------


def _stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """All tensors by their name with the prefix; raises FolderError with what is wrong with the files."""
    found: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(path):
        try:
            held = _tensors_of(file)
        except FolderError as error:
            found += error.problems
            continue
        twice = sorted(tensors.keys() & held.keys())
        found += [f"{file}: {name} is in {tensors[name].file.name} as well" for name in twice[:1]]
        tensors |= held
    if found:
        raise FolderError(found)
    return tensors


def _weight_files(path: Path) -> list[Path]:
    if (path / WEIGHTS_FILE).exists():
        return [path / WEIGHTS_FILE]
    if (path / INDEX_FILE).exists():
        index = _json(path / INDEX_FILE)
        file_of = index.get("weight_map") if isinstance(index, dict) else None
        files = sorted({str(name) for name in file_of.values()}) if isinstance(file_of, dict) else []
        if not files or any(Path(name).name != name for name in files):
            raise FolderError([f"{path / INDEX_FILE} names no files beside it under 'weight_map': fetch it again"])
        return [path / name for name in files]
    pickle = next((name for name in PICKLES if (path / name).exists()), None)
    if pickle is not None:
        raise FolderError(
            [f"{path / pickle} is a pickle, which can run any code when it is loaded, and is not read: save the model"
             f" again with transformers' save_pretrained(), which writes {WEIGHTS_FILE}"]
        )  # fmt: skip
    raise FolderError([f"{path} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}: fetch the weights too"])


def _tensors_of(file: Path) -> dict[str, StoredTensor]:
    """What one safetensors file holds. Its head says how long it has to be, so that a cut file is noticed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
            held = [(name, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()]
    except FileNotFoundError:
        raise FolderError([f"{file} does not exist: fetch all weight files"]) from None
    except OSError as error:
        raise FolderError([f"cannot read {file}: {error.strerror or error}"]) from None
    except SafetensorError as error:
        raise FolderError([f"{file} is damaged or cut off ({_reason(file, error)}): fetch it again"]) from None
    return {_with_prefix(name): StoredTensor(file, name, size, dtype) for name, size, dtype in held}


def _reason(file: Path, error: Exception) -> str:
    with open(file, "rb") as opened:
        pointer = opened.read(64).startswith(b"version https://git-lfs")
    return "a pointer of Git LFS: run git lfs pull" if pointer else str(error)


def _with_prefix(name: str) -> str:
    return name if name.startswith((PREFIX, "lm_head.")) else PREFIX + name


def _wrong_tensors(path: Path, shape: ModelShape, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    wanted = parameter_shapes(shape)
    missing = [name for name in wanted if name not in tensors]
    strange = [name for name in tensors if name not in wanted and not name.endswith(NOT_PARAMETERS)]
    if missing:
        yield f"{path} lacks {_named(missing)}, which {CONFIG_FILE} promises: fetch all weight files"
    if strange:
        yield f"{path} holds {_named(strange)}, which no GPT-2 of {shape.layers} layers has: name a plain GPT-2"
    for name in wanted.keys() & tensors.keys():
        stored = tensors[name]
        if stored.size != wanted[name]:
            yield f"{stored.file}: {name} is {_by(stored.size)}, but {CONFIG_FILE} makes it {_by(wanted[name])}"
        elif stored.dtype not in DTYPES:
            yield f"{stored.file}: {name} is {stored.dtype}: only {', '.join(DTYPES)} can be read, no quantised weights"


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more tensors" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


def _by(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
