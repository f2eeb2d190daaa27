"""What a step takes beyond what rests, phase by phase, on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from commons.config.resolved import ResolvedConfig
from commons.distributed.layout import place
from commons.planner.activations import BlockCase, BlockMemory, block_memory, rough_block_memory
from commons.planner.calibration import Calibration
from commons.planner.gpus import GpuModel
from commons.planner.states import (
    FP32,
    ITEM_BYTES,
    Chunks,
    Held,
    block_parameters,
    gemini_chunks,
    model_parameters,
    stage_blocks,
)
from model_zoo import ModelShape

Kinds = Mapping[str, int]

KERNELS_SINCE = (8, 0)  # commons.ops.triton_kernels.OLDEST_CAPABILITY, in a module that needs Triton
# Elements of an eager Adam on a GPU that are converted at once: commons.plans.colossal.adam_kernels
CONVERTED = 320 * 65536
LOGITS_COPIES = 12  # bytes for each of tokens x vocabulary, where the loss is written out: commons.ops.cross_entropy
EAGER_LOSS, COMPILED_LOSS = 4.5, 2  # in logits: pieces of the fused loss as kernels, as compiled and as eager passes
VOCAB_PIECE = 2**26 * FP32  # commons.ops.vocab_parallel_cross_entropy


@dataclass(frozen=True)
class Run:
    """One rank of a run that is planned."""

    config: ResolvedConfig
    world_size: int
    local_world_size: int
    rank: int
    gpu: GpuModel | None
    calibration: Calibration
    rough: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.config.device == "cuda"

    @property
    def shape(self) -> ModelShape:
        return self.config.shape()

    @property
    def copies(self) -> int:
        """Data-parallel ranks."""
        return self.config.data_parallel_size(self.world_size)

    @property
    def stage(self) -> int:
        return place(self.rank, tp_degree=self.config.tp_degree, pp_degree=self.config.pp_degree).pipeline

    @property
    def is_torch(self) -> bool:
        return self.config.distplan.startswith("Pytorch_")

    @property
    def as_functions(self) -> bool:
        """Whether the suite's functions run, or HuggingFace's modules."""
        config = self.config
        if config.distplan == "CAI_Gemini":
            return config.gemini_hooks == "block" and config.tp_degree == 1
        return config.distplan != "CAI_Hybrid" and config.runs_as_functions

    @property
    def item(self) -> int:
        """Bytes of one number as matrix products take it."""
        return ITEM_BYTES[self.config.precision]

    @property
    def hidden_item(self) -> int:
        """Bytes of one number of the hidden states: under autocast the residual stream stays fp32."""
        return FP32 if self.config.distplan in ("Pytorch_DDP", "Pytorch_ZeRO") else self.item

    @property
    def kernels(self) -> bool:
        """Whether norms and loss come from commons.ops.triton_kernels."""
        new = self.gpu is None or self.gpu.capability >= KERNELS_SINCE
        return self.on_gpu and self.config.compile == "on" and new

    @property
    def microbatch(self) -> int:
        """Sequences of one pass."""
        return max(1, self.config.batch_size // (self.config.num_microbatches if self.config.pp_degree > 1 else 1))

    @property
    def tokens(self) -> int:
        """Of one pass."""
        return self.microbatch * self.config.seq_len

    @property
    def captured(self) -> bool:
        return self.on_gpu and self.config.captures_graphs(self.world_size, self.config.peer_copies == "on")

    @cached_property
    def blocks(self) -> list[int]:
        return stage_blocks(self.config, self.stage)

    @cached_property
    def chunks(self) -> Chunks:
        return gemini_chunks(self.config, self.world_size)

    @property
    def workspaces(self) -> int:
        """Of cuBLAS: the forward and the backward pass run on threads of their own, and a capture on another stream."""
        return self.calibration.workspace * (4 if self.captured else 2) if self.on_gpu else 0

    def always(self) -> Kinds:
        """What is there all the time beside the states: workspaces, and HuggingFace's causal masks."""
        masks = len(self.blocks) * (self.shape.positions**2 + FP32)
        return {"workspaces": self.workspaces + masks}


def phases(run: Run, held: Iterable[Held]) -> Iterator[tuple[str, Kinds]]:
    """The moments of a step at which memory can be highest, and what each takes beyond what rests, by kind."""
    blocks, moment = _Blocks(run), _Moment(run, list(held))
    last = run.stage == run.config.pp_degree - 1
    early = -run.calibration.workspace if run.captured and not run.is_torch else 0  # the backward pass has not run yet
    for name, activations, loss, backward in blocks.moments(last):
        kinds = {
            "activations": activations,
            "logits and loss": loss,
            "gathered chunks": moment.gathered(name),
            "gradients": moment.gradients(name) + backward,
            "parameters": moment.parameters(name),
        }
        if early and name in ("forward", "loss"):
            kinds["workspaces"] = early
        yield name, kinds
    yield "optimizer", moment.optimizer()


