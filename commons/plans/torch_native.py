"""torch's own plans: DistributedDataParallel, ZeroRedundancyOptimizer and FSDP2, with the same meaning of
precision as the others.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from commons.config.auto import EAGER_STEPS
from commons.config.resolved import ResolvedConfig
from commons.distributed.device import Device, compute_dtype
from commons.distributed.process_group import every_rank
from commons.lifecycle.notices import say
from commons.model.compile import functions_for, run_as_functions
from commons.model.cuda_graph import TIMES_INSIDE, WholeStepGraph, has_room
from commons.model.initial_weights import decay_groups, seeded_init_
from commons.ops.gradient_norm import clip_, sum_of_squares
from commons.plans.states import Counters, StateHolder, StatePiece, pieces
from commons.plans.torch_states import HOLDERS
from commons.plans.trainable import Mark, Update, evaluating, weighted
from model_zoo import build_model

# Passes that are launched before a capture: DDP measures itself in the first ten, FSDP2 sets itself up in the first.
DDP_WARM_UP, FSDP_WARM_UP = 11, 2
# what keeps DDP from sending buffers before every forward pass: torch 2.13 warns of the older name
BUFFERS_ARGUMENT = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)


class TorchTrainable:
    """fp32 parameters computing in ``precision``; for fp16 with a dynamic loss scale."""

    replayed_bytes = 0
    shared_bytes: int | None = None

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        config: ResolvedConfig,
        device: Device,
        autocast: bool,
        holder: StateHolder,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self._shape, self._holder = config.shape(), holder
        self._clip_grad_norm = config.clip_grad_norm
        self._autocast_dtype = compute_dtype(config.base_precision) if autocast and config.precision != "fp32" else None
        self._device_type, self._device = device.type, device.torch_device
        fp16 = config.precision == "fp16"
        self.loss_scaler = torch.amp.GradScaler(device.type, init_scale=config.initial_loss_scale, enabled=fp16)

    @property
    def param_groups(self) -> list[dict]:
        return self.optimizer.param_groups

    def micro_batch(self, last: bool) -> AbstractContextManager:
        if isinstance(self.model, DistributedDataParallel):
            return nullcontext() if last else self.model.no_sync()
        self.model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]  (FSDP2 adds it)
        return nullcontext()

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        mark("forward")
        loss = weighted(self.forward(tokens), weight)
        mark("backward")
        self.backward(loss)
        return loss

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """The loss of one micro-batch, a scalar. ``tokens``: int64 [batch, sequence]."""
        return self._loss(self.model, tokens)

    def _loss(self, model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self._device_type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def evaluate(self, tokens: torch.Tensor) -> torch.Tensor | None:
        model = self.model
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whole on every rank: nobody has to be asked
        with evaluating(model):
            loss = self._loss(model, tokens)
        if model is self.model:
            model.reshard()  # pyright: ignore[reportCallIssue]  (FSDP2 keeps the last gathered for a backward pass)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """The gradients of ``loss``, times the loss scale; on the last micro-batch averaged over the ranks
        (collective).
        """
        self.loss_scaler.scale(loss).backward()

    def step(self) -> Update:
        norm = None
        if self._clip_grad_norm > 0:
            self.loss_scaler.unscale_(self.optimizer)
            norm = float(self._clip())
        scale = self.loss_scaler.get_scale()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        skipped = self.loss_scaler.get_scale() < scale
        return Update(None if skipped else norm, skipped)

    def states(self) -> Iterator[StatePiece]:
        return pieces(self._shape, self._holder.held(), tensor_rank=0, tensor_ranks=1)

    def after_load(self) -> None:
        self._holder.refresh()

    def counters(self) -> Counters:
        scaler = self.loss_scaler
        if not scaler.is_enabled():
            return Counters(self._holder.updates())
        return Counters(self._holder.updates(), scaler.get_scale(), scaler._get_growth_tracker())

    def set_counters(self, counters: Counters) -> None:
        self._holder.set_updates(counters.updates)
        scaler = self.loss_scaler
        if scaler.is_enabled() and counters.loss_scale is not None:
            numbers = {"scale": counters.loss_scale, "_growth_tracker": counters.good_steps}
            scaler.load_state_dict({**scaler.state_dict(), **numbers})

    def _clip(self) -> torch.Tensor:
        """Clip the gradients, whole or sharded (collective); the norm before, an fp64 scalar on the device."""
        gradients: list[Any] = [p.grad for p in self.model.parameters() if p.grad is not None]
        sharded = not isinstance(self.model, DistributedDataParallel)
        parts = [gradient.to_local() for gradient in gradients] if sharded else gradients
        squares = sum_of_squares(parts, self._device)
        if sharded:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        clip_(parts, norm, self._clip_grad_norm)
        return norm


class CapturedTorchTrainable(TorchTrainable):
    """The same with both passes captured as one CUDA graph in the second step; see commons.model.cuda_graph.

    Without it the host cannot keep up: two H100s waited for it for a third of gpt2_medium's step under FSDP2
    (2026-11-27, benchmarks/NOTES.md).
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._steps = self._step_bytes = 0
        self._graph: WholeStepGraph | None = None
        self._gradients: list[tuple[nn.Parameter, torch.Tensor]] = []

    def forward_backward(self, tokens: torch.Tensor, weight: float, mark: Mark) -> torch.Tensor | None:
        """The same, its loss in memory that the next call overwrites. Nothing is accumulated: ``weight`` is 1."""
        self._steps += 1
        if self._steps == EAGER_STEPS + 1:
            self._capture(tokens)
        if self._graph is None:
            loss = super().forward_backward(tokens, weight, mark)
            self._step_bytes = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
            return loss
        mark("forward")
        loss = self._graph.replay(tokens)
        mark("backward", self._graph.backward_begins)
        return loss

    def step(self) -> Update:
        update = super().step()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient  # where the graph writes it
        return update

    def _capture(self, tokens: torch.Tensor) -> None:
        if not TIMES_INSIDE:
            say(f"torch {torch.__version__} cannot time passes inside a CUDA graph: falling back to eager launches")
            return
        if not every_rank(has_room(self._step_bytes), tokens.device):
            say("too little free device memory to capture CUDA graphs (--cuda_graph): falling back to eager launches")
            return
        passes = DDP_WARM_UP if isinstance(self.model, DistributedDataParallel) else FSDP_WARM_UP
        self._graph = WholeStepGraph(self.forward, self.backward, self._clear, tokens, passes)
        self.replayed_bytes = self._graph.peak_bytes
        self._gradients = [(each, each.grad) for each in self.model.parameters() if each.grad is not None]
        say("captured forward and backward pass as CUDA graphs, replayed from here on (--cuda_graph)")

    def _clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)


