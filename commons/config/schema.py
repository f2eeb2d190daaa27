"""TrainConfig: every setting of a run, what it means, what it is when nobody gives it.

The flags are made from the fields (commons.cli.flags), the fields are judged by commons.cli.checks. Importing this
module costs nothing: torch, transformers and the model table are imported when a command line is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from commons.config.resolved import ResolvedConfig

RANDOM_WEIGHTS = "random"  # --init_from
RESUME_AUTO = "auto"  # --resume: the newest checkpoint that is whole
FRACTIONS = ("shard_param_frac", "offload_optim_frac", "offload_param_frac")

# The fractions that each --placement stands for, in the order of FRACTIONS. "static" takes what the user
# gives; under "auto" Gemini moves chunks by the memory that it sees and reads none of them.
PLACEMENTS: dict[str, tuple[float, float, float]] = {
    "static": (1.0, 0.0, 0.0),
    "auto": (1.0, 0.0, 0.0),
    "cuda": (1.0, 0.0, 0.0),
    "cpu": (1.0, 1.0, 1.0),
    "const": (1.0, 0.5, 0.0),
}


def _flag(default: Any, text: str, metavar: str | None = None) -> Any:
    """A field with its line in --help. The metadata are what argparse's add_argument is called with."""
    return field(default=default, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True)
class ModelFlags:
    _argument_group_name: ClassVar[str] = "Model"

    model_type: str | None = _flag(
        None,
        "size of the GPT-2, see the list below (default: gpt2_medium on a GPU, gpt2_tiny on a CPU)",
        "SIZE",
    )
    num_layers: int | None = _flag(None, "transformer blocks, instead of the size's own", "N")
    hidden_size: int | None = _flag(None, "width of the residual stream, instead of the size's own", "N")
    num_heads: int | None = _flag(None, "attention heads, instead of the size's own; must divide the hidden size", "N")
    num_positions: int | None = _flag(
        None, "rows of the position table, the longest sequence, instead of the size's own", "N"
    )
    vocab_size: int | None = _flag(None, "token ids of the vocabulary, instead of the size's own", "N")
    init_from: str = _flag(
        RANDOM_WEIGHTS,
        "initial weights. random: drawn by --seed; else a folder with a GPT-2 as HuggingFace's transformers write it,"
        " whose size is taken where none is given",
        "FOLDER",
    )
    dropout: float = _flag(0.0, "probability of dropping an activation, in embeddings, attention and blocks", "P")
    attention: Literal["sdpa", "eager", "flash"] = _flag(
        "sdpa",
        "sdpa: torch picks the fastest kernel it has; flash: its flash kernel or an error; eager: plain"
        " matrix products",
    )
    activation_checkpointing: Literal["off", "selective", "on"] = _flag(
        "off",
        "what the backward pass computes again. selective: norms and activations, while the results of matrix products"
        " and attention are kept; on: all but every block's input: least memory, a third more work",
    )


