"""ResolvedConfig: the settings of a run with everything decided that the user left open."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from commons.config.auto import compile_problem, graph_problems, is_compilable, peer_problems
from commons.config.gpt2_folder import FolderError, shape_of
from commons.config.schema import FRACTIONS, PLACEMENTS, RANDOM_WEIGHTS, TrainConfig
from commons.data.batch_source import DataRequest
from model_zoo import MODEL_SIZES, ModelShape, divisors, parameter_count

# What a setting becomes that is left out: a GPU gets a run worth measuring, a CPU one that ends in seconds.
DEVICE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {"model_type": "gpt2_medium", "batch_size": 16, "seq_len": 1024},
    "cpu": {"model_type": "gpt2_tiny", "batch_size": 4, "seq_len": 64},
}
TRAIN_STEPS, WARMUP_STEPS = 10, 2
PREFETCH = 2

# ModelShape's fields -> the settings that change them
SHAPE_FLAGS = {
    "layers": "num_layers",
    "hidden": "hidden_size",
    "heads": "num_heads",
    "positions": "num_positions",
    "vocab": "vocab_size",
}

# Parameters in one of Gemini's chunks, at least: 4 MiB in bf16. Below, a collective takes longer to begin than to send,
# and ranks wait for each other more often than they need.
SMALLEST_CHUNK = 2**21


def _decided() -> Any:
    """A field that has no default any more."""

    def missing() -> Any:
        raise TypeError("every setting of a ResolvedConfig has to be given: use TrainConfig.resolve()")

    return dataclasses.field(default_factory=missing)


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainConfig):
    """The settings of a run, all of them decided: no None, and no "auto" but Gemini's placement and --resume.

    What only the run itself finds out (whether ranks reach each other's memory, whether there is room to capture
    graphs) is replaced in it where it is found: see commons.training.session.Session.settled_config().

    Attributes:
        chosen: names of the settings that the user left open, in the order of --help.
    """

    model_type: str = _decided()
    num_layers: int = _decided()
    hidden_size: int = _decided()
    num_heads: int = _decided()
    num_positions: int = _decided()
    vocab_size: int = _decided()
    shard_param_frac: float = _decided()
    offload_optim_frac: float = _decided()
    offload_param_frac: float = _decided()
    max_prefetch: int = _decided()
    blocks_per_chunk: int = _decided()
    peer_copies: Literal["on", "off"] = _decided()
    zero_stage: int = _decided()
    num_microbatches: int = _decided()
    batch_size: int = _decided()
    seq_len: int = _decided()
    train_step: int = _decided()
    warmup_step: int = _decided()
    device: Literal["cuda", "cpu"] = _decided()
    compile: Literal["on", "off"] = _decided()
    cuda_graph: Literal["on", "off"] = _decided()
    run_name: str = _decided()
    chosen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        left = [name for name, value in self.as_dict().items() if _is_open(name, value)]
        assert not left, f"not decided: {left}"

    def shape(self) -> ModelShape:
        """The size of the model. KeyError for an unknown ``model_type``."""
        return dataclasses.replace(
            MODEL_SIZES[self.model_type], **{f: getattr(self, n) for f, n in SHAPE_FLAGS.items()}
        )

    def gemini_placement(self) -> dict[str, Any]:
        """GeminiPlugin's arguments that say where chunks live.

        The plugin itself knows only "static" and "auto": the other names have become fractions.
        """
        if self.placement == "auto":
            return {
                "placement_policy": "auto",
                "warmup_non_model_data_ratio": self.warmup_non_model_data_ratio,
                "steady_cuda_cap_ratio": self.steady_cuda_cap_ratio,
            }
        return {"placement_policy": "static", **{name: getattr(self, name) for name in FRACTIONS}}

    def data_request(self) -> DataRequest:
        """What is asked of the data's source; see commons.data.sources."""
        return DataRequest(
            path=self.data,
            tokenizer=self.tokenizer,
            seq_len=self.seq_len,
            vocab=self.shape().vocab,
            seed=self.seed,
            eval_fraction=self.eval_fraction,
        )

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.log_dir) / self.run_name

    @property
    def checkpoint_dir(self) -> Path:
        """The folder of its checkpoints."""
        return Path(self.save_dir).expanduser() if self.save_dir else self.run_dir / "checkpoints"

    @property
    def runs_as_functions(self) -> bool:
        """Whether the model runs as functions of tensors: to be compiled, or since only they know fp8."""
        return self.compile == "on" or self.precision == "fp8"

    def asked(self, name: str) -> bool:
        """Whether the user gave the setting, rather than having it chosen."""
        return name not in self.chosen

    def captures_graphs(self, world_size: int, peer_copies: bool) -> bool:
        """Whether the passes are captured where Gemini's ranks have turned out to copy (``peer_copies``) or not."""
        needs_copies = self.distplan == "CAI_Gemini" and self.data_parallel_size(world_size) > 1
        return self.cuda_graph == "on" and (peer_copies or not needs_copies)