class _Blocks:
    """Activations of the blocks and of the loss."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._block = _block_memory(run)
        self._hidden = run.tokens * run.shape.hidden * run.hidden_item
        # a region of Gemini's keeps its input, needed or not
        self._kept = self._block.saved + (self._hidden if self._block.keeps_input or _has_regions(run) else 0)

    def moments(self, last: bool) -> Iterator[tuple[str, int, int, int]]:
        """Name, activations, logits and loss, and gradients that are on their way."""
        run, block = self._run, self._block
        layers = len(run.blocks)
        # a pipeline's stage has begun so many microbatches when the first comes back
        before = (self._in_flight() - 1) * layers * self._kept
        all_kept, table = before + layers * self._kept, self._table_gradient()
        products = run.calibration.workspace if _fuses_gelu(run) else 0  # of cuBLASLt: commons.ops.cublaslt
        yield "forward", all_kept - self._kept + self._hidden + block.forward + products, 0, 0
        if last:
            yield "loss", all_kept + self._hidden, self._loss(), 0
            yield "loss backward", all_kept + self._hidden, self._loss_backward(), 0
        first = all_kept + self._hidden + block.backward + products  # with the gradient of the result
        yield "backward", first, 0, table if last else 0
        yield "end of backward", before + self._kept + self._hidden + block.backward + products, 0, table if last else 0

    def _in_flight(self) -> int:
        config = self._run.config
        return min(config.pp_degree - self._run.stage, config.num_microbatches) if config.pp_degree > 1 else 1

    def _table_gradient(self) -> int:
        """Of the tied table from the head: it waits for the embedding's."""
        run = self._run
        item = FP32 if run.config.distplan in ("Pytorch_DDP", "Pytorch_ZeRO") else run.item
        return run.shape.padded_vocab // run.config.tp_degree * run.shape.hidden * item

    def _loss(self) -> int:
        """At the peak of the head's forward pass; see commons.ops.cross_entropy."""
        run = self._run
        vocab, width = run.shape.padded_vocab, run.shape.hidden
        logits = run.tokens * vocab // run.config.tp_degree
        if not run.as_functions:
            if run.config.tp_degree > 1 or run.config.distplan == "CAI_Hybrid":
                return self._hidden + 2 * run.item * logits + min(VOCAB_PIECE, FP32 * logits)
            return self._hidden + LOGITS_COPIES * logits
        casts = 0 if run.hidden_item == run.item else (run.tokens + vocab) * width * run.item
        factor = 1 if run.kernels else COMPILED_LOSS if run.config.compile == "on" else EAGER_LOSS
        piece = int(factor * run.item * _piece_tokens(run.tokens, vocab) * vocab)
        return self._hidden + casts + self._loss_gradients() + piece

    def _loss_gradients(self) -> int:
        """Of hidden states, and of the table in fp32."""
        run = self._run
        return run.tokens * run.shape.hidden * run.item + run.shape.padded_vocab * run.shape.hidden * FP32

    def _loss_backward(self) -> int:
        return (
            self._loss_gradients() + self._hidden + self._table_gradient() if self._run.as_functions else self._loss()
        )


def _piece_tokens(tokens: int, vocab: int) -> int:
    from commons.ops.cross_entropy import piece_tokens

    return piece_tokens(tokens, vocab)


def _has_regions(run: Run) -> bool:
    return run.config.distplan == "CAI_Gemini" and run.as_functions


def _fuses_gelu(run: Run) -> bool:
    """As commons.model.compile decides it on the device itself."""
    config = run.config
    fits = config.precision in ("bf16", "fp16") and config.activation_checkpointing != "selective"
    return run.as_functions and run.kernels and fits and run.shape.hidden % 8 == 0


def _block_memory(run: Run) -> BlockMemory:
    import torch

    config = run.config
    dtypes = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype, autocast = dtypes[config.precision], None
    if run.hidden_item != run.item:
        dtype, autocast = torch.float32, dtypes[config.precision]
    case = BlockCase(
        shape=run.shape,
        tokens=(run.microbatch, config.seq_len),
        dtype=dtype,
        hidden_dtype=dtype,
        autocast=autocast,
        recompute=config.activation_checkpointing,
        compiled=config.compile == "on",
        fused_gelu=_fuses_gelu(run),
        kernels=run.as_functions and run.kernels,
        attention=config.attention,
        dropout=config.dropout,
        fp8=config.precision == "fp8",
        tp=config.tp_degree,
    )
    return rough_block_memory(case) if run.rough else block_memory(case)