@dataclass(frozen=True)
class PlanFlags:
    _argument_group_name: ClassVar[str] = "Plan"

    distplan: str = _flag("CAI_Gemini", "how the model is spread over the devices, see the list below", "PLAN")
    placement: Literal["auto", "static", "cuda", "cpu", "const"] = _flag(
        "static",
        "where Gemini keeps its chunks. static: by the three fractions; auto: moved by free memory while"
        " training, master weights and optimizer states always on the host; and three names for fixed fractions,"
        " cuda: all on the device, cpu: parameters, gradients and optimizer on the host between uses, const: half"
        " of the optimizer on the host",
    )
    shard_param_frac: float | None = _flag(
        None,
        "static: fraction of the parameters' bytes sharded over the ranks, the rest is replicated (default: 1.0);"
        " 0 is the fastest with --peer_copies over NVLink, where memory allows",
        "FRAC",
    )
    offload_optim_frac: float | None = _flag(
        None,
        "static: fraction of the optimizer's bytes kept on the host (default: 0.0; 1.0 with --offload_param_frac)",
        "FRAC",
    )
    offload_param_frac: float | None = _flag(
        None,
        "static: fraction of the parameters' bytes kept on the host between uses; above 0 needs the other"
        " two at 1 (default: 0.0)",
        "FRAC",
    )
    warmup_non_model_data_ratio: float = _flag(
        0.8,
        "auto: share of device memory kept free of chunks in the first step, before memory use is known; below 1",
        "FRAC",
    )
    steady_cuda_cap_ratio: float = _flag(
        0.9, "auto: share of device memory that may be used after that; above 0", "FRAC"
    )
    max_prefetch: int | None = _flag(
        None,
        "Gemini: chunks gathered ahead of their use, while the device still computes (default: 2; 0 with"
        " --gemini_hooks operation, and for a rank alone without offload)",
        "N",
    )
    blocks_per_chunk: int | None = _flag(
        None,
        "Gemini: transformer blocks that are gathered, and whose gradients are averaged, together; all of them: the"
        " rest of the model too (default: as many as have two million parameters, at least one)",
        "N",
    )
    peer_copies: Literal["auto", "on", "off"] = _flag(
        "auto",
        "Gemini: gather chunks and average gradients by copies from memory to memory, without kernels that take"
        " multiprocessors from the computation; auto: between GPUs of one host that reach each other's memory, where"
        " nothing is offloaded; on a CPU only to try it",
    )
    gemini_hooks: Literal["block", "operation"] = _flag(
        "block",
        "where Gemini hooks in. block: once per transformer block, which can then be compiled; operation: at"
        " every operation, Colossal-AI's own way, always so under tensor parallelism",
    )
    tp_degree: int = _flag(1, "tensor parallelism: ranks that share every weight matrix", "N")
    pp_degree: int = _flag(1, "pipeline parallelism: stages that the blocks are cut into", "N")
    zero_stage: int | None = _flag(
        None,
        "CAI_Hybrid: what is sharded over data-parallel ranks; 0: nothing, 1: optimizer states, 2: gradients too"
        " (default: 1; 0 in fp32 and on one data-parallel rank)",
        "N",
    )
    num_microbatches: int | None = _flag(
        None,
        "pipeline: pieces that a batch is cut into (default: pp_degree where that divides batch_size, else batch_size)",
        "N",
    )
    num_model_chunks: int = _flag(
        1, "pipeline: pieces of the model per stage; above 1 is the interleaved schedule", "N"
    )
    sequence_parallel: Literal["on", "off"] = _flag(
        "off", "on: share activations between the tensor-parallel blocks along the sequence too"
    )


@dataclass(frozen=True)
class BatchFlags:
    _argument_group_name: ClassVar[str] = "Batch"

    batch_size: int | None = _flag(
        None,
        "sequences per data-parallel rank and micro-step (default: 16 on a GPU, 4 on a CPU, or what a pipeline needs)",
        "N",
    )
    seq_len: int | None = _flag(
        None, "tokens per sequence, at most the model's positions (default: 1024 on a GPU, 64 on a CPU)", "N"
    )
    train_step: int | None = _flag(
        None,
        "optimizer steps in all, counted from the first of the training, also where --resume goes on (default: 10, or"
        " as many as the other settings of steps need)",
        "N",
    )
    warmup_step: int | None = _flag(
        None,
        "first steps left out of the medians at the end; below train_step (default: 2, or fewer than train_step)",
        "N",
    )
    grad_accum: int = _flag(1, "batches whose gradients are added up for one optimizer step", "N")
    max_bad_steps: int = _flag(3, "stop after N consecutive steps whose loss is NaN or infinite; 0: never", "N")
    seed: int = _flag(42, "of weights (the same on every rank) and data (different on every data-parallel rank)", "N")


@dataclass(frozen=True)
class DataFlags:
    _argument_group_name: ClassVar[str] = "Data"

    data: str = _flag(
        "random",
        "random: random tokens; else what to train on: token files (.bin: headerless uint16 or uint32, or with llm.c's"
        ' header), texts (.txt, .md) or JSONL (.jsonl, a "text" per line), one or a folder; texts are tokenised once',
        "PATH",
    )
    tokenizer: str = _flag(
        "gpt2",
        "of texts: a folder with tokenizer.json, or with vocab.json and merges.txt; gpt2: GPT-2's own, and bytes where"
        " it is not on this machine or the model's vocabulary is too small for it; bytes",
        "FOLDER",
    )
    eval_every: int = _flag(
        0, "loss and perplexity on held-out data after every N steps and after the last; 0: never", "N"
    )
    eval_fraction: float = _flag(
        0.01, "share of the data, its end, that is held out of training, whether it is evaluated on or not", "FRAC"
    )