class ShardAdamW(torch.optim.AdamW):
    """AdamW on this rank's shards of FSDP2's parameters, as plain tensors.

    As DTensors the 292 of gpt2_medium keep the host busy for 10 ms of every step, as tensors for 2 (two H100s,
    2026-11-27, benchmarks/NOTES.md).

    Attributes:
        shards: FSDP2's parameters, and this rank's shard of each, which the states belong to.
    """

    def __init__(self, groups: list[dict], **options: Any) -> None:
        self.shards: list[tuple[Any, nn.Parameter]] = []
        super().__init__([{**group, "params": [*map(self._shard_of, group["params"])]} for group in groups], **options)

    def _shard_of(self, parameter: Any) -> nn.Parameter:
        shard = nn.Parameter(parameter.detach().to_local())
        self.shards.append((parameter, shard))
        return shard

    def step(self, closure: Any = None) -> Any:
        for parameter, shard in self.shards:
            shard.grad = None if parameter.grad is None else parameter.grad.to_local()
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for parameter, _ in self.shards:
            parameter.grad = None


def build(kind: str, config: ResolvedConfig, device: Device) -> TorchTrainable:
    """Wrap the model (collective). ``kind``: "ddp", "zero" or "fsdp"."""
    with torch.device(device.torch_device):
        model = build_model(
            config.shape(),
            attention=config.attention,
            dropout=config.dropout,
            activation_checkpointing=config.activation_checkpointing,
        )
    seeded_init_(model, config.seed, device.torch_device, compute_dtype(config.base_precision))
    if config.runs_as_functions:
        run_as_functions(model, functions_for(config, device.type))
    if kind == "fsdp":
        wrapped = _fully_sharded(model, config, device)
    else:
        wrapped = _replicated(model, device, captured=config.cuda_graph == "on")
    trainable = CapturedTorchTrainable if config.cuda_graph == "on" else TorchTrainable
    optimizer = _adamw(kind, wrapped, config)
    holder = HOLDERS[kind](wrapped, optimizer, device.rank, device.world_size)
    return trainable(wrapped, optimizer, config, device, kind != "fsdp", holder)


def _replicated(model: nn.Module, device: Device, captured: bool) -> DistributedDataParallel:
    """Wrap the model with DDP. It accumulates gradients on the stream on which it was made, and what is ``captured``
    may not touch the default stream.
    """
    stream = torch.cuda.Stream() if captured else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device.local_rank] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            **{BUFFERS_ARGUMENT: False},  # pyright: ignore[reportArgumentType]  (GPT-2's are constant masks)
        )
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
    return wrapped


def _fully_sharded(model: nn.Module, config: ResolvedConfig, device: Device) -> nn.Module:
    """Shard every block on its own and the rest together; parameters are cast to the compute dtype when they
    are gathered.
    """
    try:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    except ImportError:  # torch 2.5 has it under its older address
        from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (device.world_size,))
    policy = MixedPrecisionPolicy(
        param_dtype=None if config.precision == "fp32" else compute_dtype(config.base_precision)
    )
    for block in model.transformer.h:  # pyright: ignore
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _adamw(kind: str, model: nn.Module, config: ResolvedConfig) -> torch.optim.Optimizer:
    """Fused AdamW; for "zero" its states are spread over the data-parallel ranks."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    arguments: dict = {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.adam_eps,
        "fused": True,
    }
    groups = decay_groups(model, config.weight_decay)
    if kind == "zero":
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **arguments)
    if kind == "fsdp" and config.precision != "fp16":  # whose scaler asks all ranks about DTensors only
        return ShardAdamW(groups, **arguments)
    return torch.optim.AdamW(groups, **arguments)