@dataclass(frozen=True)
class Where:
    """What is known of the job when the settings are decided; see commons.lifecycle.job."""

    device_type: str
    world_size: int
    local_world_size: int


def resolve(given: TrainConfig, where: Where) -> ResolvedConfig:
    """Decide what was left open. Whatever the user gave is kept, even where it is wrong: commons.cli judges the result.

    The defaults give way: what the user gave is never refused for the sake of a default that could be another one.
    """
    config: TrainConfig = given
    chosen: set[str] = set(given.chosen) if isinstance(given, ResolvedConfig) else set()
    for choose in CHOICES:
        choices = {
            name: value for name, value in choose(config, where).items() if _is_open(name, getattr(config, name))
        }
        chosen |= choices.keys()
        config = TrainConfig(**{**_values(config), **choices})
    # a shell leaves the ~ in --log_dir=~/logs as it is
    paths = {name: os.path.expanduser(getattr(given, name)) for name in ("log_dir", "data", "init_from")}
    values = {**_values(config), **paths}
    return ResolvedConfig(**values, chosen=tuple(name for name in given.as_dict() if name in chosen))


def _values(config: TrainConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)}


def _is_open(name: str, value: Any) -> bool:
    return value is None or (value == "auto" and name not in ("placement", "resume"))