@dataclass(frozen=True)
class OptimizerFlags:
    _argument_group_name: ClassVar[str] = "Optimizer (AdamW)"

    lr: float = _flag(3e-4, "learning rate after its warm-up", "LR")
    lr_schedule: Literal["constant", "cosine"] = _flag(
        "constant", "course of the learning rate; cosine ends at a tenth of it"
    )
    lr_warmup_step: int = _flag(0, "steps over which the learning rate grows from 0", "N")
    weight_decay: float = _flag(0.01, "of weight matrices; biases and norms have none", "W")
    beta1: float = _flag(0.9, "decay of the mean of gradients", "B")
    beta2: float = _flag(0.95, "decay of the mean of squared gradients", "B")
    adam_eps: float = _flag(1e-8, "added to the root of the mean of squared gradients", "EPS")
    clip_grad_norm: float = _flag(0.0, "scale gradients down to this global norm; 0: never", "NORM")
    precision: Literal["bf16", "fp16", "fp32", "fp8"] = _flag(
        "bf16",
        "of compute; master weights are fp32 always, fp16 has a dynamic loss scale. fp8: as bf16, but with the matrix"
        " products of the blocks in fp8, for GPUs that have it (RTX 40, L40S, H100 and newer)",
    )
    initial_loss_scale: float = _flag(
        2.0**16,
        "fp16: factor of the loss at first; a step whose gradients overflow is skipped on all ranks, and it is halved",
        "FACTOR",
    )


@dataclass(frozen=True)
class MachineFlags:
    _argument_group_name: ClassVar[str] = "Machine"

    device: Literal["auto", "cuda", "cpu"] = _flag("auto", "auto: the GPUs where there are any, else the CPU")
    compile: Literal["auto", "on", "off"] = _flag(
        "auto", "torch.compile, block by block; auto: on a GPU, and without tensor or pipeline parallelism"
    )
    cuda_graph: Literal["auto", "on", "off"] = _flag(
        "auto",
        "capture the forward and the backward pass once and replay them, so that the GPU does not wait for the host;"
        " auto: with compiled blocks, under torch's plans and under Gemini on one GPU, or on several with"
        " --peer_copies, where nothing is offloaded, accumulated, dropped or in fp16",
    )
    timeout: float = _flag(
        600.0,
        "seconds without progress after which a hanging rank, a stuck collective, or the wait for another machine"
        " ends the run; to be longer than the longest compilation",
        "SECONDS",
    )
    max_restarts: int = _flag(
        0,
        "launcher: restart all ranks, from the last checkpoint or else the first step, up to N times when one dies or"
        " hangs",
        "N",
    )


@dataclass(frozen=True)
class CheckpointFlags:
    _argument_group_name: ClassVar[str] = "Checkpoints"

    save_every: int = _flag(0, "write a checkpoint every N steps and at the end, beside the training; 0: never", "N")
    save_dir: str = _flag("", "folder of the checkpoints (default: checkpoints, in the run's folder)", "DIR")
    keep: int = _flag(0, "checkpoints that stay, older ones are removed once a new one is whole; 0: all", "N")
    resume: str = _flag(
        "",
        "go on from a checkpoint, under any plan and on any number of ranks. PATH: its folder, one of checkpoints, or a"
        " run's; auto: the newest whole one in --save_dir, or in the folder of --run_name, if there is any",
        "PATH",
    )


@dataclass(frozen=True)
class OutputFlags:
    _argument_group_name: ClassVar[str] = "Output"

    log_dir: str = _flag("gemini_logs", "folder that holds one folder per run", "DIR")
    run_name: str | None = _flag(
        None,
        "the run's folder in log_dir (default: plan, size, data x tensor x pipeline ranks, precision and time)",
        "NAME",
    )
    measure_peak: bool = _flag(
        False, "take the peak rate behind MFU from a matrix product measured here, not from the datasheet"
    )
    check_parity: bool = _flag(
        False,
        "train a single-process fp32 reference beside this run, compare losses and gradient norms, and exit"
        " with 1 if they differ",
    )
    trace_step: int = _flag(
        0,
        "record this step (from 1) on rank 0 with torch's profiler, for Perfetto and benchmarks.trace; the recorded"
        " step itself is slower; 0: none",
        "N",
    )
    log_every: int = _flag(
        1, "print a line for every Nth step only, besides the first and the last; metrics.jsonl has every step", "N"
    )
    sinks: str = _flag(
        "",
        "send every step's figures also to tensorboard (a folder in the run's), wandb or mlflow, several with commas;"
        " what is named has to be installed",
        "NAMES",
    )
    quiet: bool = _flag(False, "print no line per step, only the header and the end")