class _Moment:
    """What a plan itself holds beyond its states at the moments of a step."""

    def __init__(self, run: Run, held: list[Held]) -> None:
        self._run, self._held = run, held
        self._elements = sum(each.nbytes for each in held if each.kind == "parameters") // run.item

    def _bytes(self, kind: str) -> int:
        return sum(each.nbytes for each in self._held if each.kind == kind and each.place != "pinned")

    # --- gradients

    def gradients(self, moment: str) -> int:
        """Beyond those that rest."""
        run, plan = self._run, self._run.config.distplan
        if plan == "CAI_Gemini":
            return self._whole_gradient_chunk()
        if plan in ("Pytorch_DDP", "Pytorch_ZeRO"):
            return self._bytes("gradients")  # the buckets are made anew in the second step, beside the first ones
        accumulates = run.config.grad_accum > 1 or run.config.num_microbatches > 1
        if plan == "Pytorch_FSDP":
            whole = sum(p for p in self._whole_parameters()) * run.item
            shards = self._bytes("parameters")
            return (whole if accumulates else 0) + (shards if moment == "end of backward" else 0)
        at_rest = self._bytes("gradients")
        return self._bytes("parameters") - at_rest if accumulates or moment == "end of backward" else 0

    def _whole_parameters(self) -> list[int]:
        return [parameter.elements for parameter in model_parameters(self._run.shape)]

    def _whole_gradient_chunk(self) -> int:
        run = self._run
        largest = max(cut.size for cut in run.chunks.cuts)
        return run.item * largest if run.config.grad_accum > 1 else 0

    def optimizer(self) -> Kinds:
        """While the optimizer runs."""
        run, config = self._run, self._run.config
        parameters = self._bytes("parameters")
        if config.distplan == "CAI_Gemini":
            eager = config.compile == "off" and run.on_gpu
            return {"workspaces": FP32 * min(CONVERTED, parameters // run.item) if eager else 0}
        if config.distplan in ("Pytorch_DDP", "Pytorch_ZeRO"):
            return {}
        if config.distplan == "Pytorch_FSDP":
            return {"gradients": parameters}
        masters = self._bytes("master weights")
        if config.distplan == "CAI_Hybrid" and not (run.copies > 1 and config.zero_stage):
            return {"gradients": masters or parameters}
        return {"gradients": parameters + masters}

    # --- what is gathered

    def gathered(self, moment: str) -> int:
        """Parameters that are whole for the moment."""
        run = self._run
        if run.config.distplan == "Pytorch_FSDP":
            block = sum(parameter.elements for parameter in block_parameters(run.shape.hidden))
            root = sum(self._whole_parameters()) - block * run.shape.layers
            blocks = {"loss": 1, "loss backward": 1}.get(moment, 3)  # gathered, to come, and its gradients
            return run.item * (root + blocks * block)
        if run.config.distplan != "CAI_Gemini" or (run.config.shard_param_frac == 0 and run.config.peer_copies == "on"):
            return 0
        if run.copies == 1:
            return 0
        sizes = [cut.size for cut in run.chunks.cuts]
        window = sum(sizes[number] for number in self._window(moment))
        stays = sum(sizes) * (1 - run.config.shard_param_frac)
        whole = min(window + stays, sum(sizes)) if stays else window
        if run.config.peer_copies == "on":
            return run.item * int(whole)
        # gathered by NCCL, a chunk takes the place of its own part; the gradients of the block before are being reduced
        part = 1 / run.chunks.zero_size
        reduced = sizes[0] * (1 + part) if moment in ("backward", "end of backward") else 0
        return run.item * int(whole * (1 - part) + reduced)

    def _window(self, moment: str) -> set[int]:
        """Numbers of the chunks that the moment's region reads, and of those gathered ahead of the next."""
        run = self._run
        head = run.chunks.of(["transformer.wte.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"])
        of_block = [
            run.chunks.of([f"transformer.h.{block}.ln_1.weight", f"transformer.h.{block}.mlp.c_proj.weight"])
            for block in run.blocks[-4:]
        ]
        ahead = run.config.max_prefetch
        if moment in ("loss", "loss backward"):
            mine, upcoming = set(head), of_block[::-1]
        else:
            mine, upcoming = set(of_block[-1]), of_block[-2::-1]
        new = dict.fromkeys(number for numbers in upcoming for number in numbers if number not in mine)
        return mine | set(list(new)[:ahead])

    def parameters(self, moment: str) -> int:
        """Parts that came from the host and stay on the device until their gradients go back."""
        run = self._run
        if run.config.distplan != "CAI_Gemini" or not run.chunks.offloaded:
            return 0
        cuts, zero_size = run.chunks.cuts, run.chunks.zero_size
        window = self._window(moment)
        if moment == "end of backward":
            return 0
        here = [number for number in run.chunks.offloaded if number not in run.chunks.waiting or number in window]
        return sum(run.item * (cuts[number].size // zero_size) for number in here)