def _initial_weights(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    """The size of the model that the weights are taken from, where no size is given."""
    shape = None if config.model_type is not None else initial_shape(config)
    if shape is None:
        return {}
    return {"model_type": nearest_size(shape), **{flag: getattr(shape, field) for field, flag in SHAPE_FLAGS.items()}}


def initial_shape(config: TrainConfig) -> ModelShape | None:
    """The shape of the model in ``--init_from``; None for random weights, and where the folder tells none."""
    if config.init_from == RANDOM_WEIGHTS:
        return None
    try:
        return shape_of(Path(config.init_from).expanduser())
    except FolderError:
        return None  # commons.cli says what is wrong with it


def nearest_size(shape: ModelShape) -> str:
    """The name of the size that is ``shape``, or of the one with the most similar parameter count."""
    counts = {name: parameter_count(size) for name, size in MODEL_SIZES.items()}
    same = [name for name, size in MODEL_SIZES.items() if size == shape]
    return min(same or counts, key=lambda name: abs(math.log(counts[name] / parameter_count(shape))))


def _device(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    return {"device": where.device_type, "model_type": DEVICE_DEFAULTS[where.device_type]["model_type"]}


def _size(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    size = _size_or_first(config)
    hidden = config.hidden_size or size.hidden
    divided = [size.heads] if hidden % size.heads == 0 else usual_head_counts(hidden, 1)
    heads = min(divided, key=lambda heads: abs(heads - size.heads))
    return {
        "num_layers": size.layers,
        "hidden_size": size.hidden,
        "num_heads": heads,
        "num_positions": size.positions,
        "vocab_size": size.vocab,
    }


def _size_or_first(config: TrainConfig) -> ModelShape:
    """The size that ``model_type`` names; where that does not exist, any, since the run will be refused."""
    return MODEL_SIZES.get(str(config.model_type)) or next(iter(MODEL_SIZES.values()))


def usual_head_counts(hidden: int, tp_degree: int) -> list[int]:
    """The head counts that divide the hidden size and that ``tp_degree`` divides.

    Of these the ones with head sizes from 16 to 128, what attention kernels are fast at, where there are any.
    """
    fitting = [heads for heads in divisors(hidden) if heads % tp_degree == 0]
    return [heads for heads in fitting if 16 <= hidden // heads <= 128] or fitting


def _steps(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    warmup = config.warmup_step or 0
    after_warmup = warmup + TRAIN_STEPS if warmup >= TRAIN_STEPS else 0
    steps = config.train_step or max(TRAIN_STEPS, after_warmup, config.trace_step, config.lr_warmup_step)
    return {"train_step": steps, "warmup_step": max(0, min(WARMUP_STEPS, steps - 1))}


def _batch(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    defaults = DEVICE_DEFAULTS[where.device_type]
    seq_len, batch = min(defaults["seq_len"], config.num_positions or 1), defaults["batch_size"]
    if config.sequence_parallel == "on":
        seq_len = max(1, seq_len // config.tp_degree) * config.tp_degree
    if config.pp_degree > 1 and not _is_cut(batch, config):
        pieces = config.num_microbatches or config.pp_degree
        batch = -(-batch // pieces) * pieces
    return {"seq_len": seq_len, "batch_size": batch}


def _is_cut(batch: int, config: TrainConfig) -> bool:
    """Whether a batch can be cut into the microbatches that keep every stage of a pipeline busy."""
    if config.num_microbatches is not None:
        return batch % max(1, config.num_microbatches) == 0
    return batch % config.pp_degree == 0 or (batch > config.pp_degree and config.num_model_chunks == 1)


def _fractions(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    fractions: dict[str, float] = dict(zip(FRACTIONS, PLACEMENTS[config.placement], strict=True))
    if config.placement == "static" and config.offload_param_frac:
        fractions["offload_optim_frac"] = 1.0  # Gemini keeps parameters on the host beside their optimizer only
    return fractions


def _chunks(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    layers, hidden = config.num_layers or 1, config.hidden_size or 1
    alone = where.world_size <= config.tp_degree and not config.offload_optim_frac and config.placement != "auto"
    ahead = config.gemini_hooks == "block" and config.tp_degree == 1 and not alone
    return {
        "blocks_per_chunk": max(1, min(layers, SMALLEST_CHUNK // (12 * hidden * hidden))),
        "max_prefetch": PREFETCH if ahead else 0,
    }


def _pipeline(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    """Microbatches: one per stage keeps every stage busy once; a batch that cannot be cut so is cut into sequences."""
    pp, batch = config.pp_degree, config.batch_size or 1
    nothing_to_shard = config.precision == "fp32" or config.data_parallel_size(where.world_size) <= 1
    return {
        "num_microbatches": 1 if pp <= 1 else pp if batch % pp == 0 else max(1, batch),
        "zero_stage": 0 if nothing_to_shard else 1,
    }


def _compile(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    possible = where.device_type == "cuda" and is_compilable(config) and compile_problem("cuda") is None
    return {"compile": "on" if possible else "off"}


def _peer_copies(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    possible = not any(peer_problems(config, where.world_size, where.local_world_size))
    # a user who has taken peer access from NCCL has had a reason
    allowed = os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
    wanted = config.distplan == "CAI_Gemini" and where.device_type == "cuda" and possible and allowed
    return {"peer_copies": "on" if wanted else "off"}


def _cuda_graph(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    problems = graph_problems(config, where.device_type, where.world_size, config.peer_copies == "on")
    return {"cuda_graph": "on" if config.compile == "on" and not problems else "off"}


def _name(config: TrainConfig, where: Where) -> Mapping[str, Any]:
    return {"run_name": config.default_run_name(where.world_size, time.strftime("%Y%m%d-%H%M%S"))}


# In the order in which one depends on those before it.
CHOICES: tuple[Callable[[TrainConfig, Where], Mapping[str, Any]], ...] = (
    _initial_weights,
    _device,
    _size,
    _steps,
    _batch,
    _fractions,
    _chunks,
    _pipeline,
    _compile,
    _peer_copies,
    _cuda_graph,
    _name,
)