@dataclass(frozen=True)
class PlanningFlags:
    _argument_group_name: ClassVar[str] = "Planning"

    dry_run: bool = _flag(
        False, "start nothing: print what the run would take and how fast it would be; exit code 3 if it does not fit"
    )
    no_preflight: bool = _flag(
        False, "start even if the run does not fit into the memory that is free, instead of ending with exit code 3"
    )
    json: bool = _flag(False, "with --dry_run and --plan_for: print one JSON document, for programs")
    auto: bool = _flag(
        False,
        "choose plan, degrees, fractions, batch and recomputation, as far as they are not given: by memory and a model"
        " of the step's time, then by short runs of the best few",
    )
    auto_minutes: float = _flag(5.0, "time for these runs; 0: choose by the model alone", "MINUTES")
    plan_for: str = _flag(
        "",
        'plan for machines that are not at hand, for example "64 x H100-80GB, 1000 GiB host" or "128 nodes of 8 x'
        ' H100-80GB, 2000 GiB host, 400 Gbit/s", as --dry_run does for this one; with --auto the best layout there',
        "MACHINES",
    )
    calibrate: bool = _flag(
        False, "start nothing: measure this machine's rates for the planner, and keep them in the user's cache folder"
    )


# In the order of --help.
FLAG_GROUPS = (
    ModelFlags,
    PlanFlags,
    BatchFlags,
    DataFlags,
    OptimizerFlags,
    MachineFlags,
    PlanningFlags,
    CheckpointFlags,
    OutputFlags,
)


@dataclass(frozen=True)
class TrainConfig(
    OutputFlags,
    CheckpointFlags,
    PlanningFlags,
    MachineFlags,
    OptimizerFlags,
    DataFlags,
    BatchFlags,
    PlanFlags,
    ModelFlags,
):
    """The settings of a run, flat: the groups exist for --help alone.

    None and "auto" (but for Gemini's placement and --resume) mean: not chosen yet, :meth:`resolve` does that.
    """

    def resolve(self, device_type: str, world_size: int = 1, local_world_size: int | None = None) -> ResolvedConfig:
        """Decide what was left open; see commons.config.resolved.

        Args:
            device_type: "cuda" or "cpu".
            world_size: ranks in all; ``local_world_size`` of them on this machine (default: all).
        """
        from commons.config.resolved import Where, resolve

        return resolve(self, Where(device_type, world_size, local_world_size or world_size))

    @property
    def base_precision(self) -> str:
        """What is computed and kept in where no matrix product of a block is meant: fp8 is bf16 there."""
        return "bf16" if self.precision == "fp8" else self.precision

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model together."""
        return self.tp_degree * self.pp_degree

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in a job of ``world_size`` ranks."""
        return world_size // self.model_parallel_size

    def default_run_name(self, world_size: int, time_stamp: str) -> str:
        """A folder name that says what ran: plan, size, data x tensor x pipeline degrees, precision, time."""
        degrees = f"{self.data_parallel_size(world_size)}x{self.tp_degree}x{self.pp_degree}"
        return f"{self.distplan}-{self.model_type}-{degrees}-{self.precision}-{time_stamp}"

    def as_dict(self) -> dict[str, Any]:
        """For config.json: every setting by its flag's name, in the order of --help."""
        return {f.name: getattr(self, f.name) for group in FLAG_GROUPS for f in dataclasses.fields(group)}


def as_typed(value: Any) -> str:
    """A setting's value as a user types it. It reads back as the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def as_words(settings: Mapping[str, Any]) -> list[str]:
    """Words of a command line: a flag and its value for each of the settings, which are given by name."""
    return [word for name, value in settings.items() for word in (f"--{name}", as_typed(value))]
